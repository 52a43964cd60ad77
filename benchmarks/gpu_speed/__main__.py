"""The command line. Nothing heavy is imported here: SGLang's processes import this file again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_speed.record import ENGINES, read_records
from benchmarks.gpu_speed.report import report
from benchmarks.gpu_speed.run import SECTIONS, run
from benchmarks.gpu_speed.scale import SCALES


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_speed", description="APE next to stock SGLang")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure one engine in this process")
    one.add_argument("--engine", choices=ENGINES, required=True)
    one.add_argument("--json", type=Path, required=True, metavar="FILE", help="raw samples go here")
    one.add_argument("--only", type=_sections, help=f"some of {','.join(SECTIONS)}")
    one.add_argument("--scale", choices=SCALES, default="full", help="tiny: a smoke test on a CPU")
    one.add_argument("--skip-batch4", action="store_true", help="leave the largest e2e batch out")
    one.add_argument("--seed", type=int, default=0, help="of tokens, orders and arrivals")
    one.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of sgl.Engine, such as cuda_graph_backend_prefill=disabled",
    )
    many = commands.add_parser("report", help="tables with ratios and targets")
    many.add_argument("files", type=Path, nargs="+", metavar="FILE")
    many.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    return parser.parse_args(arguments)


def _sections(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    wrong = [name for name in names if name not in SECTIONS]
    if wrong:
        raise argparse.ArgumentTypeError(f"no section {wrong[0]!r} in {', '.join(SECTIONS)}")
    return names


def _setting(value: str) -> tuple[str, Any]:
    name, equals, text = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.command == "report":
        text = report(read_records(given.files))
        print(text)
        if given.markdown:
            given.markdown.write_text(text + "\n")
        return 0
    return run(
        engine_name=given.engine,
        scale=SCALES[given.scale],
        path=given.json,
        sections=given.only or SECTIONS,
        settings=dict(given.set),
        seed=given.seed,
        skip_largest_batch=given.skip_batch4,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
