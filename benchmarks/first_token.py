"""Time to the first token over HTTP, by how a request names its cached contexts.

    python -m benchmarks.first_token --model MODEL --json first_token.json -- --device cpu

Starts ``sglang.launch_server --enable-ape``, registers contexts with ``POST /ape/contexts``, and
asks for one streamed token over all of them. The same request goes out with its contexts as text,
as token ids and as ids of the context store; where model and KV pool have room for it, also as one
plain prompt of the same tokens whose start is cached. The forms take turns in random order within
each round; contexts come in a new order each round, and every query is new.

*Before the scheduler* is the time from just before the client sends until SGLang's main process has
handed the request to its scheduler (``meta_info.api_server_dispatch_finish_ts``): the body's way,
reading it, checks, tokenising, the token row, sending it on. *At the door* is the part of it before
SGLang itself takes the request over (``request_received_ts``). Neither depends on the model's
weights. Bodies are serialised beforehand; what that takes is shown apart.

What stands behind ``--`` goes to the server; ``--load-format dummy`` there saves the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import httpx
import orjson
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.machine import describe
from benchmarks.common.server import started
from benchmarks.gpu_speed.timing import summarise

TEXT, IDS, STORE, SEQUENCE = "text", "input_ids", "store id", "plain"
FORMS = (TEXT, IDS, STORE)
AIM_MS = 10.0  # before the scheduler, for contexts given by ids of either kind
AIMED = (IDS, STORE)

PREFIX = "Answer the question from the documents below.\n\n"
QUERY_TOKENS = 64
WARM_UP = 3  # rounds
CHARACTERS_PER_TOKEN = 16  # more than any passage needs
RUNNING_REQUESTS = 8  # each reserves a row of the page table, as long as all contexts
ANSWER_SECONDS = 3600  # encoding all contexts on a CPU takes long

_HEADERS = {"Content-Type": "application/json"}

Ids = list[int]


##### What is asked


class Contexts(NamedTuple):
    """The contexts in all their forms, in one order, after one prefix."""

    prefix: Ids
    texts: list[str]
    ids: list[Ids]
    known: list[str]  # ids of the context store

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def cached(self) -> int:
        """Tokens of a request that every answer must have found in the cache."""
        return len(self.prefix) + self.tokens

    def ordered(self, order: Sequence[int]) -> Contexts:
        lists = ([own[i] for i in order] for own in (self.texts, self.ids, self.known))
        return Contexts(self.prefix, *lists)


def passage(tokenizer: Any, words: str, start: int, tokens: int) -> tuple[str, Ids]:
    """About so many tokens of the text ``words`` from ``start`` on, and their ids.

    Text that was cut between two tokens may be tokenised otherwise at its end.
    """
    piece = (words[start:] + words[:start])[: CHARACTERS_PER_TOKEN * tokens]
    ids = tokenizer.encode(piece, add_special_tokens=False)[:tokens]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text, tokenizer.encode(text, add_special_tokens=False)


class Texts:
    """Passages of Python's own documentation, drawn from one seed."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._words = "\n\n".join(topics.values())
        self._starts = [i for i, character in enumerate(self._words) if character == " "]
        self.random = random.Random(seed)
        special = set(tokenizer.all_special_ids)
        self._first_ids = [i for i in range(tokenizer.vocab_size) if i not in special]
        self.random.shuffle(self._first_ids)

    def contexts(self, count: int, tokens: int) -> Contexts:
        drawn = [self._passage(tokens) for _ in range(count)]
        texts, ids = map(list, zip(*drawn, strict=True))
        prefix = self._tokenizer.encode(PREFIX, add_special_tokens=True)
        return Contexts(prefix, texts, ids, [])

    def query(self) -> Ids:
        """A query of which not even the first token was asked before."""
        return [self._first_ids.pop(), *self._passage(QUERY_TOKENS - 1)[1]]

    def _passage(self, tokens: int) -> tuple[str, Ids]:
        return passage(self._tokenizer, self._words, self.random.choice(self._starts), tokens)


