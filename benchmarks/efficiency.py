"""Seconds to the first and to the last token over a growing context: stock SGLang beside APE.

    python -m benchmarks.efficiency --dummy-8b -- --attention-backend flashinfer

The axes are those of the APE paper's efficiency figure: tokens of context, batches of 1 and 4, and
256 tokens asked and generated in all. Five ways are measured, the first two on a server of stock
SGLang and the others on one with --enable-ape:

    sequential, cold        one ordinary prompt, nothing cached
    sequential, exact hit   the same contexts in the same order, another query
    APE, cold               the same tokens as contexts, nothing cached
    APE, warm               the same contexts in the same order, another query
    APE, shuffled           the same contexts in a new order, another query

The requests of a batch are sent at the same moment over HTTP, as token ids. *First token* is that
of the slowest request of a batch, *last token* the last one of all. How many tokens each request
found in the cache is checked: a cold one none of its contexts, any other all of them.

Token ids are random; what a step costs does not depend on them. Each cell is measured --repeats
times, less often where it would take more than --cell-seconds. --only stock and --only ape measure
one server and add to the results in the folder; so do other --lengths and --batches with --only.

--quick uses a small model and short contexts, on a CPU if need be. It is a check of the machinery:
its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

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
from benchmarks.common.prompts import Prompt
from benchmarks.common.results import Axes, Column, Line, plot, show
from benchmarks.common.script import exit_status

BENCHMARK = "efficiency"
LENGTHS = tuple(2048 << i for i in range(7))
KEY = ("way", "batch", "length")
WARM_UP_TOKENS = 8  # generated
WARM_UP_LENGTH = 16384  # longest context of a request that warms up
PAPER = (
    "The APE paper reports, for its own setting, up to 4.5 times less time end to end and 28 times "
    "less prefill at 128K tokens of context."
)
QUICK = {
    "lengths": (128, 256, 512),
    "batches": (1, 2),
    "context_length": 64,
    "prefix": 16,
    "generated": 8,
    "repeats": 1,
}


class Way(StrEnum):
    """How the contexts of a request come to be in the KV cache. Its value names it in tables."""

    SEQUENTIAL_COLD = "sequential, cold"
    SEQUENTIAL_HIT = "sequential, exact hit"
    APE_COLD = "APE, cold"
    APE_WARM = "APE, warm"
    APE_SHUFFLED = "APE, shuffled"

    @property
    def kind(self) -> Kind:
        return Kind.APE if self.value.startswith("APE") else Kind.STOCK

    @property
    def is_cold(self) -> bool:
        return self in (Way.SEQUENTIAL_COLD, Way.APE_COLD)


##### What is asked


class Sizes(NamedTuple):
    """Of a request, in tokens."""

    prefix: int
    context: int
    query: int
    generated: int

    def longest_row(self, kind: Kind, length: int) -> int:
        """Positions that a request over ``length`` context tokens takes."""
        contexts = min(self.context, length) if kind is Kind.APE else length
        return self.prefix + contexts + self.query + self.generated


class Requests:
    """Batches of random prompts after one prefix.

    Args:
        ids: draws token ids.
        sizes: of a request.
        shared: the requests of a batch have the same contexts.
    """

    def __init__(self, ids: FreshIds, sizes: Sizes, shared: bool) -> None:
        self._ids = ids
        self._sizes = sizes
        self._shared = shared
        self._prefix = ids.sequence(sizes.prefix)

    def fresh(self, length: int, batch: int) -> list[Prompt]:
        """Prompts with contexts of ``length`` tokens in all that nobody has asked for."""
        first = self._prompt(length)
        if self._shared:
            return self.same_contexts([first] * batch)
        return [first, *(self._prompt(length) for _ in range(batch - 1))]

    def same_contexts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Another query over the same contexts."""
        return [p._replace(query=self._ids.sequence(self._sizes.query)) for p in prompts]

    def shuffled(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Another query over the same contexts in a new order, each prompt in its own."""
        orders = (self._ids.random.permutation(len(p.contexts)).tolist() for p in prompts)
        pairs = zip(self.same_contexts(prompts), orders, strict=True)
        return [prompt.with_contexts(order) for prompt, order in pairs]

    def _prompt(self, length: int) -> Prompt:
        step = self._sizes.context
        cuts = [min(step, length - start) for start in range(0, length, step)]
        contexts = tuple(map(self._ids.sequence, cuts))
        return Prompt(self._prefix, contexts, self._ids.sequence(self._sizes.query))


def bodies_of(kind: Kind, prompts: Sequence[Prompt], generated: int) -> list[Body]:
    """Bodies of ``POST /generate``; both servers get the same tokens."""
    method = Method.APE if kind is Kind.APE else Method.SEQUENTIAL
    sampling = {"temperature": 0, "max_new_tokens": generated, "ignore_eos": True}
    return [body_of(method, prompt, (), None, sampling) for prompt in prompts]


##### What is answered


class Sample(NamedTuple):
    """One batch."""

    first_token: float  # seconds, of its slowest request
    last_token: float  # seconds
    prompt_tokens: int
    computed_tokens: int  # those of the prompts that were not in the cache

    @classmethod
    def of(cls, timed: Sequence[Timed]) -> Sample:
        return cls(
            max(one.first_token for one in timed),
            max(one.last_token for one in timed),
            sum(one.meta["prompt_tokens"] for one in timed),
            sum(computed_tokens(one.meta) for one in timed),
        )


def check(
    way: Way,
    prompts: Sequence[Prompt],
    metas: Sequence[Mapping[str, Any]],
    generated: int,
    shared: bool,
    page_size: int = 1,
) -> None:
    """Every request must have found in the cache what its way says, and have run to its end.

    Args:
        way: how the prompts were asked.
        prompts: of one batch.
        metas: ``meta_info`` of their answers.
        generated: tokens that each had to generate.
        shared: the prompts have the same contexts; of a cold batch, those that come later may find
            them computed.
        page_size: tokens that the KV cache keeps together.

    Raises:
        ControlError: one has not.
    """
    for prompt, meta in zip(prompts, metas, strict=True):
        wanted = prompt.tokens, generated
        found = meta["prompt_tokens"], meta["completion_tokens"]
        if found != wanted:
            raise ControlError(
                f"{way}: a request of {wanted[0]} tokens for {wanted[1]} more says that it had "
                f"{found[0]} and generated {found[1]}"
            )
    cached = [meta["cached_tokens"] for meta in metas]
    if way.is_cold:
        of_contexts = [
            max(tokens - len(prompt.prefix), 0)
            for tokens, prompt in zip(cached, prompts, strict=True)
        ]
        if (min if shared else max)(of_contexts) > 0:
            raise ControlError(f"{way}: {of_contexts} context tokens were in the emptied cache")
        return
    wanted_cached = [(p.tokens - len(p.query)) // page_size * page_size for p in prompts]
    if cached != wanted_cached:
        raise ControlError(
            f"{way}: {cached} tokens of the batch's requests were cached, not {wanted_cached}"
        )


##### Measuring


class Cell(NamedTuple):
    """A point on the figure's axes."""

    batch: int
    length: int  # context tokens of each request

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.length:,} tokens"


