"""Context tokens from the cache, and what they are worth: stock SGLang beside APE.

    python -m benchmarks.cache_hits --dummy-8b -- --attention-backend flashinfer

*The example of the APE paper's appendix.* Of four documents each request brings three. For each of
the four choices the cache is emptied, the other three are served, then this one. A prefix cache
finds 2 + 2 + 1 + 0 of the 12 documents (41.7 %), a cache of contexts all of them. Both are checked.

*A retrieval service.* Requests bring distinct documents out of thousands, which are as popular as
Zipf's law says, each with a question of its own; the KV pool holds a part of the documents. The
same trace goes to both servers, so many requests at once and each next one as soon as one ends,
once with the documents in order of relevance, which is another for every question, and once with
the most popular first, which is the best that a prefix cache can be given. The first part of the
trace fills the cache and is not counted.

The share of hits is cached context tokens over context tokens, as the servers report them. Beside
it stands what an ideal cache of the same size would find: LRU over whole documents, one request at
a time, computed without a server.

--only stock and --only ape measure one server and add to the results in the folder.

--quick uses a small model and few short documents, on a CPU if need be. It is a check of the
machinery: its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.cache_models import context_cache_finds, prefix_cache_finds
from benchmarks.common.client import Body, Client, Timed, computed_tokens
from benchmarks.common.controls import ControlError
from benchmarks.common.fresh import FreshIds
from benchmarks.common.methods import Method, body_of
from benchmarks.common.options import parser_of
from benchmarks.common.pairs import (
    Kind,
    PairResults,
    PairServer,
    add_pair_options,
    kinds_of,
    pair_model,
    pair_server,
    reported,
    title_of,
    window_flags,
)
from benchmarks.common.prompts import Ids, Prompt
from benchmarks.common.results import Axes, Bars, Column, Line, plot, show
from benchmarks.common.script import exit_status
from benchmarks.common.traces import Order, Request, TraceShape, draw

BENCHMARK = "cache_hits"
EXAMPLE, TRACE = "example", "trace"
KEY = ("part", "kind", "order")
EVICTED = "sglang:evicted_tokens_total"  # missing from /metrics until something is evicted
WINDOWS = 20  # of the plot over a trace
USUAL = {
    "documents": 4000,
    "requests": 1000,
    "per_request": 8,
    "document_tokens": 512,
    "pool_tokens": 262_144,
    "concurrency": 16,
    "prefix": 64,
    "query": 32,
    "generated": 32,
}
QUICK = {
    "documents": 200,
    "requests": 40,
    "per_request": 4,
    "document_tokens": 48,
    "pool_tokens": 4096,
    "concurrency": 4,
    "prefix": 16,
    "query": 8,
    "generated": 2,
}

##### The example

SUBSETS: tuple[Request, ...] = ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3))
# Documents that each subset finds after the other three were served.
FINDS = {Kind.STOCK: (2, 2, 1, 0), Kind.APE: (3, 3, 3, 3)}


def example_row(kind: Kind, found: Sequence[int], document_tokens: int) -> dict[str, Any]:
    """The row of the example.

    Args:
        kind: the server.
        found: context tokens that each of the subsets found in the cache.
        document_tokens: of one document.

    Raises:
        ControlError: they are not those of the paper's example.
    """
    wanted = [count * document_tokens for count in FINDS[kind]]
    share = sum(found) / (sum(map(len, SUBSETS)) * document_tokens)
    if list(found) != wanted:
        raise ControlError(
            f"{kind}: the subsets of the example found {list(found)} context tokens in the cache, "
            f"not {wanted}; that is {share:.1%}"
        )
    return {"part": EXAMPLE, "kind": kind.value, "found": list(found), "hit_share": share}


##### The trace


class Corpus:
    """Documents and questions of random ids; the same seed draws the same ones.

    Args:
        vocab: size of the vocabulary.
        args: the options.
    """

    def __init__(self, vocab: int, args: argparse.Namespace) -> None:
        ids = FreshIds(vocab, args.seed)
        self.prefix = ids.sequence(args.prefix)
        self.documents = [ids.sequence(args.document_tokens) for _ in range(args.documents)]
        self._ids = ids
        self._query = args.query

    def query(self) -> Ids:
        return self._ids.sequence(self._query)

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        return [
            Prompt(self.prefix, tuple(self.documents[i] for i in request), self.query())
            for request in requests
        ]


def bodies_of(kind: Kind, prompts: Sequence[Prompt], generated: int) -> list[Body]:
    """Bodies of ``POST /generate``; both servers get the same tokens."""
    method = Method.APE if kind is Kind.APE else Method.SEQUENTIAL
    sampling = {"temperature": 0, "max_new_tokens": generated, "ignore_eos": True}
    return [body_of(method, prompt, (), None, sampling) for prompt in prompts]


def cached_context_tokens(kind: Kind, prompt: Prompt, meta: Mapping[str, Any]) -> int:
    """Context tokens that a request found in the cache.

    Raises:
        ControlError: the server counts other tokens than were sent.
    """
    contexts = sum(map(len, prompt.contexts))
    if meta["prompt_tokens"] != prompt.tokens:
        raise ControlError(
            f"{kind}: a prompt of {prompt.tokens} tokens came back as {meta['prompt_tokens']}"
        )
    if kind is Kind.STOCK:
        return min(max(meta["cached_tokens"] - len(prompt.prefix), 0), contexts)
    ape = meta["ape"]
    if ape["context_tokens"] != contexts:
        raise ControlError(f"ape: {contexts} context tokens came back as {ape['context_tokens']}")
    return ape["cached_context_tokens"]


class Served(NamedTuple):
    """A part of the trace, answered."""

    prompts: Sequence[Prompt]
    timed: Sequence[Timed]

    def hits(self, kind: Kind) -> list[int]:
        """Cached context tokens of each request."""
        pairs = zip(self.prompts, self.timed, strict=True)
        return [cached_context_tokens(kind, prompt, one.meta) for prompt, one in pairs]


def trace_row(
    kind: Kind, order: Order, warm_up: Served, counted: Served, evicted: float
) -> dict[str, Any]:
    """The row of one order of a trace. Seconds, tokens, shares between 0 and 1.

    Args:
        kind: the server.
        order: of the documents.
        warm_up: the part that is not counted.
        counted: the rest.
        evicted: tokens, while the counted part was served.
    """
    hits = counted.hits(kind)
    contexts = [sum(map(len, prompt.contexts)) for prompt in counted.prompts]
    prompt_tokens = sum(prompt.tokens for prompt in counted.prompts)
    begin = min(one.sent for one in counted.timed)
    seconds = max(one.sent + one.last_token for one in counted.timed) - begin
    row: dict[str, Any] = {
        "part": TRACE,
        "kind": kind.value,
        "order": order.value,
        "requests": len(hits),
        "hit_share": sum(hits) / sum(contexts),
        "context_tokens": sum(contexts),
        "cached_context_tokens": sum(hits),
        "prompt_tokens": prompt_tokens,
        "computed_tokens": sum(computed_tokens(one.meta) for one in counted.timed),
        "evicted_tokens": evicted,
        "seconds": seconds,
        "requests_per_second": len(hits) / seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds,
        "hits": [*warm_up.hits(kind), *hits],
    }
    for name in ("first_token", "last_token"):
        row |= spread_of(name, [getattr(one, name) for one in counted.timed])
    return row


def spread_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile of values, two or more."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name}_{percent}": cuts[percent - 1] for percent in (50, 90, 99)}


def ideal_hits(kind: Kind, requests: Sequence[Request], args: argparse.Namespace) -> list[int]:
    """Context tokens that each request would find in an ideal cache of the same size."""
    finds = context_cache_finds if kind is Kind.APE else prefix_cache_finds
    tail = args.query + args.generated
    capacity = args.pool_tokens - args.prefix
    found = finds(requests, args.document_tokens, tail, capacity)
    return [count * args.document_tokens for count in found]


def longest_row(args: argparse.Namespace) -> int:
    """Tokens of a request of the trace, or of the example, and its answer."""
    documents = max(args.per_request, max(map(len, SUBSETS)))
    return args.prefix + documents * args.document_tokens + args.query + args.generated


def warm_up_of(args: argparse.Namespace) -> int:
    """Requests at the head of a trace that are not counted."""
    return round(args.warm_up * args.requests)


##### Measuring


class Measurement:
    """One server.

    Args:
        kind: which.
        server: as it runs.
        corpus: documents and questions.
        args: the options.
    """

    def __init__(
        self, kind: Kind, server: PairServer, corpus: Corpus, args: argparse.Namespace
    ) -> None:
        self._kind = kind
        self._client: Client = server.client
        self._corpus = corpus
        self._args = args

    def example(self) -> dict[str, Any]:
        """Raises ControlError if it does not come out as in the paper."""
        found = []
        for target in SUBSETS:
            self._client.flush()
            others = [subset for subset in SUBSETS if subset != target]
            for subset in (*others, target):
                served = self._serve([subset], 1, None)
            found += served.hits(self._kind)
        return example_row(self._kind, found, self._args.document_tokens)

    def trace(self, order: Order, requests: Sequence[Request]) -> dict[str, Any]:
        """The row of one order, measured from an empty cache on."""
        self._client.flush()
        count, concurrency = warm_up_of(self._args), self._args.concurrency
        label = f"{self._kind}, by {order}"
        warm_up = self._serve(requests[:count], concurrency, f"{label}, not counted")
        before = self._client.metrics().get(EVICTED, 0.0)
        counted = self._serve(requests[count:], concurrency, label)
        evicted = self._client.metrics().get(EVICTED, 0.0) - before
        row = trace_row(self._kind, order, warm_up, counted, evicted)
        ideal = ideal_hits(self._kind, requests, self._args)[count:]
        return row | {"ideal_hit_share": sum(ideal) / row["context_tokens"]}

    def _serve(self, requests: Sequence[Request], concurrency: int, label: str | None) -> Served:
        prompts = self._corpus.prompts(requests)
        bodies = bodies_of(self._kind, prompts, self._args.generated)
        return Served(prompts, self._client.stream(bodies, concurrency, label))


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Raises ServerError, Refused, ControlError, OtherSettingsError."""
    model = pair_model(args, parser)
    settings = {"model": model.name, "seed": args.seed, "quick": args.quick, "zipf": args.zipf}
    settings |= {name: getattr(args, name) for name in (*USUAL, "warm_up")}
    results = PairResults(args.out, BENCHMARK, settings, KEY, adds=args.only is not None)
    shape = TraceShape(args.documents, args.requests, args.per_request, args.zipf)
    own = ["--max-total-tokens", str(args.pool_tokens), "--enable-metrics"]
    own += window_flags(args, longest_row(args))
    flags = {kind: own for kind in Kind}
    for kind in kinds_of(args):
        corpus = Corpus(model.vocab, args)
        with pair_server(kind, model, args, flags) as server:
            _require_pool(server, args)
            results.begin(kind, server, {"orders": args.orders})
            measurement = Measurement(kind, server, corpus, args)
            row = measurement.example()
            results.add(row)
            print(f"{kind}: {row['hit_share']:.1%} in the paper's example, as it must be")
            for order in args.orders:
                row = measurement.trace(order, draw(shape, order, args.seed))
                results.add(row)
                print(
                    f"{kind}, by {order}: {row['hit_share']:.1%} of the context tokens cached "
                    f"(ideal {row['ideal_hit_share']:.1%}), "
                    f"{row['requests_per_second']:.2f} requests/s",
                    flush=True,
                )
    results.finish()
    return results.content


