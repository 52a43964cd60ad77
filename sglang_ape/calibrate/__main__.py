"""Choose T, S, the shared prefix and more for a model and a task, on a small validation file.

    python -m sglang_ape.calibrate --url http://127.0.0.1:30000 --data rows.jsonl
    python -m sglang_ape.calibrate --model MODEL --data rows.jsonl -- --dtype float32

A line of the file is an object with `contexts` (a list of strings) and `query`, or `messages` (a
chat, whose first user message the contexts stand before), and optionally `prefix`, `answers` and
`split` ("validation" or "held_out"). Settings are chosen on the validation part and then tried on
the held-out part. The result is a profile, which the server loads with --ape-profile.

With --soft, --refine or --warm, what costs more than plain APE is tried too, at the chosen T, S and
prefix, on the rows with answers; the most accurate within --budget is chosen.

Exit status: 0, done; 1, the engine refused something or went away; 2, the input is wrong; 130,
interrupted. The profile is written in the end and as a whole, or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ape.arguments import MAX_SCALE, MAX_TEMPERATURE
from sglang_ape.command import (
    add_engine_options,
    check_folder,
    ended,
    not_negative,
    open_backend,
    parse_with_flags,
    positive,
)

if TYPE_CHECKING:
    from sglang_ape.calibrate.data import Parts
    from sglang_ape.calibrate.run import Outcome, Plan

_TOP_LOGPROBS = 10
_TENTHS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


class _Sizes(NamedTuple):
    """Defaults that ``--quick`` makes smaller."""

    temperatures: str
    scales: str
    max_new_tokens: int


_FULL = _Sizes(_TENTHS, _TENTHS, 32)
_QUICK = _Sizes("0.4,0.6,0.8,0.9,1", "0.6,0.8,0.9,1", 12)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args, flags = _arguments(sys.argv[1:] if argv is None else argv)
    # Not before: --help needs none of it.
    from requests import RequestException

    from sglang_ape.calibrate.data import InputError
    from sglang_ape.calibrate.measure import RowError
    from sglang_ape.errors import ApeRequestError

    try:
        _calibrate(args, flags)
    except (InputError, UnicodeDecodeError) as error:
        return ended(f"error: {error}", 2)
    except RowError as error:
        return ended(f"error: {args.data or '--quick'}, {error}", 1)
    except RequestException as error:
        return ended(f"error: no answer from {args.url}: {' '.join(str(error).split())}", 1)
    except ApeRequestError as error:
        return ended(f"error: {error}", 1)
    except OSError as error:
        return ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return ended("interrupted: no profile was written", 130)
    print(f"time        {time.monotonic() - started:.1f} s")
    return 0


def _calibrate(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Everything: check the input, start, search, report, write.

    Raises:
        InputError: the input is wrong; nothing was asked.
        RowError: the engine refused a row.
        ApeRequestError: it refused something else.
        requests.RequestException: it did not answer.
        OSError: a file cannot be read or written.
    """
    from sglang_ape.calibrate import plot
    from sglang_ape.calibrate.measure import Measure, Options
    from sglang_ape.calibrate.rows import fits, prepare
    from sglang_ape.calibrate.run import Calibration

    data = _data(args)
    plan = _plan(args, data)
    if args.plot is not None:
        plot.require_matplotlib()
        check_folder(args.plot)
    check_folder(args.out)
    options = Options(args.max_new_tokens, tuple(args.stop), _TOP_LOGPROBS, args.batch_size)
    backend = open_backend(args, flags)
    try:
        facts = backend.facts
        rows = prepare(data.parts, facts, plan, args.max_new_tokens, data.name)
        measure = Measure(backend, options, rows.prefixes, rows.warm)
        calibration = Calibration(plan, measure, lambda row: fits(row, facts, args.max_new_tokens))
        calibration.notes += rows.notes
        outcome = calibration.run(rows.validation, rows.held_out)
    finally:
        backend.close()
    inputs = {
        "data": {"name": Path(data.name).name, "sha256": data.digest},
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
    }
    _finish(args, plan, facts.model, inputs, outcome)


