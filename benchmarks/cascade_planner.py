"""Processor time of the planner of rectangles, while the batch stays and when it changes.

    python -m benchmarks.cascade_planner

``REQUESTS`` requests over ``CONTEXTS`` contexts each, of 1,024 tokens. *same*: all over one set;
*half*: each over a random half of twice as many; *apart*: each over its own. *change* is the step
after one request has ended and another has started, *work list* what follows it in the attention
wrapper. Medians and 90th percentiles in microseconds; a CPU is enough.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from flashinfer_ext.worklist import Groups, Shape, make_work
from sglang_ape.attention.rectangles import HOPPER_RATES, CostModel, Cover, Planner, Reader
from sglang_ape.spec import ApeSpec

REQUESTS, CONTEXTS, TOKENS = 256, 64, 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SLOTS = 16  # thread blocks a KV head on 132 multiprocessors
ITEMS, STATES = 16 * SLOTS + REQUESTS, 8192  # that a captured launch has room for
REPEATS = 50


def main() -> None:
    print(f"{REQUESTS} requests x {CONTEXTS} contexts; us, median (90th percentile)")
    for kind in ("same", "half", "apart"):
        _measure(kind)


def _measure(kind: str) -> None:
    costs = CostModel.of(HEADS, KV_HEADS, HEAD_DIM, 2, 128, HOPPER_RATES)
    planner = Planner(costs, ITEMS, STATES)
    batch = [_reader(kind, i) for i in range(REQUESTS)]
    cover = planner.follow(batch)
    step, change, work = [], [], []
    for i in range(REPEATS):
        step.append(_us(lambda: planner.follow(batch)))
        batch.pop(random.randrange(REQUESTS))
        batch.append(_reader(kind, REQUESTS + i))
        change.append(_us(lambda: planner.follow(batch)))
        cover = planner.follow(batch)
        if cover is not None:
            work.append(_us(lambda c=cover: _work_list(c)))
    rectangles = "apart" if cover is None else f"{len(cover.qo_indptr) - 1} rectangles"
    shown = [("step", step), ("change", change), *([("work list", work)] if work else [])]
    print(f"{kind:6}" + "".join(f"  {name} {_summary(us)}" for name, us in shown), rectangles)


def _reader(kind: str, request: int) -> Reader:
    spec = ApeSpec(64, (TOKENS,) * CONTEXTS, 0.9, 0.9, "set")
    documents = {
        "same": range(CONTEXTS),
        "half": random.sample(range(2 * CONTEXTS), CONTEXTS),
        "apart": range(request * CONTEXTS, (request + 1) * CONTEXTS),
    }
    return Reader.of(spec, list(documents[kind]), request)


def _work_list(cover: Cover) -> None:
    last = np.ones(len(cover.kv_indptr) - 1, np.int32)
    groups = Groups(cover.qo_indptr, cover.rows, cover.kv_indptr, last, cover.is_prefix, cover.bias)
    make_work(groups, Shape(REQUESTS, HEADS // KV_HEADS, 1, SLOTS), 128)


def _us(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return (time.process_time() - begin) * 1e6


def _summary(us: list[float]) -> str:
    return f"{statistics.median(us):.0f} ({statistics.quantiles(us, n=10)[-1]:.0f})"


if __name__ == "__main__":
    main()