def _require_pool(server: PairServer, args: argparse.Namespace) -> None:
    """The pool must be as large as was asked for: a smaller one would have other hits."""
    if server.pool_tokens != args.pool_tokens:
        raise ControlError(
            f"the server's KV pool holds {server.pool_tokens:,} tokens, not the "
            f"{args.pool_tokens:,} of --pool-tokens: choose fewer"
        )


##### Showing


def report(content: Mapping[str, Any], folder: Path) -> None:
    """Print the tables and draw the plot."""
    settings = content["settings"]
    label = ", a check of the machinery" if settings["quick"] else ""
    print(f"\n{title_of(content)}")
    rows = sorted(content["rows"], key=lambda row: [*Kind].index(row["kind"]))
    examples = [row for row in rows if row["part"] == EXAMPLE]
    columns = [Column("Server", "kind"), Column("Context tokens cached", "share")]
    columns += [Column("found by each subset", "found")]
    show(
        "Four documents, three in each request",
        columns,
        [row | {"share": f"{row['hit_share']:.1%}"} for row in examples],
    )
    traces = [row for row in rows if row["part"] == TRACE]
    show(_trace_title(settings) + label, _TRACE_COLUMNS, [_in_units(row) for row in traces])
    title = f"{settings['model']}{label}"
    plot(folder / f"{BENCHMARK}.png", title, _plots(traces, settings))


