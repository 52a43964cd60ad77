"""Plain HTTP traffic on an enabled server beside a stock one, with SGLang's own bench_serving.

    python -m benchmarks.plain_serving --model MODEL --json docs/performance/plain_serving.json \
        -- --attention-backend flashinfer

Starts ``sglang.launch_server`` without and with ``--enable-ape``, one after the other, notes the
seconds to the first healthy answer, and runs ``sglang.bench_serving`` on random prompts that arrive
as a Poisson process, ``--rounds`` times each with the same seed. What stands behind ``--`` goes to
both servers; ``--load-format dummy`` there saves the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.server import started

KINDS = {"stock": (), "ape": ("--enable-ape",)}
FIGURES = (
    "mean_ttft_ms",
    "median_ttft_ms",
    "mean_itl_ms",
    "median_itl_ms",
    "output_throughput",
    "duration",
)


def main() -> None:
    args = _parser().parse_args()
    result: dict[str, Any] = {"command": sys.argv, "rounds": {}, "startup": {}}
    for kind in args.kinds:
        flags = ("--log-level", "warning", *KINDS[kind], *args.server)
        print(kind, flush=True)
        with (
            tempfile.TemporaryDirectory() as folder,
            started(args.model, flags, Path(folder) / "server.log") as server,
        ):
            result["startup"][kind] = server.start_seconds
            runs = [_bench(args, server.url) for _ in range(args.rounds)]
        result["rounds"][kind] = runs
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    _show(result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--input", type=int, default=1024, help="longest prompt")
    parser.add_argument("--output", type=int, default=64, help="longest answer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="flags of both servers, after --")
    return parser


def _bench(args: argparse.Namespace, url: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.jsonl"
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
        command += ["--base-url", url, "--tokenizer", args.model]
        command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--seed", "1"]
        command += ["--num-prompts", str(args.prompts), "--request-rate", str(args.rate)]
        command += ["--random-input-len", str(args.input), "--random-output-len", str(args.output)]
        command += ["--random-range-ratio", "0.1", "--flush-cache", "--disable-tqdm"]
        command += ["--warmup-requests", "8"]
        subprocess.run(
            [*command, "--output-file", str(output)], check=True, stdout=subprocess.DEVNULL
        )
        result = json.loads(output.read_text().splitlines()[-1])
    if result["completed"] != args.prompts:
        raise RuntimeError(f"{result['completed']} of {args.prompts} requests were answered")
    return {figure: result[figure] for figure in FIGURES}


def _show(result: dict[str, Any]) -> None:
    kinds = list(result["rounds"])
    print(f"{'':20}" + "".join(f"{kind:>12}" for kind in kinds) + f"{'ratio':>12}")
    rows = [("start-up, s", [result["startup"][kind] for kind in kinds])]
    for figure in FIGURES:
        medians = [
            statistics.median(run[figure] for run in result["rounds"][kind]) for kind in kinds
        ]
        rows.append((figure, medians))
    for name, values in rows:
        ratio = f"{values[-1] / values[0]:12.3f}" if len(values) > 1 else ""
        print(f"{name:20}" + "".join(f"{value:12.2f}" for value in values) + ratio)


if __name__ == "__main__":
    main()
