"""The campaign of bad input: malformed and hostile requests to every route of a real server.

    python -m tests.campaigns.bodies --seed 0 --count 10000

Every request has to be answered in time, with a status below 500, and without a traceback or more
than a few hundred bytes in the log. Good requests between them have to get the answers that they
got at the beginning, and at the end no KV slot may be locked or lost. What SGLang itself does with
a body that has no contexts is counted apart.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from tqdm import tqdm

from tests.campaigns.body_strategies import (
    BODY_ROUTES,
    JSON_TYPE,
    OTHER_TENANT,
    ROUTES,
    Body,
    Known,
    encoded,
    is_plain,
    requests_to,
)
from tests.support.models import tiny_llama
from tests.support.server import Server

CONNECTIONS = 8
BLOCK = 100  # bodies between two looks at the log
GOOD_EVERY = 20
LIMIT_SECONDS = 30
LOG_BYTES = 500  # a request, on average over a block, beside its own target
LOG_LINE_BYTES = 2000
MAX_RESTARTS = 4
REPLAYED_BLOCKS = 10

FLAGS = (
    *("--enable-ape", "--served-model-name", "tiny", "--log-level", "info"),
    *("--context-length", "256", "--max-total-tokens", "6000", "--max-running-requests", "32"),
    *("--ape-max-context-tokens", "2000", "--tool-call-parser", "pythonic"),
)

# Lines about requests that were served.
_SERVED = (b"Prefill batch", b"Decode batch")
# A registration beyond what the store or the pins may hold: insufficient storage, as documented.
_FULL = ("register", 507)
_STREAMED_FAILURE = re.compile(rb'"(?:code|status_code)":\s*5\d\d')


class Answer(NamedTuple):
    """What a request came back with; ``fault`` says what is wrong about it."""

    body: Body
    status: int | None
    content: bytes
    seconds: float
    fault: str | None


class Fault(NamedTuple):
    """Something that must not happen, and the requests that did it."""

    reason: str
    bodies: tuple[Body, ...]
    detail: str

    def __str__(self) -> str:
        shown = "\n".join(f"  {_shown(body)}" for body in self.bodies[:CONNECTIONS])
        return f"{self.reason}\n{shown}\n  {self.detail[-1500:]}"


class Tally:
    """What a campaign has sent and seen so far."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, Any]] = Counter()
        self.mutations: Counter[tuple[str, str]] = Counter()
        self.log_bytes: Counter[str] = Counter()
        self.good: list[float] = []  # seconds
        self.slowest: list[Answer] = []
        self.faults: list[Fault] = []
        self.plain: list[Fault] = []  # of SGLang itself, on bodies without contexts

    @property
    def failures(self) -> int:
        return len(self.faults) + len(self.plain)

    def count(self, route: str) -> int:
        return sum(count for (name, _), count in self.statuses.items() if name == route)

    def refused(self) -> Counter[str]:
        """Answers of status 4xx, by route."""
        refused: Counter[str] = Counter()
        for (route, status), count in self.statuses.items():
            refused[route] += count if _class(status) == "4xx" else 0
        return refused

    def add(self, answer: Answer) -> None:
        body = answer.body
        self.statuses[body.route, answer.status] += 1
        self.mutations[body.mutation, _class(answer.status)] += 1
        kept = [*self.slowest, answer._replace(content=b"")]
        self.slowest = sorted(kept, key=lambda one: -one.seconds)[:5]
        if answer.fault is not None:
            detail = answer.content[:400].decode(errors="replace")
            faults = self.plain if is_plain(body) else self.faults
            faults.append(Fault(answer.fault, (body,), detail))

    def __str__(self) -> str:
        lines = [f"{'route':<14}{'bodies':>8}  {'log bytes each':>14}  statuses"]
        for route in dict.fromkeys(route for route, _ in self.statuses):
            count = self.count(route)
            seen = {str(own): n for (name, own), n in self.statuses.items() if name == route}
            statuses = ", ".join(f"{status}: {n}" for status, n in sorted(seen.items()))
            each = self.log_bytes[route] / max(count, 1)
            lines.append(f"{route:<14}{count:>8}  {each:>14.0f}  {statuses}")
        lines.append(f"\n{'mutation':<22}{'2xx':>8}{'3xx':>8}{'4xx':>8}{'5xx':>8}{'none':>8}")
        for name in sorted({name for name, _ in self.mutations}):
            counts = (self.mutations[name, own] for own in ("2xx", "3xx", "4xx", "5xx", "none"))
            lines.append(f"{name:<22}" + "".join(f"{count:>8}" for count in counts))
        longest = max(self.good, default=0.0)
        lines.append(f"\ngood requests between them: {len(self.good)}, up to {longest:.1f} s")
        lines.append("slowest:")
        lines += [
            f"  {one.seconds:6.1f} s  {one.status}  {_shown(one.body)}" for one in self.slowest
        ]
        kinds = {"of SGLang itself, without contexts": self.plain, "faults": self.faults}
        for kind, faults in kinds.items():
            lines.append(f"{kind}: {len(faults)}")
            reasons = Counter(fault.reason for fault in faults)
            lines += [f"  {count:>5}  {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)


class Sender:
    """Sends requests to a server, one connection a thread.

    Args:
        port: of the server, on 127.0.0.1.
        authorization: the header of that name, if there is an API key.
    """

    def __init__(self, port: int, authorization: str | None) -> None:
        self._port = port
        self._headers = {"Authorization": authorization} if authorization else {}
        self._local = threading.local()

    def send(self, body: Body) -> Answer:
        start = time.monotonic()
        try:
            status, kind, content = self._exchange(body)
        except TimeoutError:
            self._close()
            return Answer(body, None, b"", time.monotonic() - start, "no answer in time")
        except (OSError, http.client.HTTPException) as error:
            self._close()
            content = repr(error).encode()
            return Answer(body, None, content, time.monotonic() - start, "connection dropped")
        fault = None
        if status >= 500 and (body.route, status) != _FULL:
            fault = f"status {status} on {body.route}"
        elif "event-stream" in kind and _STREAMED_FAILURE.search(content):
            fault = f"a failure in a stream on {body.route}"
        return Answer(body, status, content, time.monotonic() - start, fault)

    def _exchange(self, body: Body) -> tuple[int, str, bytes]:
        reused = getattr(self._local, "connection", None) is not None
        try:
            return self._once(body)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            # A server may close a connection that was idle; on a new one there is no such excuse.
            self._close()
            if not reused:
                raise
            return self._once(body)

    def _once(self, body: Body) -> tuple[int, str, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT_SECONDS)
            self._local.connection = connection
        headers = {**self._headers, **dict(body.headers)}
        connection.request(body.method, body.target, body.content or None, headers)
        response = connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read()

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
        self._local.connection = None


class Session:
    """Sends blocks of bodies to one server, and looks at its answers and its log.

    Args:
        server: a running one, which may have contexts already.
        tally: gets what was seen.
    """

    def __init__(self, server: Server, tally: Tally) -> None:
        self.known = Known(_register(server, None), _register(server, OTHER_TENANT))
        self._server = server
        self._tally = tally
        self._sender = Sender(server.port, server.client.headers.get("Authorization"))
        self._good = {route: _good_request(route, self.known) for route in ROUTES}
        self._wanted = {route: self._sender.send(body) for route, body in self._good.items()}
        for answer in self._wanted.values():
            assert answer.status == 200, answer
        self._pool = ThreadPoolExecutor(CONNECTIONS)
        self._replays = REPLAYED_BLOCKS

    def close(self) -> None:
        self._pool.shutdown()

    def run(self, route: str, bodies: Sequence[Body]) -> None:
        """Send bodies of one route, several at a time, with good requests between them.

        Raises:
            ServerEnded: it did.
        """
        start = self._log_size()
        faults = self._tally.failures
        sent = [self._pool.submit(self._send, i, body) for i, body in enumerate(bodies)]
        answers = [answer for one in sent if (answer := one.result()) is not None]
        self._check_alive([answer.body for answer in answers if answer.status is None])
        for answer in answers:
            self._tally.add(answer)
        log = self._log_since(start)
        self._tally.log_bytes[route] += _size(log)
        explained = self._tally.failures > faults
        if _flooded(log, bodies) and not explained and self._replays:
            self._replays -= 1
            self._replay(bodies, log)

    def _send(self, i: int, body: Body) -> Answer | None:
        if self._server.process.poll() is not None:
            return None
        answer = self._sender.send(body)
        if i % GOOD_EVERY == GOOD_EVERY - 1 and answer.status is not None:
            self._check_good(body)
        return answer

    def _check_good(self, before: Body) -> None:
        route = before.route
        answer = self._sender.send(self._good[route])
        if answer.status == 200 and _essence(answer) == _essence(self._wanted[route]):
            self._tally.good.append(answer.seconds)
            return
        detail = f"{answer.status} {answer.content[:600]!r} {answer.fault or ''}"
        self._tally.faults.append(Fault("a good request got another answer", (before,), detail))

    def _check_alive(self, unanswered: Sequence[Body]) -> None:
        if unanswered:
            time.sleep(3)  # a scheduler that ended takes the rest down
        if self._server.process.poll() is None:
            return
        detail = _last_error(self._server.log_tail(20_000))
        self._tally.faults.append(Fault("the server ended", tuple(unanswered), detail))
        raise ServerEnded

    def _replay(self, bodies: Sequence[Body], whole: list[bytes]) -> None:
        """Find out which body of a block filled the log, one at a time."""
        found = False
        for body in bodies:
            start = self._log_size()
            self._sender.send(body)
            time.sleep(0.02)
            log = self._log_since(start)
            if _flooded(log, [body]) and not is_plain(body):
                found = True
                self._tally.faults.append(_flood((body,), log))
        if not found:
            self._tally.faults.append(_flood(tuple(bodies), whole))

    def _log_size(self) -> int:
        return self._server.log.stat().st_size

    def _log_since(self, start: int) -> list[bytes]:
        with self._server.log.open("rb") as log:
            log.seek(start)
            lines = log.read().splitlines(keepends=True)
        return [line for line in lines if not any(mark in line for mark in _SERVED)]


class ServerEnded(Exception):
    """The server's process is no more."""


class Campaign:
    """Bodies for all routes, the same for the same seed.

    Args:
        seed: of the bodies.
        count: of distinct bodies a route.
        routes: of :data:`ROUTES`.
        progress: whether to show a bar.
    """

    def __init__(
        self, seed: int, count: int, routes: Sequence[str] = ROUTES, progress: bool = False
    ) -> None:
        self.tally = Tally()
        self._seed = seed
        self._count = count
        self._routes = routes
        self._progress = progress
        self._round = 0
        self._sent: set[int] = set()

    def left(self, route: str) -> int:
        return max(0, self._count - self.tally.count(route))

    def run(self, server: Server) -> None:
        """Send what is left to send, and look for what was left behind.

        Raises:
            ServerEnded: a call with another server goes on.
        """
        before = set(_listed(server))
        session = Session(server, self.tally)
        try:
            for route in self._routes:
                self._run_route(route, session)
        finally:
            session.close()
        for id in set(_listed(server)) - before:
            server.client.delete(f"/ape/contexts/{id}")
        try:
            server.assert_clean()
        except AssertionError as error:
            self.tally.faults.append(Fault("a leak", (), str(error)))

    def _run_route(self, route: str, session: Session) -> None:
        if route in BODY_ROUTES:
            BODY_ROUTES[route].fields()  # imports SGLang, which hypothesis need not see
        bar = tqdm(
            total=self._count,
            initial=self.tally.count(route),
            desc=route,
            disable=not self._progress,
        )
        with bar:
            while left := self.left(route):
                self._round += 1
                seed = self._seed * 1_000_003 + self._round
                found = dict.fromkeys(drawn(route, session.known, BLOCK, seed))
                fresh = [body for body in found if hash(body) not in self._sent][:left]
                self._sent.update(map(hash, fresh))
                session.run(route, fresh)
                bar.update(len(fresh))


def drawn(route: str, known: Known, count: int, seed: int) -> list[Body]:
    """Bodies of one route, the same for the same seed. Hypothesis repeats itself now and then."""
    found: list[Body] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_to(route, known))
    def collect(body: Body) -> None:
        found.append(body)

    collect()
    return found


