"""Tables of several engines' records, with ratios, targets and floors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.gpu_speed.operations import (
    decode_bytes,
    parallel_operations,
    sequential_operations,
)
from benchmarks.gpu_speed.record import ENGINES
from benchmarks.gpu_speed.scale import SCALES, Scale
from benchmarks.gpu_speed.timing import Summary, summarise
from sglang_ape.arguments import ATTENTION

OURS, STOCK = ENGINES[:2], ENGINES[2:]
NONE = "-"


class Comparison(NamedTuple):
    """How APE's figure relates to a stock engine's."""

    show: str
    relate: Callable[[float, float], float]  # (APE, stock)
    sign: str
    holds: Callable[[float, float], bool]  # (related, target)


COST = Comparison("{:.3f}", lambda ape, stock: ape / stock, "≤", operator.le)
GAIN = Comparison("{:.2f} times as fast", lambda ape, stock: stock / ape, "≥", operator.ge)
MORE = Comparison("{:+.3f} s", lambda ape, stock: ape - stock, "≤", operator.le)
EXTRA = Comparison("{:+.1f} s", lambda ape, stock: ape - stock, "≤", operator.le)


class Figure(NamedTuple):
    """A row of a table."""

    title: str
    ape: str  # the key of APE's samples
    stock: str  # the key of the stock engines' samples
    unit: str
    comparison: Comparison
    targets: dict[str, float]  # by stock engine


_DECODE_TARGETS = {8: {"flashinfer": 1.05}, 32: {"flashinfer": 0.45}}  # by batch

UNITS = {"ms": 1e3, "s": 1.0, "GB": 1e-9}


def figures(scale: Scale) -> dict[str, list[Figure]]:
    """The rows of each table, by its title."""
    longest = scale.longest
    cold = f"cold/{longest}"
    jump = {"flashinfer": 150.0, "fa3": 130.0}
    long_cold = {"flashinfer": 4.0, "fa3": 2.8}
    end = {"flashinfer": 5.5, "fa3": 4.2}
    plain = {"flashinfer": 1.02}

    def same(
        title: str, key: str, unit: str, kind: Comparison, targets: dict[str, float]
    ) -> Figure:
        return Figure(title, key, key, unit, kind, targets)

    return {
        "Time to the first token, all but the query cached": [
            *(
                same(f"{length} context tokens", f"ttft/{length}", "ms", COST, {"flashinfer": 1.15})
                for length in scale.ttft
            ),
            Figure(
                f"{longest} context tokens: APE cached, stock cold",
                f"ttft/{longest}",
                cold,
                "ms",
                GAIN,
                jump,
            ),
        ],
        "Time to the first token, nothing cached": [
            same(
                f"{length} context tokens",
                f"cold/{length}",
                "ms",
                GAIN,
                long_cold if length == longest else {},
            )
            for length in scale.cold
        ],
        f"{scale.e2e_query} tokens asked and {scale.e2e_tokens} answered over {scale.e2e_length} "
        "context tokens: APE encoded ahead, stock cold": [
            same(f"batch of {batch}", f"e2e/{batch}", "s", GAIN, end) for batch in scale.e2e_batches
        ],
        "Decode step": [
            same(
                f"{length} shared context tokens, batch of {batch}",
                f"decode/{length}x{batch}",
                "ms",
                COST,
                _DECODE_TARGETS.get(batch, {"flashinfer": 1.05, "apart": 1.02}),
            )
            for length, batch in scale.decode
        ],
        "Decode step of requests that have some of a set of contexts": [
            same(
                f"{case.taken} of {case.contexts} contexts{' each' if case.disjoint else ''}, "
                f"batch of {case.batch}",
                case.name,
                "ms",
                COST,
                {"apart": 1.02 if case.disjoint or case.batch == 1 else 0.65},
            )
            for case in scale.overlap
        ],
        "Plain requests": [
            *(
                same(f"prefill of {length}", f"plain/prefill/{length}", "ms", COST, plain)
                for length in scale.plain_prefill
            ),
            *(
                same(f"decode step, batch of {batch}", f"plain/decode/{batch}", "ms", COST, plain)
                for batch in scale.plain_batches
            ),
            same("mixed load: total", "plain/mixed/total", "s", COST, plain),
            same("mixed load: first token", "plain/mixed/ttft", "ms", COST, plain),
            same("mixed load: between tokens", "plain/mixed/interval", "ms", COST, plain),
        ],
        "Start-up and memory": [
            same("start-up", "startup", "s", EXTRA, {"flashinfer": 10.0}),
            same("GPU memory, most", "memory", "GB", COST, {"flashinfer": 1.05}),
        ],
    }


class Value(NamedTuple):
    """A figure of one engine in seconds or bytes."""

    number: float
    spread: Summary | None  # None for an estimate


def value_of(record: dict[str, Any] | None, key: str) -> Value | None:
    """The median of the samples, the largest for memory, an estimate for a stock batch left out."""
    if record is None:
        return None
    samples = record["samples"].get(key)
    if not samples:
        if key.startswith("e2e/") and record["engine"] in STOCK:
            return estimate(record["samples"], key)
        return None
    summary = summarise(samples)
    return Value(max(samples) if key == "memory" else summary.median, summary)


def estimate(samples: dict[str, list[float]], key: str) -> Value | None:
    """A stock batch left out, from the single request: one prefill for each and one decode."""
    batch = int(key.rpartition("/")[2])
    total, first = samples.get("e2e/1"), samples.get("e2e/1/ttft")
    if not total or not first:
        return None
    whole, prefill = summarise(total).median, summarise(first).median
    return Value(batch * prefill + (whole - prefill), None)


def show_value(value: Value | None, unit: str) -> str:
    """``median (low-high)``, or one number and how it came about."""
    if value is None:
        return NONE
    factor = UNITS[unit]
    number = _rounded(value.number * factor)
    if value.spread is None:
        return f"{number} {unit} (estimate)"
    if value.spread.samples == 1:
        return f"{number} {unit}"
    low, high = (_rounded(end * factor) for end in value.spread[1:3])
    return f"{number} {unit} ({low}–{high})"  # noqa: RUF001  an en dash between numbers


def compare(figure: Figure, ape: Value | None, stock: Value | None, engine: str) -> str:
    """The ratio with its target and whether it was met."""
    if ape is None or stock is None:
        return NONE
    kind, target = figure.comparison, figure.targets.get(engine)
    related = kind.relate(ape.number, stock.number)
    shown = kind.show.format(related)
    if target is None:
        return shown
    verdict = "met" if kind.holds(related, target) else "**missed**"
    return f"{shown} ({kind.sign} {target:g}: {verdict})"


def ladder_rows(records: dict[str, dict[str, Any]], scale: Scale) -> list[list[str]]:
    """Rungs of the quality ladder beside the same requests without them, on the APE engine."""
    record, ladder = records.get("ape"), scale.ladder
    warm, soft, refine, prefill = (
        value_of(record, f"ladder/{key}")
        for key in ("ttft/warm", "ttft/soft", "ttft/refine", "prefill")
    )
    bound = None
    if warm and soft and prefill:
        bound = Value(soft.number - warm.number + prefill.number, None)
    by_attention = (record or {}).get("engine_arguments", {}).get("ape_scorer") == ATTENTION
    aim: tuple[Comparison, float] = (COST, 1.15) if by_attention else (MORE, 0.30)
    rows = [
        _rung_row("first token, soft", soft, warm, *aim),
        _rung_row(f"first token, refine {ladder.refine}", refine, warm, MORE, None),
        _rung_row(
            f"first token, refine {ladder.refine}, beside scoring (soft less none) and a plain "
            f"prefill of {ladder.refine * scale.context} tokens more",
            refine,
            bound,
            COST,
            1.0,
        ),
    ]
    for batch in ladder.batches:
        without, biased = (
            value_of(record, f"ladder/decode/{batch}/{name}") for name in ("warm", "soft")
        )
        rows.append(_rung_row(f"decode step, soft, batch of {batch}", biased, without, COST, 1.03))
    return [row for row in rows if row[1] != NONE]


def _rung_row(
    title: str, own: Value | None, other: Value | None, kind: Comparison, target: float | None
) -> list[str]:
    figure = Figure(title, "", "", "ms", kind, {} if target is None else {"ape": target})
    beside = NONE if other is None else show_value(other, "ms").replace("estimate", "sum")
    return [title, show_value(own, "ms"), beside, compare(figure, own, other, "ape")]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Floor(NamedTuple):
    """The least that one figure could take."""

    title: str
    key: str
    work: dict[str, float]  # operations or bytes, by engine
    rate: str  # the key of the measured rate


def floors(scale: Scale) -> Iterator[Floor]:
    """Prefill is bound by operations, decode by bytes."""
    shape, longest = scale.shape, scale.longest
    cached = scale.prefix + longest
    hit = float(sequential_operations(shape, scale.query, cached))
    yield Floor(
        f"first token, {longest} cached", f"ttft/{longest}", dict.fromkeys(ENGINES, hit), "matmul"
    )
    for length in scale.cold:
        whole = sequential_operations(shape, scale.prefix + length + scale.query)
        count = length // scale.context
        parts = parallel_operations(shape, scale.prefix, count, scale.context, scale.query)
        work = dict.fromkeys(OURS, float(parts)) | dict.fromkeys(STOCK, float(whole))
        yield Floor(f"first token, {length} cold", f"cold/{length}", work, "matmul")
    own = scale.query + scale.decode_tokens / 2
    for length, batch in scale.decode:
        read = decode_bytes(shape, batch, scale.prefix + length, own)
        yield Floor(
            f"decode step, {length} shared, batch of {batch}",
            f"decode/{length}x{batch}",
            dict.fromkeys(ENGINES, read),
            "copy",
        )
    for case in scale.overlap:
        shared = case.batch * case.taken if case.disjoint else case.contexts
        read = decode_bytes(shape, case.batch, scale.prefix + shared * scale.context, own)
        yield Floor(f"decode step, {case.name}", case.name, dict.fromkeys(OURS, read), "copy")


def rate_of(records: dict[str, dict[str, Any]], name: str) -> float | None:
    """The median over all files that measured it."""
    found = [
        rate for record in records.values() for rate in record["samples"].get(f"floor/{name}", ())
    ]
    return summarise(found).median if found else None


def floor_rows(records: dict[str, dict[str, Any]], scale: Scale) -> list[list[str]]:
    rows = []
    for floor in floors(scale):
        rate = rate_of(records, floor.rate)
        for engine in ENGINES:
            value = value_of(records.get(engine), floor.key)
            if rate is None or value is None:
                continue
            least = floor.work[engine] / rate
            unit = "T operations" if floor.rate == "matmul" else "TB"
            work = f"{floor.work[engine] / 1e12:.4g} {unit}"
            shown = [f"{_rounded(1e3 * time)} ms" for time in (least, value.number)]
            rows.append([floor.title, engine, work, *shown, f"{least / value.number:.0%}"])
    return rows


def report(records: dict[str, dict[str, Any]]) -> str:
    """Everything in markdown; figures that were not measured show a dash."""
    scale = SCALES[next(iter(records.values()))["scale"]]
    parts = []
    others = [name for name in ENGINES[1:] if name in records]
    for title, rows in figures(scale).items():
        header = ["", "ape", *others, *(f"against {name}" for name in others)]
        table = markdown_table(header, [_row(row, records, others) for row in rows])
        parts += [f"### {title}", table]
    rungs = ladder_rows(records, scale)
    if rungs:
        title = (
            f"### The quality ladder: {scale.ladder.contexts} cached contexts of {scale.context}, "
            f"a query of {scale.ladder.query}"
        )
        parts += [title, markdown_table(["", "with", "beside", ""], rungs)]
    rows_of_floors = floor_rows(records, scale)
    if rows_of_floors:
        header = ["", "engine", "work", "floor", "measured", "share reached"]
        parts += ["### Floors", _rates(records), markdown_table(header, rows_of_floors)]
    encoding = value_of(records.get("ape"), "encoding")
    if encoding is not None:
        parts.append(f"Encoding the contexts ahead, in no total: {show_value(encoding, 's')}.")
    parts += ["### Runs", *(_about(name, record) for name, record in records.items())]
    return "\n\n".join(parts)


def _row(figure: Figure, records: dict[str, dict[str, Any]], others: list[str]) -> list[str]:
    ape = value_of(records.get("ape"), figure.ape)
    found = {
        name: value_of(records[name], figure.stock if name in STOCK else figure.ape)
        for name in others
    }
    values = [show_value(value, figure.unit) for value in (ape, *found.values())]
    ratios = [compare(figure, ape, value, name) for name, value in found.items()]
    return [figure.title, *values, *ratios]


def _rates(records: dict[str, dict[str, Any]]) -> str:
    copy, matmul = rate_of(records, "copy"), rate_of(records, "matmul")
    shown = [
        f"{rate / 1e12:.4g} {unit}"
        for rate, unit in ((copy, "TB/s copied (read and written)"), (matmul, "TFLOP/s in bf16"))
        if rate is not None
    ]
    return "Measured: " + ", ".join(shown) + ". KV that a batch shares counts once."


def _about(name: str, record: dict[str, Any]) -> str:
    machine = record["machine"]
    packages = ", ".join(
        f"{name} {number}" for name, number in machine["packages"].items() if number
    )
    lines = [
        f"**{name}**: {machine['gpu'] or machine['platform']}; {packages}; commit "
        f"{machine['commit'] or 'unknown'}; {record['elapsed_s']} s in all; "
        f"`{' '.join(record['command'])}`",
        *([] if record["finished"] else ["- it was stopped before its end"]),
        *(f"- warning: {text}" for text in record["warnings"]),
        *(
            f"- failed: {section}: {trace.strip().splitlines()[-1]}"
            for section, trace in record["errors"].items()
        ),
    ]
    return "\n".join(lines)


def _rounded(number: float) -> str:
    """Four digits."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"
