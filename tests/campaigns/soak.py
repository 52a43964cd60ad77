"""Soak: thousands of requests through HTTP on the CPU, many at once, of every kind, in a tiny pool.

Requests with contexts, half of them with ``soft`` or ``refine``, and plain ones are mixed; many are
aborted, or their clients disconnect at some stage; the pool holds a fraction of the contexts,
SGLang retracts requests all the time, contexts are registered, pinned and deleted beside, and
scores forgotten. Every completed answer and its scores are compared with the oracle's, and what was
received of a cut one with its beginning. Requests belong to three tenants with the same texts;
again and again a new one comes, asks what they ask, and must find neither their ids nor their
scores nor anything in the cache. At the end nothing may be left:

- KV slots and locks: the server is idle with nothing used, after all pins were deleted, and its
  cache can be flushed.
- Processes, threads and file handles: none that was not there after a warm-up of the same kind.
- Tasks of the main process's event loop: likewise.
- Requests: SGLang drains before it ends at SIGTERM, waiting for every one that it still has a
  state for. It must end.
- Memory: from the third quarter of the time to the last, the median grows by less than
  ``LEVEL_BYTES`` a request.

Run it as ``python -m tests.campaigns.soak``.
"""

import argparse
import asyncio
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import httpx
from tqdm import tqdm

from benchmarks.common.client import Client
from sglang_ape.arguments import ATTENTION, LIKELIHOOD
from tests.campaigns.soak_client import HANG_SECONDS, Clients, Outcome, Pool
from tests.campaigns.soak_jobs import Corpus, Job, Place, make_corpus, make_jobs
from tests.campaigns.soak_requests import Ask, Draw
from tests.campaigns.soak_residue import Census, Memory, Observed, left_over, names_of
from tests.support import models
from tests.support.server import Server

POOL_TOKENS = 1200
MAX_PINNED = POOL_TOKENS // 4
POOL = Pool(usable=POOL_TOKENS - 8, max_pinned=MAX_PINNED)
LARGE_TOKENS = 1000  # contexts of the largest requests; with many pins there is no room for them
LEVEL_BYTES = 1024  # a task that is never ended takes more
LEVEL_REQUESTS = 3000  # fewer say nothing about memory
MAX_FAULTS = 20
DRAIN_SECONDS = 60

FLAGS = (
    *("--enable-ape", "--enable-metrics", "--served-model-name", "tiny"),
    *("--max-total-tokens", str(POOL_TOKENS), "--ape-max-pinned-tokens", str(MAX_PINNED)),
    *("--ape-max-context-tokens", "4000", "--max-running-requests", "8"),
    *("--chunked-prefill-size", "128"),  # requests end between two chunks, too
)
# A disconnected client is noticed after a second instead of four.
ENV = {"SGLANG_TEST_RETRACT": "true", "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1"}

_METRICS = {
    "retracted requests": "sglang:num_retracted_requests_total",
    "evicted contexts": "sglang:ape_evicted_contexts_total",
    "answered requests with contexts": "sglang:ape_requests_total",
    "tokens to score and to refine": "sglang:ape_ladder_tokens_total",
}

_ENDS = ("completed", "aborted", "disconnects", "refused")