def body_of(form: str, contexts: Contexts, query: Ids) -> dict[str, Any]:
    """The body of ``POST /generate``; all forms stand for the same tokens."""
    body: dict[str, Any] = {
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    if form == SEQUENCE:
        return body | {"input_ids": sum(contexts.ids, start=contexts.prefix) + query}
    body["input_ids"] = query
    if form == STORE:  # the prefix comes with the ids
        return body | {"contexts": [{"id": id} for id in contexts.known]}
    body["prefix_ids"] = contexts.prefix
    if form == TEXT:
        return body | {"contexts": contexts.texts}
    return body | {"contexts": [{"input_ids": ids} for ids in contexts.ids]}


##### What is answered


class Answer(NamedTuple):
    """The first token of one request. Times in milliseconds since just before it was sent."""

    first_token: float
    door: float  # until SGLang took the request over
    before_scheduler: float
    output: Ids
    meta: dict[str, Any]


def ask(client: httpx.Client, body: bytes) -> Answer:
    """Raises RuntimeError when the server refuses."""
    request = client.build_request("POST", "/generate", content=body, headers=_HEADERS)
    sent = time.time()
    begin = time.perf_counter()
    response = client.send(request, stream=True)
    with contextlib.closing(response):
        first, arrived = "", 0.0
        for line in response.iter_lines():  # to the end, or the connection cannot be used again
            if not first and line:
                first, arrived = line, time.perf_counter()
    if response.status_code != 200 or '"meta_info"' not in first:
        raise RuntimeError(f"HTTP {response.status_code}: {first[:500]}")
    answer = orjson.loads(first.removeprefix("data: "))
    meta = answer["meta_info"]
    return Answer(
        first_token=(arrived - begin) * 1e3,
        door=(meta["request_received_ts"] - sent) * 1e3,
        before_scheduler=(meta["api_server_dispatch_finish_ts"] - sent) * 1e3,
        output=answer["output_ids"],
        meta=meta,
    )


def check_cached(form: str, contexts: Contexts, answer: Answer) -> None:
    """Raises RuntimeError unless just P and all contexts came from the cache."""
    wanted = {"cached_tokens": contexts.cached, "completion_tokens": 1}
    found = {name: answer.meta[name] for name in wanted}
    if form != SEQUENCE:
        wanted |= {"contexts": len(contexts.ids), "cached_context_tokens": contexts.tokens}
        found |= {name: answer.meta["ape"][name] for name in ("contexts", "cached_context_tokens")}
    if found != wanted:
        raise RuntimeError(f"contexts by {form}: the answer says {found}, expected is {wanted}")


def check_same(answers: dict[str, Answer]) -> None:
    """Raises RuntimeError unless one query asked in several forms was one request.

    It was asked once before: a form that means the same contexts finds the query cached too, but
    for the last token, which is always computed.
    """
    outputs = {form: answer.output for form, answer in answers.items()}
    if len(set(map(tuple, outputs.values()))) != 1:
        raise RuntimeError(f"the forms answer with different tokens: {outputs}")
    for form, answer in answers.items():
        cached, prompt = answer.meta["cached_tokens"], answer.meta["prompt_tokens"]
        if cached != prompt - 1:
            raise RuntimeError(
                f"contexts by {form}: {cached} of {prompt} tokens were cached for a query that had "
                "been asked in another form"
            )


##### The server


@contextlib.contextmanager
def running_server(model: str, flags: Sequence[str]) -> Iterator[httpx.Client]:
    """A server of its own, and a client with one connection to it."""
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        server = stack.enter_context(started(model, ["--log-level", "warning", *flags], log))
        yield stack.enter_context(
            httpx.Client(
                base_url=server.url,
                limits=httpx.Limits(max_connections=1),
                timeout=ANSWER_SECONDS,
                trust_env=False,
            )
        )


def server_flags(contexts: Contexts, queries: int) -> list[str]:
    """Room for all contexts, for them again as one sequence, and for every query."""
    pool = 2 * contexts.cached + (queries + RUNNING_REQUESTS) * (QUERY_TOKENS + 8)
    return [
        *("--enable-ape", "--enable-metrics"),
        *("--ape-max-context-tokens", str(contexts.tokens)),
        *("--max-total-tokens", str(pool)),
        *("--max-running-requests", str(RUNNING_REQUESTS)),
    ]


def register(client: httpx.Client, contexts: Contexts) -> Contexts:
    """The contexts with their ids.

    Raises:
        RuntimeError: the server refuses, or reads other tokens out of the texts than we did.
    """
    body = orjson.dumps({"prefix_ids": contexts.prefix, "contexts": contexts.texts})
    response = client.post("/ape/contexts", content=body, headers=_HEADERS)
    if response.status_code != 200:
        raise RuntimeError(f"HTTP {response.status_code}: {response.text[:500]}")
    stored = response.json()["contexts"]
    for i, (one, ids) in enumerate(zip(stored, contexts.ids, strict=True)):
        if one["tokens"] != len(ids):
            raise RuntimeError(f"context {i} has {one['tokens']} tokens, in ids {len(ids)}")
    return contexts._replace(known=[one["id"] for one in stored])


def why_no_sequence(client: httpx.Client, contexts: Contexts) -> str | None:
    """What keeps the contexts from being asked as one plain prompt, None if nothing does."""
    prompt = contexts.cached + QUERY_TOKENS
    window = client.get("/v1/models").json()["data"][0]["max_model_len"]
    if prompt >= window:
        return f"{prompt} tokens in one sequence exceed the model's window of {window}"
    pool = client.get("/server_info").json()["max_total_num_tokens"]
    if prompt + contexts.cached >= pool:
        return f"the KV pool of {pool} tokens cannot hold {prompt} beside the contexts"
    return None


##### Measuring


class Sample(NamedTuple):
    """One request; times in milliseconds."""

    body_bytes: int
    serialise: float
    door: float
    before_scheduler: float
    first_token: float


Samples = dict[str, list[Sample]]


def warm_up(client: httpx.Client, texts: Texts, contexts: Contexts, forms: Sequence[str]) -> None:
    """Check that all forms are one request; encode the plain prompt."""
    if SEQUENCE in forms:
        ask(client, orjson.dumps(body_of(SEQUENCE, contexts, texts.query())))
    for _ in range(WARM_UP):
        order = texts.random.sample(range(len(contexts.ids)), len(contexts.ids))
        shuffled, query = contexts.ordered(order), texts.query()
        bodies = {form: orjson.dumps(body_of(form, shuffled, query)) for form in FORMS}
        ask(client, bodies[STORE])
        check_same({form: ask(client, body) for form, body in bodies.items()})


def measure(
    client: httpx.Client, texts: Texts, contexts: Contexts, forms: Sequence[str], rounds: int
) -> Samples:
    samples: Samples = {form: [] for form in forms}
    for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
        order = texts.random.sample(range(len(contexts.ids)), len(contexts.ids))
        shuffled = contexts.ordered(order)
        for form in texts.random.sample(forms, len(forms)):
            asked = contexts if form == SEQUENCE else shuffled  # an exact hit needs its order
            body = body_of(form, asked, texts.query())
            begin = time.perf_counter()
            content = orjson.dumps(body)
            serialise = (time.perf_counter() - begin) * 1e3
            answer = ask(client, content)
            check_cached(form, contexts, answer)
            sample = Sample(
                len(content), serialise, answer.door, answer.before_scheduler, answer.first_token
            )
            samples[form].append(sample)
    return samples


def run(given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    load = os.getloadavg()
    texts = Texts(AutoTokenizer.from_pretrained(given.model), given.seed)
    contexts = texts.contexts(given.contexts, given.context_tokens)
    queries = WARM_UP + 1 + given.rounds * (len(FORMS) + 1)
    flags = [*server_flags(contexts, queries), *given.server]
    say(f"{len(contexts.ids)} contexts, {contexts.tokens} tokens; starting {' '.join(flags)}")
    with running_server(given.model, flags) as client:
        begin = time.perf_counter()
        contexts = register(client, contexts)
        say(f"contexts registered after {time.perf_counter() - begin:.1f} s; warming up")
        left_out = why_no_sequence(client, contexts)
        forms = FORMS if left_out else (*FORMS, SEQUENCE)
        if left_out:
            say(f"the plain prompt is left out: {left_out}")
        warm_up(client, texts, contexts, forms)
        samples = measure(client, texts, contexts, forms, given.rounds)
    return {
        "command": ["python", "-m", "benchmarks.first_token", *sys.argv[1:]],
        "model": _config(given.model),
        "machine": {**describe(), "cpu": _cpu(), "load": load},
        "server": flags,
        "contexts": len(contexts.ids),
        "context_tokens": contexts.tokens,
        "prefix_tokens": len(contexts.prefix),
        "query_tokens": QUERY_TOKENS,
        "aim_ms": AIM_MS,
        "plain_left_out": left_out,
        "samples": {
            form: [sample._asdict() for sample in of_form] for form, of_form in samples.items()
        },
    }


def _config(model: str) -> dict[str, Any] | None:
    """The shape of a model in a folder, before ``--json-model-override-args``."""
    path = Path(model) / "config.json"
    return json.loads(path.read_text()) if path.exists() else None


def _cpu() -> str | None:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


##### Showing

_COLUMNS = {
    "serialise": "serialised by the client",
    "before_scheduler": "before the scheduler",
    "door": "of it at the door",
    "first_token": "first token",
}


def shown(samples: Sequence[float]) -> str:
    """Median, and below it the spread: 10th to 90th percentile, of a few samples the extremes."""
    found = summarise(samples)
    digits = 2 if found.median < 10 else 1 if found.median < 100 else 0
    median, low, high = (f"{value:,.{digits}f}" for value in found[:3])
    return f"{median}\n{low}-{high}"


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A row a form: its name, the body's bytes, and a cell for each of ``_COLUMNS``."""
    rows = []
    for form, samples in result["samples"].items():
        size = summarise([sample["body_bytes"] for sample in samples]).median
        cells = [shown([sample[name] for sample in samples]) for name in _COLUMNS]
        rows.append([form, f"{size:,.0f}", *cells])
    return rows


def verdicts(result: dict[str, Any]) -> list[str]:
    """How the forms that have an aim relate to it."""
    lines = []
    for form in AIMED:
        times = [sample["before_scheduler"] for sample in result["samples"][form]]
        median = summarise(times).median
        word = "within" if median <= result["aim_ms"] else "over"
        lines.append(
            f"before the scheduler by {form}: {median:.1f} ms, {word} the aim of "
            f"{result['aim_ms']:.0f} ms"
        )
    return lines


def show(result: dict[str, Any], console: Console) -> None:
    rounds = len(result["samples"][STORE])
    table = Table(
        title=f"{result['contexts']} cached contexts, {result['context_tokens']} tokens, and a new "
        f"query of {result['query_tokens']}; ms, medians of {rounds}, below them p10-p90",
        show_lines=True,
    )
    table.add_column("contexts by")
    for name in ("body, bytes", *_COLUMNS.values()):
        table.add_column(name, justify="right")
    for row in rows_of(result):
        table.add_row(*row)
    console.print(table)
    if result["plain_left_out"]:
        console.print(f"plain: left out, {result['plain_left_out']}")
    for line in verdicts(result):
        console.print(line)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="first_token", description=(__doc__ or "").split("\n\n", 1)[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--contexts", type=int, default=256, help="their number (%(default)s)")
    parser.add_argument(
        "--context-tokens", type=int, default=512, help="of each context, about (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed requests of each form")
    parser.add_argument("--seed", type=int, default=0, help="of texts, queries and orders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw samples and machine")
    parser.add_argument("server", nargs="*", help="flags of the server, after --")
    given = parser.parse_args(arguments)
    if min(given.contexts, given.context_tokens, given.rounds) < 1:
        parser.error("--contexts, --context-tokens and --rounds must be positive")
    return given


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    console = Console(stderr=True)
    result = run(given, lambda text: console.print(text, highlight=False, soft_wrap=True))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result, Console())


if __name__ == "__main__":
    main(sys.argv[1:])