class _Data(NamedTuple):
    """The rows, and where they come from."""

    name: str
    digest: str  # SHA-256 of the rows as JSON
    parts: Parts


def _data(args: argparse.Namespace) -> _Data:
    from sglang_ape.calibrate import data, quick

    lines = quick.lines(args.seed) if args.data is None else data.load(args.data)
    whole = "\n".join(line.example.model_dump_json() for line in lines)
    parts = data.divide(lines, args.held_out, args.seed)
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return _Data("--quick" if args.data is None else str(args.data), digest, parts)


def _plan(args: argparse.Namespace, data: _Data) -> Plan:
    """Raises InputError where the rows do not allow what was asked for."""
    from sglang_ape.calibrate.data import InputError
    from sglang_ape.calibrate.run import Plan

    prefixes = [*args.prefix, *(path.read_bytes().decode() for path in args.prefix_file)]
    examples = [line.example for part in data.parts for line in part]
    for line in (line for part in data.parts for line in part):
        if prefixes and line.example.messages is not None:
            raise InputError(
                f"{data.name}, line {line.number}: the prefix of a chat comes from its template "
                "and cannot be searched; leave out --prefix, or give prefix and query"
            )
    if args.objective == "accuracy" and not any(one.answers for one in examples):
        raise InputError(f"{data.name}: --objective accuracy needs rows with answers")
    warm = _warm(args, data)
    return Plan(
        args.objective,
        args.search,
        args.metric,
        args.temperatures,
        args.scales,
        tuple(dict.fromkeys(prefixes)),
        args.soft,
        args.refine,
        warm,
        math.inf if args.budget is None else args.budget,
    )


def _warm(args: argparse.Namespace, data: _Data) -> tuple[str, ...]:
    """Raises InputError where the file is wrong, or a row has a P that no item is added to."""
    from sglang_ape.calibrate.data import InputError
    from sglang_ape.warm import items

    if args.warm is None:
        return ()
    for line in (line for part in data.parts for line in part):
        if line.example.prefix is not None:
            raise InputError(
                f"{data.name}, line {line.number}: a request that gives its prefix has exactly "
                "that, and warm items stand behind the server's own; leave out prefix, or --warm"
            )
    try:
        return items.read(args.warm)
    except items.WarmError as error:
        raise InputError(f"--warm: {error}") from None