def why_skipped(cell: Cell, server: PairServer, kind: Kind, args: argparse.Namespace) -> str | None:
    """What keeps a server from holding a batch, None if nothing does."""
    sizes = sizes_of(args)
    row = sizes.longest_row(kind, cell.length)
    limit = server.info["max_req_input_len"]
    if row > limit:
        return f"a request takes {row:,} positions, the server's limit is {limit:,}"
    lists = 1 if args.shared else cell.batch
    tails = cell.batch * (args.repeats + 1) * (sizes.query + sizes.generated)  # of cached answers
    needed = lists * (sizes.prefix + cell.length) + tails
    if needed > server.pool_tokens:
        return f"{needed:,} tokens do not fit the KV pool of {server.pool_tokens:,}"
    return None


def samples_of(take: Callable[[], Sample], repeats: int, seconds: float) -> list[Sample]:
    """Take one sample, and more as long as the next, if it takes like the last, stays in the time.

    Args:
        take: one sample.
        repeats: the most samples.
        seconds: for all of them.
    """
    samples: list[Sample] = []
    begin = time.perf_counter()
    while len(samples) < repeats:
        samples.append(take())
        spent = time.perf_counter() - begin
        if spent + samples[-1].last_token > seconds:
            break
    return samples


class Measurement:
    """One server.

    Args:
        kind: which.
        server: as it runs.
        requests: draws prompts.
        args: the options.
    """

    def __init__(
        self, kind: Kind, server: PairServer, requests: Requests, args: argparse.Namespace
    ) -> None:
        self._kind = kind
        self._client: Client = server.client
        self._page_size = server.info["page_size"]
        self._requests = requests
        self._args = args
        self._generated = args.generated

    def warm_up(self, cells: Sequence[Cell]) -> None:
        """Go all ways for each batch, at a short and at a longer context, with short answers."""
        self._generated = min(WARM_UP_TOKENS, self._args.generated)
        for batch in sorted({cell.batch for cell in cells}):
            lengths = [cell.length for cell in cells if cell.batch == batch]
            short = [length for length in lengths if length <= WARM_UP_LENGTH] or lengths
            for length in sorted({min(lengths), max(short)}):
                for _ in self._ways(Cell(batch, length), repeats=1):
                    pass
        self._generated = self._args.generated

    def cell(self, cell: Cell) -> Iterator[tuple[Way, list[Sample]]]:
        """Samples of all ways that this server goes."""
        return self._ways(cell, self._args.repeats)

    def _ways(self, cell: Cell, repeats: int) -> Iterator[tuple[Way, list[Sample]]]:
        asked: list[Prompt] = []

        def cold(way: Way) -> Sample:
            nonlocal asked
            self._client.flush()
            asked = self._requests.fresh(cell.length, cell.batch)
            return self._ask(way, asked)

        def again(way: Way) -> Sample:
            is_shuffled = way is Way.APE_SHUFFLED
            change = self._requests.shuffled if is_shuffled else self._requests.same_contexts
            return self._ask(way, change(asked))

        for way in Way:
            if way.kind is self._kind:
                take = cold if way.is_cold else again
                seconds = self._args.cell_seconds
                yield way, samples_of(lambda way=way, take=take: take(way), repeats, seconds)

    def _ask(self, way: Way, prompts: Sequence[Prompt]) -> Sample:
        timed = self._client.stream(bodies_of(self._kind, prompts, self._generated))
        metas = [one.meta for one in timed]
        check(way, prompts, metas, self._generated, self._args.shared, self._page_size)
        return Sample.of(timed)