# Good requests, and what has to stay equal of their answers


def _good_request(route: str, known: Known) -> Body:
    contexts = [{"id": known.own[0]}, {"id": known.own[1]}]
    trees = {
        "generate": {
            "contexts": contexts,
            "text": "Which ship?",
            "sampling_params": {"temperature": 0, "max_new_tokens": 4},
        },
        "completions": {
            "contexts": contexts,
            "prompt": "Which ship?",
            "temperature": 0,
            "max_tokens": 4,
        },
        "chat": {
            "contexts": ["The Heron brought salt.", "The Lark brought wool."],
            "messages": [{"role": "user", "content": "Which ship?"}],
            "temperature": 0,
            "max_tokens": 4,
        },
        "register": {"contexts": contexts},
    }
    if route in trees:
        target = BODY_ROUTES[route].target
        return Body(route, "good", "POST", target, encoded(trees[route]))
    target = "/ape/contexts?limit=1" if route == "list" else f"/ape/contexts/{known.own[0]}"
    return Body(route, "good", "GET", target, b"")


def _essence(answer: Answer) -> Any:
    """Of an answer to a good request, what does not depend on the state of the cache."""
    found = json.loads(answer.content)
    if answer.status != 200:
        return found
    if "choices" in found:
        choice = found["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    if "contexts" in found:
        return [one["id"] for one in found["contexts"]]
    return found["text"] if "text" in found else found["id"]


def _register(server: Server, extra_key: str | None) -> tuple[str, ...]:
    texts = ["The Heron brought salt and timber.", "The Lark brought wool and barley."]
    body = {"contexts": texts, "extra_key": extra_key}
    response = server.post("/ape/contexts", body)
    assert response.status_code == 200, response.text
    return tuple(one["id"] for one in response.json()["contexts"])


def _listed(server: Server) -> list[str]:
    """Ids of all contexts that the server knows."""
    ids: list[str] = []
    after: int | None = None
    while True:
        params = {"limit": 1000} | ({} if after is None else {"after": after})
        page = server.client.get("/ape/contexts", params=params).json()
        ids += [one["id"] for one in page["contexts"]]
        after = page["next"]
        if after is None:
            return ids


# The log


def _flooded(log: Sequence[bytes], bodies: Sequence[Body]) -> bool:
    """Whether requests wrote more than they may; the access log holds their targets."""
    longest = max((len(body.target) for body in bodies), default=0)
    targets = sum(len(body.target) for body in bodies)
    return (
        any(b"Traceback" in line for line in log)
        or max(map(len, log), default=0) > LOG_LINE_BYTES + longest
        or _size(log) - targets > LOG_BYTES * max(len(bodies), 1)
    )


def _flood(bodies: tuple[Body, ...], log: Sequence[bytes]) -> Fault:
    kind = "a traceback in the log" if any(b"Traceback" in one for one in log) else "a log flood"
    text = b"".join(log).decode(errors="replace")
    return Fault(f"{kind}: {_last_error(text)[:120]}", bodies, f"{len(text)} bytes: {text[-1200:]}")


def _size(log: Sequence[bytes]) -> int:
    return sum(map(len, log))


def _last_error(log: str) -> str:
    """The line that names the exception of the last traceback, else the end of the log."""
    errors = re.findall(r"^(?:\[.*?\] )?(\w[\w.]*(?:Error|Exception)\b.*)$", log, re.MULTILINE)
    return errors[-1] if errors else log[-300:]


# What people read


def _shown(body: Body) -> str:
    content = body.content[:300].decode(errors="backslashreplace")
    more = f"… ({len(body.content)} bytes)" if len(body.content) > 300 else ""
    header = "" if body.headers == (JSON_TYPE,) else f" {body.headers}"
    return f"[{body.mutation}] {body.method} {body.target[:120]}{header} {content}{more}"


def _class(status: int | None) -> str:
    return "none" if status is None else f"{status // 100}xx"


def save_faults(faults: Sequence[Fault], folder: Path) -> None:
    """Write each body of a fault to a file, whole, with its first line and headers."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, fault in enumerate(faults):
        for j, body in enumerate(fault.bodies):
            headers = "".join(f"{name}: {value}\r\n" for name, value in body.headers)
            head = f"{body.method} {body.target} HTTP/1.1\r\n{headers}\r\n"
            (folder / f"{i:04d}-{j}.http").write_bytes(head.encode() + body.content)


def _report(tally: Tally, folder: Path) -> None:
    first = {fault.reason: fault for fault in reversed(tally.faults)}
    for fault in first.values():
        print(f"{fault}\n")
    print(tally)
    if tally.faults:
        save_faults(tally.faults, folder)
        print(f"the bodies are in {folder}")


def _run(campaign: Campaign, folder: Path) -> None:
    """With a server of its own, and another one when it ends."""
    model = tiny_llama(folder / "model")
    for start in range(1 + MAX_RESTARTS):
        with Server(model, FLAGS, folder / f"log-{start}") as server:
            try:
                campaign.run(server)
                return
            except ServerEnded:
                print("the server ended", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000, help="distinct bodies a route")
    parser.add_argument("--route", action="append", choices=ROUTES, help="default: all")
    parser.add_argument("--save", type=Path, help="folder for the bodies of faults")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bodies-"))
    campaign = Campaign(args.seed, args.count, args.route or ROUTES, progress=True)
    try:
        _run(campaign, folder)
    finally:
        _report(campaign.tally, args.save or folder / "faults")
    return 1 if campaign.tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