def _trace_title(settings: Mapping[str, Any]) -> str:
    counted = settings["requests"] - round(settings["warm_up"] * settings["requests"])
    return (
        f"{counted} of {settings['requests']} requests counted, {settings['per_request']} of "
        f"{settings['documents']} documents of {settings['document_tokens']} tokens each (Zipf "
        f"{settings['zipf']:g}), pool of {settings['pool_tokens']:,} tokens, "
        f"{settings['concurrency']} requests at once"
    )


_TRACE_COLUMNS = [
    Column("Server", "kind"),
    Column("Order", "order"),
    Column("Cached", "hit_share", "{:.1%}"),
    Column("Ideal", "ideal_hit_share", "{:.1%}"),
    Column("Computed tokens", "computed_tokens", "{:,}"),
    Column("Evicted", "evicted_tokens", "{:,.0f}"),
    Column("Requests/s", "requests_per_second", "{:.2f}"),
    Column("Prompt tokens/s", "prompt_tokens_per_second", "{:,.0f}"),
    Column("First token p50/p90/p99, ms", "first_token"),
    Column("Last token p50/p90/p99, ms", "last_token"),
]


def _in_units(row: Mapping[str, Any]) -> dict[str, Any]:
    def shown(name: str) -> str:
        return " / ".join(f"{1e3 * row[f'{name}_{percent}']:,.0f}" for percent in (50, 90, 99))

    return {**row, **{name: shown(name) for name in ("first_token", "last_token")}}