def row_of(way: Way, cell: Cell, samples: Sequence[Sample]) -> dict[str, Any]:
    """A row of the results: medians, extremes, and every sample. Seconds, and tokens of a batch."""
    row: dict[str, Any] = {"way": way.value, **cell._asdict(), "samples": len(samples)}
    for name in ("first_token", "last_token"):
        values = [getattr(sample, name) for sample in samples]
        row[name] = statistics.median(values)
        row |= {f"{name}_low": min(values), f"{name}_high": max(values), f"{name}_all": values}
    last = samples[-1]
    return row | {"prompt_tokens": last.prompt_tokens, "computed_tokens": last.computed_tokens}


def sizes_of(args: argparse.Namespace) -> Sizes:
    return Sizes(args.prefix, args.context_length, args.query, args.generated)


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Raises ServerError, Refused, ControlError, OtherSettingsError."""
    model = pair_model(args, parser)
    settings = {"model": model.name, **sizes_of(args)._asdict()}
    settings |= {"shared": args.shared, "seed": args.seed, "quick": args.quick}
    results = PairResults(args.out, BENCHMARK, settings, KEY, adds=args.only is not None)
    cells = [Cell(batch, length) for batch in args.batches for length in args.lengths]
    longest = max(args.lengths)
    window = window_flags(args, sizes_of(args).longest_row(Kind.STOCK, longest))
    ape = ["--ape-max-context-tokens", str(longest)]
    flags = {Kind.STOCK: window, Kind.APE: [*window, *ape]}
    for kind in kinds_of(args):
        requests = Requests(FreshIds(model.vocab, args.seed), sizes_of(args), args.shared)
        with pair_server(kind, model, args, flags) as server:
            measured = {name: getattr(args, name) for name in ("lengths", "batches", "repeats")}
            results.begin(kind, server, measured | {"cell_seconds": args.cell_seconds})
            _measure_server(kind, server, requests, cells, results, args)
    results.finish()
    return results.content


def _measure_server(
    kind: Kind,
    server: PairServer,
    requests: Requests,
    cells: Sequence[Cell],
    results: PairResults,
    args: argparse.Namespace,
) -> None:
    fitting = []
    for cell in cells:
        reason = why_skipped(cell, server, kind, args)
        if reason is None:
            fitting.append(cell)
            continue
        print(f"{kind}, {cell}: skipped, {reason}", flush=True)
        for way in (way for way in Way if way.kind is kind):
            results.add({"way": way.value, **cell._asdict(), "skipped": reason})
    measurement = Measurement(kind, server, requests, args)
    print(f"{kind}: warming up", flush=True)
    measurement.warm_up(fitting)
    with tqdm(fitting, desc=kind.value, unit="cell") as bar:
        for cell in bar:
            for way, samples in measurement.cell(cell):
                row = row_of(way, cell, samples)
                results.add(row)
                tqdm.write(
                    f"{way}, {cell}: first token {row['first_token']:.3f} s, last "
                    f"{row['last_token']:.3f} s, {row['computed_tokens']:,} prompt tokens computed "
                    f"({row['samples']} sampled)"
                )


##### Showing


def ratio_rows(rows: Sequence[Mapping[str, Any]], batch: int, field: str) -> list[dict[str, Any]]:
    """Rows of a table: a length, the field of every way, and how APE compares with a cold prompt.

    Args:
        rows: of the results.
        batch: which of them.
        field: of a row.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["batch"] == batch and field in row:
            found.setdefault(row["length"], {"length": row["length"]})[row["way"]] = row[field]
    for row in found.values():
        stock = row.get(Way.SEQUENTIAL_COLD.value)
        for name, way in (("cold", Way.APE_COLD), ("shuffled", Way.APE_SHUFFLED)):
            if stock and row.get(way.value):
                row[name] = stock / row[way.value]
    return [found[length] for length in sorted(found)]


