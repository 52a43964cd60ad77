"""GPU time of one layer's attention: the cascade beside FlashInfer's own kernel.

    python -m benchmarks.cascade_kernels --json docs/performance/cascade_kernels.json

Decoding: ``batch`` requests with one new row each over ``length`` tokens of contexts that all of
them share, and 64 + 256 tokens of path of their own; stock reads the same tokens as one sequence a
request. *apart*: the cascade with a group of contexts for each request; *shared*: with one group
for all of them.
Overlap: ``batch`` requests over contexts of 1,024 tokens each, in *groups* (neighbours with equal
sets read them once) and in *rectangles* (what the planner chooses, nothing where it chooses none).
*floor* is each token of KV read once at the speed of a copy; *model* is what the planner expects
of the contexts pass alone.
Prefill: one request with 256 query rows over ``length`` cached tokens. The heads are those of
Llama-3.1-8B (32 and 8 of 128), bf16, page size 1. Decoding is timed as CUDA graph replays, prefill
as eager launches; medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_ape.attention.levels import Levels, decode_levels, rectangle_levels
from sglang_ape.attention.rectangles import HOPPER_RATES, CostModel, Planner, Rates, Reader
from sglang_ape.spec import ApeSpec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PREFIX, QUERY = 64, 256
DECODE = [(1, 2048), (1, 32768), (1, 131072), (2, 2048), (2, 32768), (4, 2048), (4, 32768)]
DECODE += [(8, 2048), (8, 32768), (16, 8192), (32, 2048), (32, 32768)]
CONTEXT = 1024
ALL_32 = tuple(range(32))
PREFILL = [2048, 32768, 131072]
KINDS = ("stock", "apart", "shared")
OVERLAP_KINDS = ("groups", "rectangles", "floor", "model")
COPY_BYTES_PER_SECOND = 2.95e12  # of an H100 80GB HBM3
REPEATS = 30
WORKSPACE = 384 << 20  # bytes, as SGLang's
LAYERS = 8  # attention calls in a graph, on caches of their own so that L2 does not keep them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    rows = []
    print(f"{'':24}" + "".join(f"{kind:>10}" for kind in KINDS) + "   us a layer")
    for batch, length in DECODE:
        rows.append({"kind": "decode", "batch": batch, "length": length, **_decode(batch, length)})
        _show(f"decode {batch} x {length}", rows[-1])
    print(f"{'':24}" + "".join(f"{kind:>11}" for kind in OVERLAP_KINDS))
    for name, sets in _overlaps().items():
        rows.append({"kind": "overlap", "name": name, "batch": len(sets), **_overlap(sets)})
        _show(name, rows[-1], OVERLAP_KINDS)
    for length in PREFILL:
        rows.append({"kind": "prefill", "length": length, **_prefill(length)})
        _show(f"prefill {QUERY} x {length}", rows[-1])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")


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


def _overlaps() -> dict[str, list[tuple[int, ...]]]:
    """For each situation the contexts of each request."""
    chosen = random.Random(0)

    def some(count: int, of: int, batch: int) -> list[tuple[int, ...]]:
        return [tuple(chosen.sample(range(of), count)) for _ in range(batch)]

    return {
        "same 32, batch 1": [ALL_32],
        "same 32, batch 8": [ALL_32] * 8,
        "same 32, batch 32": [ALL_32] * 32,
        "same 32, batch 64": [ALL_32] * 64,
        "same 128, batch 64": [tuple(range(128))] * 64,
        "two sets of 32, in turn": [ALL_32, tuple(range(32, 64))] * 16,
        "16 of 32, batch 32": some(16, 32, 32),
        "8 of 64, batch 32": some(8, 64, 32),
        "one in common, batch 32": [(0, *range(1 + 3 * i, 4 + 3 * i)) for i in range(32)],
        "nothing shared, batch 8": [tuple(range(8 * i, 8 * i + 8)) for i in range(8)],
    }


def _overlap(sets: list[tuple[int, ...]]) -> dict[str, float]:
    batch, own = len(sets), PREFIX + QUERY
    distinct = len({context for chosen in sets for context in chosen})
    length = (1 + max(max(chosen) for chosen in sets)) * CONTEXT
    caches, contexts, paths = _cache(length, own, batch)
    of_request = [torch.cat([_tokens_of(contexts, c) for c in chosen]) for chosen in sets]
    specs = [ApeSpec(PREFIX, (CONTEXT,) * len(chosen), 0.9, 0.9, str(chosen)) for chosen in sets]
    lens = np.array([spec.context_end + QUERY for spec in specs])
    readers = [Reader.of(spec, chosen, chosen) for spec, chosen in zip(specs, sets, strict=True)]

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
    for name, given in levels.items():
        wrapper = _cascade(given, of_request, paths)
        times[name] = _graph_us(lambda cache, w=wrapper: w.run(q, cache), caches)
    tokens = distinct * CONTEXT + batch * own
    floor = tokens * costs.token_bytes / COPY_BYTES_PER_SECOND * 1e6
    return {**times, "floor": floor, **expected}


def _kernel() -> Any:
    from flashinfer_ext.rectangles import Heads, Kernel
    from flashinfer_ext.variant import ModuleKey

    key = ModuleKey(torch.bfloat16, torch.bfloat16, HEAD_DIM)
    return Kernel.best(key, Heads(HEADS, KV_HEADS, HEAD_DIM), torch.device("cuda"))


def _cascade(levels: Levels, contexts: list[torch.Tensor], paths: list[torch.Tensor]) -> Any:
    """A captured wrapper with a plan; ``contexts`` and ``paths`` are the slots of each request."""
    from flashinfer_ext.cascade import ApeCascadeAttentionWrapper

    segments = len(levels.segment_row) - 2 * len(paths)
    parts = [
        contexts[row][start - PREFIX : start - PREFIX + stop - first]
        for row, start, first, stop in zip(
            levels.segment_row[:segments].tolist(),
            levels.segment_start[:segments].tolist(),
            levels.segment_indptr[:segments].tolist(),
            levels.segment_indptr[1 : segments + 1].tolist(),
            strict=True,
        )
    ]
    indices = torch.cat([*parts, *paths])
    wrapper = ApeCascadeAttentionWrapper(
        _workspace(),
        use_cuda_graph=True,
        batch_size=len(paths),
        paged_kv_indices_buffer=indices,
        rectangles=levels.contexts_rows is not None,
    )
    rows = levels.contexts_rows
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
        contexts_rows=None if rows is None else torch.from_numpy(rows),
    )
    return wrapper


def _tokens_of(contexts: torch.Tensor, context: int) -> torch.Tensor:
    return contexts[context * CONTEXT : (context + 1) * CONTEXT]


def _prefill(length: int) -> dict[str, float]:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    from flashinfer_ext.cascade import ApeCascadeAttentionWrapper

    own = PREFIX + QUERY
    caches, contexts, paths = _cache(length, own, 1)
    q = _normal(QUERY, HEADS, HEAD_DIM)
    rows, one = torch.tensor([0, QUERY], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    indices = torch.cat([contexts, paths[0]])

    def indptr(tokens: int) -> torch.Tensor:
        return torch.tensor([0, tokens], dtype=torch.int32)

    stock = BatchPrefillWithPagedKVCacheWrapper(_workspace(), backend="fa2")
    stock.plan(
        rows,
        indptr(length + own),
        indices,
        one,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        1,
        causal=True,
        q_data_type=q.dtype,
    )
    wrapper = ApeCascadeAttentionWrapper(_workspace())
    wrapper.plan(
        [rows, rows],
        [indptr(length), indptr(own)],
        indices,
        [one, one],
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        1,
        temperature=0.9,
        scale=0.9,
        q_data_type=q.dtype,
    )
    out = torch.empty_like(q)
    return {
        "stock": _eager_us(lambda cache: stock.run(q, cache, out=out), caches),
        "apart": _eager_us(lambda cache: wrapper.run(q, cache, out=out), caches),
    }


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
