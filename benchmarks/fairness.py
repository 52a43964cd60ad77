"""Short plain requests beside one with very many new contexts: what they wait, with APE and stock.

    python -m benchmarks.fairness --dummy-8b -- --attention-backend flashinfer

One client asks a short question again and again, each as soon as the last is answered. Meanwhile a
second one sends a long request of which nothing is cached: to a server with APE as many contexts,
to stock SGLang as one prompt of the same tokens. Both servers cut its prefill into chunks of the
same size (``--chunked-prefill-size``). Compared is what the short ones wait for their first and
their last token, alone and beside a long one. Checked is that nothing of a request was cached and
that short ones were under way beside long ones.

--quick uses a small model and long requests of 1,024 tokens, on a CPU if need be. It is a check of
the machinery: its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.client import Client, Timed
from benchmarks.common.controls import ControlError
from benchmarks.common.fresh import FreshIds
from benchmarks.common.methods import Method, body_of
from benchmarks.common.options import parser_of
from benchmarks.common.pairs import (
    Kind,
    PairResults,
    add_pair_options,
    kinds_of,
    pair_model,
    pair_server,
    reported,
    title_of,
    window_flags,
)
from benchmarks.common.prompts import Prompt
from benchmarks.common.results import Column, show
from benchmarks.common.script import exit_status

BENCHMARK = "fairness"
KEY = ("kind", "phase")
ALONE, BESIDE = "alone", "beside"
USUAL = {
    "contexts": 128,
    "context_tokens": 1024,
    "prefix": 64,
    "short": 64,
    "generated": 16,
    "repeats": 3,
    "seconds_alone": 5,
}
QUICK = {
    "contexts": 16,
    "context_tokens": 64,
    "prefix": 16,
    "short": 16,
    "generated": 4,
    "repeats": 2,
    "seconds_alone": 3,
}
QUICK_FLAGS = ("--chunked-prefill-size", "128")
METHODS = {Kind.STOCK: Method.SEQUENTIAL, Kind.APE: Method.APE}


class ShortRequests:
    """A client that asks short questions until it is told to stop; a context manager.

    Args:
        client: of the server.
        ids: draws the questions.
        args: the options.

    Attributes:
        timed: the requests that were answered.
    """

    def __init__(self, client: Client, ids: FreshIds, args: argparse.Namespace) -> None:
        self.timed: list[Timed] = []
        self._client = client
        self._ids = ids
        self._args = args
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> ShortRequests:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _ask(self) -> None:
        try:
            while not self._stop.is_set():
                prompt = Prompt(self._ids.sequence(self._args.short), (), [])
                self.timed.append(ask(self._client, Kind.STOCK, prompt, self._args.generated))
        except BaseException as error:  # raised again in the main thread
            self._error = error


def ask(client: Client, kind: Kind, prompt: Prompt, new_tokens: int) -> Timed:
    """Send one request of which nothing may be cached.

    Args:
        client: of the server.
        kind: how contexts are sent; of a prompt without any, stock's.
        prompt: fresh ids.
        new_tokens: to generate.

    Raises:
        ControlError: some of it was cached.
    """
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    (timed,) = client.stream([body_of(METHODS[kind], prompt, (), None, sampling)])
    if timed.meta["cached_tokens"]:
        raise ControlError(f"{timed.meta['cached_tokens']} tokens of a new request were cached")
    return timed


def long_prompt(ids: FreshIds, args: argparse.Namespace, contexts: int) -> Prompt:
    own = tuple(ids.sequence(args.context_tokens) for _ in range(contexts))
    return Prompt(ids.sequence(args.prefix), own, ids.sequence(args.short))


def measure_server(
    kind: Kind, client: Client, vocab: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one server.

    Raises:
        ControlError: something was cached, or no short request was under way beside a long one.
    """
    ids = FreshIds(vocab, args.seed)
    prompts = [long_prompt(ids, args, args.contexts) for _ in range(args.repeats)]
    ask(client, kind, long_prompt(ids, args, max(args.contexts // 4, 1)), 1)  # warms up
    longs: list[Timed] = []
    with ShortRequests(client, ids, args) as shorts:
        time.sleep(args.seconds_alone)
        for prompt in prompts:
            longs.append(ask(client, kind, prompt, 1))
            time.sleep(1)
    return rows_of(kind, shorts.timed[1:], longs)  # the first one warms up


def rows_of(kind: Kind, shorts: Sequence[Timed], longs: Sequence[Timed]) -> list[dict[str, Any]]:
    """The short requests alone, and those that any long one overlaps.

    Raises:
        ControlError: there are none of one sort.
    """
    beside = [any(_overlap(short, long) for long in longs) for short in shorts]
    if all(beside) or not any(beside):
        raise ControlError(f"{kind}: {sum(beside)} of {len(beside)} short requests met a long one")
    rows = [
        _row(kind, phase, [s for s, met in zip(shorts, beside, strict=True) if met is is_beside])
        for phase, is_beside in ((ALONE, False), (BESIDE, True))
    ]
    rows[1]["long_first_token"] = statistics.median(long.first_token for long in longs)
    return rows


def _overlap(one: Timed, other: Timed) -> bool:
    return one.sent < other.sent + other.last_token and other.sent < one.sent + one.last_token


def _row(kind: Kind, phase: str, shorts: Sequence[Timed]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind.value, "phase": phase, "requests": len(shorts)}
    for name in ("first_token", "last_token"):
        seconds = [getattr(short, name) for short in shorts]
        row |= {name: statistics.median(seconds), f"{name}_longest": max(seconds)}
        row[f"{name}_all"] = seconds
    return row


COLUMNS = (
    Column("server", "kind"),
    Column("short requests", "phase"),
    Column("how many", "requests"),
    Column("first token, median", "first_token", "{:.3f} s"),
    Column("longest", "first_token_longest", "{:.3f} s"),
    Column("last token, median", "last_token", "{:.3f} s"),
    Column("longest", "last_token_longest", "{:.3f} s"),
    Column("the long one's first token", "long_first_token", "{:.3f} s"),
)


def report(content: Mapping[str, Any]) -> None:
    label = ", a check of the machinery" if content["settings"]["quick"] else ""
    show(f"{title_of(content)}\nseconds of short requests{label}", COLUMNS, content["rows"])


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Raises ServerError, Refused, ControlError, OtherSettingsError."""
    model = pair_model(args, parser)
    settings = {"model": model.name, "seed": args.seed, "quick": args.quick}
    settings |= {name: getattr(args, name) for name in USUAL}
    results = PairResults(args.out, BENCHMARK, settings, KEY, adds=args.only is not None)
    row = args.prefix + args.contexts * args.context_tokens + args.short
    own = [*window_flags(args, row), *(QUICK_FLAGS if args.quick else ())]
    flags = {Kind.STOCK: own, Kind.APE: [*own, "--ape-max-context-tokens", str(row)]}
    for kind in kinds_of(args):
        with pair_server(kind, model, args, flags) as server:
            results.begin(kind, server, {"chunk": server.info["chunked_prefill_size"]})
            for one in measure_server(kind, server.client, model.vocab, args):
                results.add(one)
    results.finish()
    return results.content


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of("benchmarks.fairness", __doc__)
    add_pair_options(parser, BENCHMARK)
    for name, value in USUAL.items():
        flag = "--" + name.replace("_", "-")
        text = f"default: {value}, with --quick {QUICK[name]}"
        parser.add_argument(flag, type=int, metavar="N", help=text)
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            parser.error("all numbers must be positive")
    return args, parser


def main() -> None:
    args, parser = parse(sys.argv[1:])
    report(reported(args.report, BENCHMARK, parser) if args.report else measure(args, parser))


if __name__ == "__main__":
    sys.exit(exit_status(main))