def moving_share(hits: Sequence[int], tokens: int, windows: int) -> tuple[list[int], list[float]]:
    """Share of hits in successive windows of a trace.

    Args:
        hits: cached context tokens of each request.
        tokens: context tokens of a request.
        windows: how many, fewer if there are fewer requests.

    Returns:
        The request after which each window ends, and its share.
    """
    count = min(windows, len(hits))
    ends = [round((i + 1) * len(hits) / count) for i in range(count)]
    cuts = pairwise([0, *ends])
    return ends, [sum(hits[start:end]) / ((end - start) * tokens) for start, end in cuts]


def _plots(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Axes | Bars]:
    tokens = settings["per_request"] * settings["document_tokens"]
    lines = []
    for row in rows:
        x, share = moving_share(row["hits"], tokens, WINDOWS)
        lines.append(Line(f"{row['kind']}, by {row['order']}", x, share))
    names = [f"{row['kind']}, by {row['order']}" for row in rows]

    def bars(title: str, unit: str, key: str) -> Bars:
        return Bars(title, unit, dict(zip(names, [row[key] for row in rows], strict=True)))

    return [
        Axes("Context tokens cached", "requests served", "share", lines),
        bars("Throughput", "requests a second", "requests_per_second"),
        bars("First token, median", "seconds", "first_token_50"),
    ]


##### The command line


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of("benchmarks.cache_hits", __doc__)
    add_pair_options(parser, BENCHMARK)
    helps = {
        "documents": "how many there are",
        "requests": "length of the trace",
        "per_request": "distinct documents of a request",
        "document_tokens": "tokens of a document",
        "pool_tokens": "size of the KV pool",
        "concurrency": "requests under way at once",
        "prefix": "tokens before the documents",
        "query": "tokens of a question",
        "generated": "tokens of an answer",
    }
    for name, text in helps.items():
        option = "--" + name.replace("_", "-")
        default = f"(default: {USUAL[name]}; --quick: {QUICK[name]})"
        parser.add_argument(option, type=int, metavar="N", help=f"{text} {default}")
    add = parser.add_argument
    add("--zipf", type=float, default=1.0, help="exponent of the popularity (default: 1.0)")
    add("--warm-up", type=float, default=0.15, help="share not counted (default: %(default)s)")
    add(
        "--orders",
        type=_orders,
        default=tuple(Order),
        metavar="ORDER,ORDER",
        help="of the documents of a request: relevance, popularity (default: both)",
    )
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _validate(args, parser)
    return args, parser


def _orders(text: str) -> tuple[Order, ...]:
    try:
        return tuple(Order(name) for name in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(Order)}") from None


def _validate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if min(getattr(args, name) for name in USUAL) < 1 or args.zipf < 0:
        parser.error("all numbers must be positive")
    if args.documents < max(args.per_request, 4):
        parser.error("--documents must be 4 or more, and no fewer than --per-request")
    if not 0 < args.warm_up < 1 or warm_up_of(args) < 1 or args.requests - warm_up_of(args) < 2:
        parser.error("--warm-up must leave a request or more out and count two or more")
    row = longest_row(args)
    if args.concurrency * row > args.pool_tokens:
        parser.error(
            f"--pool-tokens {args.pool_tokens} cannot hold {args.concurrency} requests of {row} "
            "tokens at once"
        )


def main() -> None:
    args, parser = parse(sys.argv[1:])
    if args.report:
        report(reported(args.report, BENCHMARK, parser), args.report)
        return
    report(measure(args, parser), args.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
