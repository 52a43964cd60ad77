"""GPU time of one layer's attention: the cascade beside FlashInfer's own kernel.

    python -m benchmarks.cascade_kernels --json docs/performance/cascade_kernels.json

Decoding: ``batch`` requests with one new row each over ``length`` tokens of contexts that all of
them share, and 64 + 256 tokens of path of their own; stock reads the same tokens as one sequence a
request. *apart*: the cascade with a group of contexts for each request; *shared*: with one group
for all of them.
Overlap: ``batch`` requests over contexts of 1,024 tokens each, in *groups* (neighbours with equal
sets read them once) and in *rectangles* (what the planner chooses, nothing where it chooses none).
*floor* is each token of KV read once at the speed of a copy; *model* is what the planner expects
of the contexts pass alone, less what reading P once saves in the paths.
Prefill: requests with 256 query rows each over ``length`` cached tokens that they share.
Bias: requests over the same 128 contexts of 1,024 tokens, with a query of 64 tokens: *plain* and
*biased* read them for each request, *rectangle* once for all and without a bias, *cut* in a
rectangle for each context, whose bias is added in the merge.
The heads are those of Llama-3.1-8B (32 and 8 of 128), bf16, page size 1. Decoding is timed as CUDA
graph replays, prefill as eager launches; medians. ``--only bias`` takes one part.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_ape.attention.levels import Levels, decode_levels, extend_levels, rectangle_levels
from sglang_ape.attention.rectangles import (
    EMPTY_COVER,
    HOPPER_RATES,
    CostModel,
    Cover,
    Planner,
    Rates,
    Reader,
)
from sglang_ape.spec import ApeSpec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PREFIX, QUERY = 64, 256
DECODE = [(1, 2048), (1, 32768), (1, 131072), (2, 2048), (2, 32768), (4, 2048), (4, 32768)]
DECODE += [(8, 2048), (8, 32768), (16, 8192), (32, 2048), (32, 32768)]
CONTEXT = 1024
ALL_32 = tuple(range(32))
PREFILL = [(1, 2048), (1, 8192), (1, 32768), (1, 131072), (8, 32768)]
BIAS_BATCHES, BIAS_CONTEXTS, BIAS_QUERY = (1, 8, 32), 128, 64
BIAS_KINDS = ("plain", "biased", "rectangle", "cut")
PARTS = ("decode", "overlap", "prefill", "bias")
KINDS = ("stock", "apart", "shared")
PREFILL_KINDS = ("stock", "apart", "rectangles")
OVERLAP_KINDS = ("groups", "rectangles", "floor", "model")
COPY_BYTES_PER_SECOND = 2.95e12  # of an H100 80GB HBM3
REPEATS = 30
WORKSPACE = 384 << 20  # bytes, as SGLang's
LAYERS = 8  # attention calls in a graph, on caches of their own so that L2 does not keep them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in args.only:
        _MEASURE[part](rows)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")


def _all_decode(rows: list[dict[str, Any]]) -> None:
    _head(KINDS)
    for batch, length in DECODE:
        rows.append({"kind": "decode", "batch": batch, "length": length, **_decode(batch, length)})
        _show(f"decode {batch} x {length}", rows[-1])


def _all_overlap(rows: list[dict[str, Any]]) -> None:
    _head(OVERLAP_KINDS)
    for name, given in _overlaps().items():
        rows.append({"kind": "overlap", "name": name, "batch": len(given.sets), **_overlap(given)})
        _show(name, rows[-1], OVERLAP_KINDS)


def _all_prefill(rows: list[dict[str, Any]]) -> None:
    _head(PREFILL_KINDS)
    for batch, length in PREFILL:
        times = _prefill(batch, length)
        rows.append({"kind": "prefill", "batch": batch, "length": length, **times})
        _show(f"prefill {batch} x {QUERY} x {length}", rows[-1], PREFILL_KINDS)


def _all_bias(rows: list[dict[str, Any]]) -> None:
    _head(BIAS_KINDS)
    for batch in BIAS_BATCHES:
        for kind, times in _bias(batch).items():
            rows.append({"kind": f"bias {kind}", "batch": batch, **times})
            _show(f"{kind} {batch} x {BIAS_CONTEXTS * CONTEXT}", rows[-1], BIAS_KINDS)


_MEASURE = dict(zip(PARTS, (_all_decode, _all_overlap, _all_prefill, _all_bias), strict=True))


def _head(kinds: tuple[str, ...]) -> None:
    print(f"{'':24}" + "".join(f"{kind:>10}" for kind in kinds) + "   us a layer")


def _show(name: str, row: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> None:
    shown = [row.get(kind) for kind in kinds]
    print(f"{name:24}" + "".join(f"{us:10.1f}" if us else f"{'':10}" for us in shown), flush=True)


def _decode(batch: int, length: int) -> dict[str, float]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    from flashinfer_ext.cascade import ApeCascadeAttentionWrapper

    own = PREFIX + QUERY
    caches, contexts, paths = _cache(length, own, batch)
    q = _normal(batch, HEADS, HEAD_DIM)
    row = torch.arange(batch + 1, dtype=torch.int32)
    ones = torch.ones(batch, dtype=torch.int32)

    stock = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        backend="fa2",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32, device="cuda"),
        paged_kv_indices_buffer=torch.zeros(
            batch * (length + own), dtype=torch.int32, device="cuda"
        ),
        paged_kv_last_page_len_buffer=ones.cuda(),
    )
    sequences = torch.cat([torch.cat([contexts, path]) for path in paths])
    stock.plan(
        row * (length + own),
        sequences,
        ones,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        1,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    times = {"stock": _graph_us(lambda cache: stock.run(q, cache), caches)}
    for name, groups in (("apart", batch), ("shared", 1)):
        indices = torch.cat([contexts.repeat(groups), *paths])
        wrapper = ApeCascadeAttentionWrapper(
            _workspace(), use_cuda_graph=True, batch_size=batch, paged_kv_indices_buffer=indices
        )
        members = torch.linspace(0, batch, groups + 1).int()
        wrapper.plan(
            [members, row],
            [torch.arange(groups + 1, dtype=torch.int32) * length, row * own],
            indices,
            [torch.ones(groups, dtype=torch.int32), ones],
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            1,
            temperature=0.9,
            scale=0.9,
            q_data_type=q.dtype,
        )
        times[name] = _graph_us(lambda cache, w=wrapper: w.run(q, cache), caches)
    return times


class Overlap(NamedTuple):
    sets: list[tuple[int, ...]]  # the contexts of each request
    prefix: int = PREFIX


def _overlaps() -> dict[str, Overlap]:
    chosen = random.Random(0)

    def some(count: int, of: int, batch: int) -> list[tuple[int, ...]]:
        return [tuple(chosen.sample(range(of), count)) for _ in range(batch)]

    own = [tuple(range(4 * i, 4 * i + 4)) for i in range(32)]
    return {
        "same 32, batch 1": Overlap([ALL_32]),
        "same 32, batch 8": Overlap([ALL_32] * 8),
        "same 32, batch 32": Overlap([ALL_32] * 32),
        "same 32, batch 64": Overlap([ALL_32] * 64),
        "same 128, batch 64": Overlap([tuple(range(128))] * 64),
        "two sets of 32, in turn": Overlap([ALL_32, tuple(range(32, 64))] * 16),
        "16 of 32, batch 32": Overlap(some(16, 32, 32)),
        "8 of 64, batch 32": Overlap(some(8, 64, 32)),
        "one in common, batch 32": Overlap([(0, *chosen[1:]) for chosen in own]),
        "nothing shared, batch 8": Overlap([tuple(range(8 * i, 8 * i + 8)) for i in range(8)]),
        "prefix of 8192, batch 32": Overlap(own, prefix=8192),
    }


def _overlap(given: Overlap) -> dict[str, float]:
    sets, prefix = given
    batch = len(sets)
    distinct = len({context for chosen in sets for context in chosen})
    length = (1 + max(max(chosen) for chosen in sets)) * CONTEXT
    caches, shared, queries = _cache(length + prefix, QUERY, batch)
    lines = [
        torch.cat([shared[length:], *(_tokens_of(shared, c) for c in chosen), query])
        for chosen, query in zip(sets, queries, strict=True)
    ]
    specs = [ApeSpec(prefix, (CONTEXT,) * len(chosen), 0.9, 0.9, str(chosen)) for chosen in sets]
    lens = np.array([len(line) for line in lines])
    readers = [
        Reader.of(spec, chosen, chosen, "P") for spec, chosen in zip(specs, sets, strict=True)
    ]
    kernel = _kernel()
    rates = HOPPER_RATES if kernel.key.template == "fa3" else Rates()
    costs = CostModel.of(*kernel.heads, 2, kernel.tile(2**30), rates)
    sizes = kernel.captured_sizes(batch, WORKSPACE // 2)
    cover = Planner(costs, sizes.items, sizes.states).follow(readers)
    levels = {"groups": decode_levels(specs, lens, sets)}
    expected = {}
    if cover is not None:
        levels["rectangles"] = rectangle_levels(specs, lens, cover)
        expected["model"] = cover.seconds * 1e6
    q = _normal(batch, HEADS, HEAD_DIM)
    times = {}
    for name, each in levels.items():
        wrapper = _cascade(each, lines, use_cuda_graph=True)
        times[name] = _graph_us(lambda cache, w=wrapper: w.run(q, cache), caches)
    tokens = distinct * CONTEXT + prefix + batch * QUERY
    floor = tokens * costs.token_bytes / COPY_BYTES_PER_SECOND * 1e6
    return {**times, "floor": floor, **expected}


def _kernel() -> Any:
    from flashinfer_ext.rectangles import Heads, Kernel
    from flashinfer_ext.variant import ModuleKey

    key = ModuleKey(torch.bfloat16, torch.bfloat16, HEAD_DIM)
    return Kernel.best(key, Heads(HEADS, KV_HEADS, HEAD_DIM), torch.device("cuda"))


def _cascade(levels: Levels, lines: list[torch.Tensor], use_cuda_graph: bool) -> Any:
    """A wrapper with a plan; ``lines`` are the slots of each request, P first."""
    from flashinfer_ext.cascade import ApeCascadeAttentionWrapper

    segments = zip(
        levels.segment_row.tolist(),
        levels.segment_start.tolist(),
        np.diff(levels.segment_indptr).tolist(),
        strict=True,
    )
    indices = torch.cat([lines[row][start : start + length] for row, start, length in segments])
    bias = None
    if levels.bias is not None:
        value, indptr = levels.bias
        bias = torch.from_numpy(np.repeat(value, np.diff(indptr))).cuda()
    in_graph: dict[str, Any] = dict(
        use_cuda_graph=True,
        batch_size=len(lines),
        paged_kv_indices_buffer=indices,
        rectangles=levels.contexts_rows is not None,
        bias_buffer=bias,
    )
    wrapper = ApeCascadeAttentionWrapper(_workspace(), **(in_graph if use_cuda_graph else {}))
    of_rows = (levels.contexts_rows, levels.path_groups, levels.rows_bias)
    rows, groups, rows_bias = (None if x is None else torch.from_numpy(x) for x in of_rows)
    wrapper.plan(
        [torch.from_numpy(indptr) for indptr in levels.qo_indptr],
        [torch.from_numpy(indptr) for indptr in levels.kv_indptr],
        indices,
        [torch.ones(len(indptr) - 1, dtype=torch.int32) for indptr in levels.kv_indptr],
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        1,
        temperature=torch.from_numpy(levels.temperature),
        scale=torch.from_numpy(levels.scale),
        q_data_type=torch.bfloat16,
        contexts_rows=rows,
        path_groups=groups,
        rows_bias=rows_bias,
        bias=bias,
    )
    return wrapper


def _tokens_of(contexts: torch.Tensor, context: int) -> torch.Tensor:
    return contexts[context * CONTEXT : (context + 1) * CONTEXT]


def _prefill(batch: int, length: int) -> dict[str, float]:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    own, rows = PREFIX + QUERY, batch * QUERY
    caches, contexts, paths = _cache(length, own, batch)
    q = _normal(rows, HEADS, HEAD_DIM)
    lines = [torch.cat([path[:PREFIX], contexts, path[PREFIX:]]) for path in paths]
    stock = BatchPrefillWithPagedKVCacheWrapper(_workspace(), backend="fa2")
    each = torch.arange(batch + 1, dtype=torch.int32)
    stock.plan(
        each * QUERY,
        each * (length + own),
        torch.cat(lines),
        torch.ones(batch, dtype=torch.int32),
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        1,
        causal=True,
        q_data_type=q.dtype,
    )
    out = torch.empty_like(q)
    times = {"stock": _eager_us(lambda cache: stock.run(q, cache, out=out), caches)}
    spec = ApeSpec(PREFIX, (length,), 0.9, 0.9, "set")
    bounds = [PREFIX + length] * batch, [length + own] * batch
    for kind, groups in (("apart", None), ("rectangles", [list(range(batch))])):
        wrapper = _cascade(
            extend_levels([spec] * batch, *bounds, groups), lines, use_cuda_graph=False
        )
        times[kind] = _eager_us(lambda cache, w=wrapper: w.run(q, cache, out=out), caches)
    return times


def _bias(batch: int) -> dict[str, dict[str, float]]:
    """Decoding, and for one request its prefill."""
    own, length = PREFIX + BIAS_QUERY, BIAS_CONTEXTS * CONTEXT
    caches, contexts, paths = _cache(length, own, batch)
    lines = [torch.cat([path[:PREFIX], contexts, path[PREFIX:]]) for path in paths]
    plain = [ApeSpec(PREFIX, (CONTEXT,) * BIAS_CONTEXTS, 0.9, 0.9, "set")] * batch
    chosen = random.Random(0)
    biased = [
        replace(spec, bias=(0.0, *(-3 * chosen.random() for _ in range(BIAS_CONTEXTS - 1))))
        for spec in plain
    ]
    lens, sets = np.full(batch, length + own), range(batch)
    decode = {
        "plain": decode_levels(plain, lens, sets),
        "biased": decode_levels(biased, lens, sets),
        "rectangle": rectangle_levels(plain, lens, _cover([length], batch)),
        "cut": rectangle_levels(
            biased, lens, _cover([CONTEXT] * BIAS_CONTEXTS, batch, [spec.bias for spec in biased])
        ),
    }
    q = _normal(batch, HEADS, HEAD_DIM)
    times: dict[str, dict[str, float]] = {"decode": {}}
    for kind, levels in decode.items():
        wrapper = _cascade(levels, lines, use_cuda_graph=True)
        times["decode"][kind] = _graph_us(lambda cache, w=wrapper: w.run(q, cache), caches)
    if batch > 1:
        return times
    bounds = [PREFIX + length], [length + own]
    prefill = {
        "plain": extend_levels(plain, *bounds),
        "biased": extend_levels(biased, *bounds),
        "rectangle": extend_levels(plain, *bounds, [[0]]),
    }
    q = _normal(BIAS_QUERY, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    times["prefill"] = {}
    for kind, levels in prefill.items():
        wrapper = _cascade(levels, lines, use_cuda_graph=False)
        run = lambda cache, w=wrapper: w.run(q, cache, out=out)  # noqa: E731
        times["prefill"][kind] = _eager_us(run, caches)
    return times


def _cover(
    lengths: Sequence[int], batch: int, biases: Sequence[Sequence[float]] | None = None
) -> Cover:
    """A rectangle for each of these runs of context tokens, over the whole batch."""
    count = len(lengths)
    bounds = np.append(0, np.cumsum(lengths)).astype(np.int32)
    bias = np.zeros((batch, count)) if biases is None else np.array(biases)
    return EMPTY_COVER._replace(
        qo_indptr=np.arange(count + 1, dtype=np.int32) * np.int32(batch),
        rows=np.tile(np.arange(batch, dtype=np.int32), count),
        kv_indptr=bounds,
        is_prefix=np.zeros(count, np.bool_),
        segment_row=np.zeros(count, np.int32),
        segment_start=bounds[:-1] + np.int32(PREFIX),
        segment_length=np.array(lengths, np.int32),
        bias=np.ascontiguousarray(bias.T, np.float32).ravel(),
    )


def _cache(
    length: int, own: int, batch: int
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """KV caches, one a layer, the slots of the contexts, and those of each request's path."""
    slots = length + own * batch
    layers = 2 if slots > 100_000 else LAYERS
    caches = [_normal(slots, 2, 1, KV_HEADS, HEAD_DIM) for _ in range(layers)]
    order = torch.arange(slots, dtype=torch.int32, device="cuda")
    return caches, order[:length], list(order[length:].split(own))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _workspace() -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")


def _graph_us(run: Callable[[torch.Tensor], Any], caches: list[torch.Tensor]) -> float:
    run(caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches:
            run(cache)
    return _median_us(graph.replay) / len(caches)


def _eager_us(run: Callable[[torch.Tensor], Any], caches: list[torch.Tensor]) -> float:
    def all_layers() -> None:
        for cache in caches:
            run(cache)

    return _median_us(all_layers) / len(caches)


def _median_us(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _machine() -> dict[str, str]:
    import flashinfer

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flashinfer": flashinfer.__version__,
    }


if __name__ == "__main__":
    main()