def _finish(
    args: argparse.Namespace, plan: Plan, model: str, inputs: dict[str, Any], outcome: Outcome
) -> None:
    """Tell, draw, write."""
    from sglang_ape.calibrate import plot, profile, report
    from sglang_ape.calibrate.record import profile_of

    point, prefix, rung = outcome.chosen
    score = "divergence, nats a token" if plan.objective == "match" else "error rate"
    shown = report.heat_map(outcome.cells, point, prefix, sys.stdout.isatty())
    print(f"validation part: {score}, by T and S; * chosen", *shown, "", sep="\n")
    print(*report.table(outcome), "", sep="\n")
    if outcome.ladder:
        print("above T, S and the prefix; * chosen", *report.ladder(outcome), "", sep="\n")
    for note in outcome.notes:
        print(f"note        {note}")
    print(f"chosen      T {point.temperature:g}, S {point.scale:g}")
    print(f"prefix      {report.described(prefix)}")
    if outcome.ladder:
        print(f"rung        {rung.name}")
    profile.write(profile_of(outcome, plan, model, inputs), args.out)
    print(f"profile     {args.out} (for --ape-profile)")
    if args.plot is not None:
        plot.draw(outcome, plan.objective, args.plot)
        print(f"plot        {args.plot}")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what stands behind ``--``."""
    parser = _parser()
    args, flags = parse_with_flags(parser, argv)
    if args.data is None and not args.quick:
        parser.error("give --data, or --quick")
    if args.budget is not None and not (args.soft or args.refine or args.warm):
        parser.error("--budget goes with --soft, --refine or --warm")
    sizes = _QUICK if args.quick else _FULL
    args.temperatures = args.temperatures or _values("T", 0, MAX_TEMPERATURE)(sizes.temperatures)
    args.scales = args.scales or _values("S", 0, MAX_SCALE)(sizes.scales)
    args.max_new_tokens = args.max_new_tokens or sizes.max_new_tokens
    return args, flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ape.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--url URL | --model MODEL) (--data FILE | --quick) [options] [-- FLAGS]",
    )
    add_engine_options(parser)
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="the rows, in JSON lines")
    add(
        "--quick",
        action="store_true",
        help="few settings and short answers; without --data, on rows of invented facts",
    )
    add(
        "--out",
        type=Path,
        default=Path("ape-profile.json"),
        metavar="FILE",
        help="the profile (default: %(default)s)",
    )
    add("--plot", type=Path, metavar="FILE", help="also draw the heat map and the figures, a PNG")
    add(
        "--objective",
        choices=("match", "accuracy"),
        default="match",
        help="match: answer as the sequential prompt would, no labels needed; accuracy: answer "
        "right, by the rows' answers (default: %(default)s)",
    )
    add(
        "--search",
        choices=("greedy", "grid"),
        default="greedy",
        help="greedy: T and S in turns; grid: all pairs (default: %(default)s)",
    )
    add(
        "--temperatures",
        type=_values("T", 0, MAX_TEMPERATURE),
        metavar="T,T,…",
        help=f"values of T (default: {_FULL.temperatures}); 1 is always tried",
    )
    add(
        "--scales",
        type=_values("S", 0, MAX_SCALE),
        metavar="S,S,…",
        help=f"values of S (default: {_FULL.scales}); 1 is always tried",
    )
    add(
        "--prefix",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prefix to try in the place of the rows' own; may be given several times",
    )
    add(
        "--prefix-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the same, the text of a file",
    )
    add(
        "--soft",
        type=_values("λ", 0, sys.float_info.max),
        default=(),
        metavar="λ,λ,…",
        help="values of soft to try, such as 0.03,0.1,0.3; 0 is always tried",
    )
    add(
        "--refine",
        type=_counts,
        default=(),
        metavar="M,M,…",
        help="values of refine to try, such as 1,2; 0 is always tried",
    )
    add(
        "--warm",
        type=Path,
        metavar="FILE",
        help="warm items to try in the prefix, JSON lines as for --ape-warm; without is always "
        "tried",
    )
    add(
        "--budget",
        type=not_negative,
        metavar="TOKENS",
        help="extra prefill tokens a request, as a mean, that soft and refine may cost (default: "
        "any number)",
    )
    add(
        "--metric",
        choices=("span", "exact"),
        default="span",
        help="an answer is right if it holds a label as whole words (span) or is one (exact) "
        "(default: %(default)s)",
    )
    add(
        "--held-out",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="of the rows, where they have no split (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of that division (default: %(default)s)")
    add(
        "--max-new-tokens",
        type=positive(int),
        metavar="N",
        help=f"tokens of an answer (default: {_FULL.max_new_tokens})",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer; may be given several times",
    )
    add(
        "--batch-size",
        type=positive(int),
        default=8,
        metavar="N",
        help="requests in one call (default: %(default)s)",
    )
    return parser


def _values(name: str, low: float, high: float) -> Callable[[str], tuple[float, ...]]:
    """An argparse type: numbers with commas between them."""

    def parsed(text: str) -> tuple[float, ...]:
        try:
            values = tuple(sorted({float(part) for part in text.split(",")}))
        except ValueError:
            raise argparse.ArgumentTypeError(f"not numbers with commas: {text!r}") from None
        for value in values:
            if not (low <= value <= high) or (name == "T" and value == low):
                raise argparse.ArgumentTypeError(f"{name} = {value:g} is out of range")
        return values

    return parsed


def _counts(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers with commas between them."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not whole numbers with commas: {text!r}") from None
    if values[0] < 0:
        raise argparse.ArgumentTypeError(f"m = {values[0]} is out of range")
    return values


def _share(text: str) -> float:
    """An argparse type: from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be from 0 to below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