def report(content: Mapping[str, Any], folder: Path) -> None:
    """Print the tables and draw a plot for each batch."""
    rows = content["rows"]
    label = ", a check of the machinery" if content["settings"]["quick"] else ""
    print(f"\n{title_of(content)}")
    for batch in sorted({row["batch"] for row in rows}):
        for title, field, form, tail in (
            ("seconds to the first token", "first_token", "{:.3f}", _RATIOS),
            ("seconds to the last token", "last_token", "{:.3f}", _RATIOS),
            ("prompt tokens computed, of the whole batch", "computed_tokens", "{:,}", ()),
        ):
            ways = [Column(way.value, way.value, form) for way in Way]
            columns = [Column("Context tokens", "length", "{:,}"), *ways, *tail]
            show(f"Batch of {batch}: {title}{label}", columns, ratio_rows(rows, batch, field))
        title = f"Batch of {batch}, {content['settings']['model']}{label}"
        plot(folder / f"{BENCHMARK}_batch{batch}.png", title, _axes(rows, batch))
    for reason in dict.fromkeys(
        f"skipped: {row['way']}, {Cell(row['batch'], row['length'])}: {row['skipped']}"
        for row in rows
        if "skipped" in row
    ):
        print(reason)
    if not content["settings"]["quick"]:
        print(PAPER)


_RATIOS = (
    Column("sequential cold / APE cold", "cold", "{:.2f}"),
    Column("sequential cold / APE shuffled", "shuffled", "{:.1f}"),
)


def _axes(rows: Sequence[Mapping[str, Any]], batch: int) -> list[Axes]:
    axes = []
    for title, field in (("First token (prefill)", "first_token"), ("Last token", "last_token")):
        lines = []
        for way in Way:
            own = [r for r in rows if r["batch"] == batch and r["way"] == way and field in r]
            own.sort(key=lambda row: row["length"])
            if own:
                lines.append(Line(way.value, [r["length"] for r in own], [r[field] for r in own]))
        axes.append(Axes(title, "context tokens", "seconds", lines, log_x=True, log_y=True))
    return axes


##### The command line


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of("benchmarks.efficiency", __doc__)
    add_pair_options(parser, BENCHMARK)
    add = parser.add_argument
    add("--lengths", type=_numbers, metavar="N,N", help="context tokens (default: 2048 to 131072)")
    add("--batches", type=_numbers, metavar="N,N", help="requests at once (default: 1,4)")
    add("--context-length", type=int, help="tokens of one context (default: 1024)")
    add("--prefix", type=int, help="tokens before the contexts (default: 64)")
    add("--query", type=int, default=16, help="tokens asked (default: %(default)s)")
    add("--generated", type=int, help="tokens generated (default: 240)")
    add("--shared", action="store_true", help="the requests of a batch have the same contexts")
    add("--repeats", type=int, help="most samples of a cell (default: 3)")
    add(
        "--cell-seconds",
        type=float,
        default=30.0,
        help="no further sample of a cell that would end later (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    usual = {
        "lengths": LENGTHS,
        "batches": (1, 4),
        "context_length": 1024,
        "prefix": 64,
        "generated": 240,
        "repeats": 3,
    }
    for name, value in (QUICK if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    counts = ("context_length", "prefix", "query", "generated", "repeats")
    if min(getattr(args, name) for name in counts) < 1 or args.cell_seconds <= 0:
        parser.error("all numbers of tokens, repeats and seconds must be positive")
    return args, parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,4") from None
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{numbers[0]} is not positive")
    return numbers


def main() -> None:
    args, parser = parse(sys.argv[1:])
    if args.report:
        report(reported(args.report, BENCHMARK, parser), args.report)
        return
    report(measure(args, parser), args.out)


if __name__ == "__main__":
    sys.exit(exit_status(main))