class Plan(NamedTuple):
    """The arguments of a soak."""

    seed: int
    requests: int
    concurrency: int
    jobs: int
    scorer: str = LIKELIHOOD

    @property
    def warm_up(self) -> int:
        return max(3 * self.concurrency, min(self.requests // 10, 500))


class Tally:
    """What was seen."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, str, str]] = Counter()  # kind, sort and outcome
        self.beside: Counter[str] = Counter()
        self.seen: dict[str, float] = {}  # by the server's metrics
        self.memory: list[str] = []
        self.holdings: list[str] = []
        self.seconds = 1.0
        self.faults: list[str] = []

    def add(self, ask: Ask, outcome: Outcome) -> None:
        self.outcomes[outcome.label] += 1
        self.kinds[ask.kind, ask.sort, outcome.label] += 1
        for fault in outcome.faults:
            self.faults.append(
                f"request {ask.number}, {ask.kind}, {ask.fate}: {fault}\n  {ask.body}"
            )

    def __str__(self) -> str:
        requests = self.outcomes.total()
        lines = [
            f"{requests} requests in {self.seconds:.0f} s, {requests / self.seconds:.1f} a second"
        ]
        lines += _section("outcomes", self.outcomes.most_common())
        lines += ["", "by kind", *self._by_kind()]
        lines += _section("beside them", sorted(self.beside.items()))
        lines += _section("seen by the server, the warm-up included", self.seen.items())
        lines += ["", "at the end, as after the warm-up", *(f"  {line}" for line in self.holdings)]
        lines += [
            "",
            "resident memory without that of files, median of each quarter of the time, MiB",
        ]
        lines += [f"  {line}" for line in self.memory]
        lines += ["", f"{len(self.faults)} faults", *self.faults[:MAX_FAULTS]]
        return "\n".join(lines)

    def _by_kind(self) -> list[str]:
        lines = [_row("", "", *_ENDS, "other")]
        for kind, sort in sorted({key[:2] for key in self.kinds}):
            counts: Counter[str] = Counter()
            for (one, other, label), number in self.kinds.items():
                if (one, other) == (kind, sort):
                    counts[next((end for end in _ENDS if label.startswith(end)), "other")] += number
            lines.append(_row(kind, sort, *(counts[end] for end in (*_ENDS, "other"))))
        return lines


def _row(kind: str, sort: str, *cells: object) -> str:
    return f"  {kind:24}{sort:24}" + "".join(f"{cell!s:>13}" for cell in cells)


def _section(title: str, rows: Iterable[tuple[str, float]]) -> list[str]:
    return ["", title, *(f"  {number:7.0f}  {name}" for name, number in rows)]


def run(plan: Plan, model: Path, folder: Path) -> Tally:
    """Soak a server of its own, whose log goes to ``folder``."""
    corpus = make_corpus(plan.seed)
    by_attention = plan.scorer == ATTENTION
    jobs = make_jobs(corpus, model, plan.seed, plan.jobs, LARGE_TOKENS, by_attention)
    tally = Tally()
    env = {**ENV, "SOAK_TASKS": str(folder / "tasks.json")}
    flags = (*FLAGS, "--ape-scorer", plan.scorer)
    with Server(model, flags, folder / "log", env, "tests.campaigns.soak_server") as server:
        try:
            observed = Observed(server.process.pid, folder / "tasks.json")
            asyncio.run(_Soak(plan, server, observed, corpus, jobs, tally).run())
        except (httpx.HTTPError, OSError, AssertionError) as error:
            tally.faults.append(f"the soak broke off: {error!r}\n{server.log_tail(2000)}")
        _drain(server, tally)
    tracebacks = server.log.read_text(errors="replace").count("Traceback (most recent call last)")
    tally.seen["tracebacks in the log"] = tracebacks
    return tally


class _Soak:
    """The requests to one server, and what is counted of them."""

    def __init__(
        self,
        plan: Plan,
        server: Server,
        observed: Observed,
        corpus: Corpus,
        jobs: list[Job],
        tally: Tally,
    ) -> None:
        self._plan = plan
        self._server = server
        self._observed = observed
        self._corpus = corpus
        self._jobs = jobs
        self._tally = tally
        self._ids: dict[Place, str] = {}

    async def run(self) -> None:
        plan = self._plan
        warm_up = Tally()
        await self._soak(warm_up, plan.warm_up, f"{plan.seed}w", "warm-up")
        self._tally.faults += [f"in the warm-up: {fault}" for fault in warm_up.faults]
        # What is looked at in the end is opened once before.
        await asyncio.to_thread(self._server.flush)
        await asyncio.to_thread(self._metrics)
        before = await asyncio.to_thread(self._observed.settled)
        memory = Memory(list(before))
        start = time.monotonic()
        await self._soak(self._tally, plan.requests, f"{plan.seed}s", "soak", memory)
        self._tally.seconds = time.monotonic() - start
        await asyncio.to_thread(self._look_for_residue, before, memory)

    async def _soak(
        self, tally: Tally, requests: int, seed: str, label: str, memory: Memory | None = None
    ) -> None:
        """Send requests, with the calls beside them; at the end nothing is registered."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=HANG_SECONDS, limits=limits, trust_env=False
        ) as session:
            clients = Clients(session, self._corpus, self._ids, POOL)
            for place in self._corpus.places:
                await clients.register([place], pin=False)
            rng = random.Random(seed)
            beside = [
                asyncio.create_task(clients.register_for_ever(rng)),
                asyncio.create_task(clients.forget_for_ever(rng)),
                asyncio.create_task(clients.visit_for_ever(rng, self._jobs)),
                asyncio.create_task(clients.flush_for_ever(rng)),
            ]
            if memory is not None:
                beside.append(asyncio.create_task(_sample(memory)))
            draw = Draw(self._corpus, self._jobs, self._ids, seed)
            await _ask_all(draw, clients, tally, requests, self._plan.concurrency, label)
            for task in beside:
                task.cancel()
            for ended in await asyncio.gather(*beside, return_exceptions=True):
                if not isinstance(ended, asyncio.CancelledError):
                    tally.faults.append(f"a call beside the requests failed: {ended!r}")
            async with asyncio.timeout(HANG_SECONDS):
                await clients.forget_all()
        tally.beside = clients.beside
        tally.faults += clients.faults

    def _look_for_residue(self, before: Census, memory: Memory) -> None:
        tally, server = self._tally, self._server
        try:
            server.flush()  # idle, and nothing used
        except AssertionError as error:
            tally.faults.append(f"KV slots are left over: {error}")
        after = self._observed.settled(before)
        tally.holdings = [f"{after[pid]}; before {before.get(pid)}" for pid in after]
        tally.faults += [f"left over: {found}" for found in left_over(before, after)]
        for pid, holdings in before.items():
            quarters = memory.quarters(pid)
            grown = (quarters[3] - quarters[2]) * 2**20 / (self._plan.requests / 4)
            shown = ", ".join(f"{size:.1f}" for size in quarters)
            tally.memory.append(f"{holdings.name}: {shown}; at last {grown:.0f} bytes a request")
            if self._plan.requests >= LEVEL_REQUESTS and grown > LEVEL_BYTES:
                tally.faults.append(f"memory grows: {tally.memory[-1]}")
        tally.seen = self._metrics()

    def _metrics(self) -> dict[str, float]:
        metrics = Client(self._server.url).metrics()
        return {title: metrics.get(name, 0.0) for title, name in _METRICS.items()}


async def _ask_all(
    draw: Draw, clients: Clients, tally: Tally, requests: int, concurrency: int, label: str
) -> None:
    numbers = count()
    bar = tqdm(total=requests, desc=label, unit="request")

    async def work() -> None:
        while (number := next(numbers)) < requests and len(tally.faults) < MAX_FAULTS:
            ask = draw.ask(number)
            tally.add(ask, await clients.ask(ask))
            bar.update()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    bar.close()


async def _sample(memory: Memory) -> None:
    while True:
        memory.sample()
        await asyncio.sleep(0.5)


def _drain(server: Server, tally: Tally) -> None:
    """End the server in the way in which it waits for requests that it has a state for."""
    processes = names_of(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        tally.faults.append(f"not drained {DRAIN_SECONDS} s after SIGTERM: {server.log_tail(2000)}")
        return
    time.sleep(1)
    for pid, name in processes.items():
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                tally.faults.append(f"process {name} ({pid}) outlives the server")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=150, help="distinct questions")
    parser.add_argument("--scorer", choices=(LIKELIHOOD, ATTENTION), default=LIKELIHOOD)
    plan = Plan(**vars(parser.parse_args()))
    print(plan, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tally = run(plan, models.tiny_llama(Path(folder) / "model"), Path(folder))
        print(tally)
        if tally.faults:
            kept = Path(tempfile.gettempdir()) / "soak-server.log"
            shutil.copy(Path(folder) / "log", kept)
            print(f"the server's log is in {kept}", file=sys.stderr)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
