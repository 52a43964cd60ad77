"""What the host does for one request whose contexts are all cached, next to stock SGLang.

Both sides serve the same tokens: prefix, contexts, query. Here the contexts are sibling paths of an
``ApeRadixCache`` and come in a new order each time; there everything before the query is one path
of SGLang's ``RadixCache``. Trees, page tables, allocators, requests and attention metadata are the
real ones, on the CPU; there is no model and no KV buffer. The two sides take turns within each
repeat, so that a busy machine disturbs both; the table shows processor time, which waiting for
other processes does not lengthen, and the last line the ratio of wall-clock times too.

Between the timed steps, as in the scheduler and alike on both sides: slots are allocated and the
page table's row is written (shown, but in no sum), and it is checked that nothing but the query
missed the cache and that every slot of the row holds the token it should.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import (
    ForwardMode,
    clamp_position,
    compute_position,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ape.attention.batch import after_init_new
from sglang_ape.attention.torch_native import ApeTorchNativeBackend
from sglang_ape.cache.tree import ApeRadixCache
from sglang_ape.request import spec_of
from sglang_ape.spec import ApeSpec

TARGET = 1.5
WARM_UP = 3  # repeats whose times are dropped
ROW_SLACK = 8  # slots of a row beyond the prompt; the benchmark generates two tokens
VOCAB = 32_000
FIRST_QUERY_TOKEN = VOCAB  # queries start with tokens that occur nowhere else, so they never hit
WRITE_ROW = "write row (in no sum)"
CLOCKS = {"processor": time.thread_time_ns, "wall": time.perf_counter_ns}  # in nanoseconds

Steps = dict[str, list[float]]  # milliseconds of every request, by step


class Workload(NamedTuple):
    """Lengths in tokens."""

    prefix: int
    contexts: int
    context_len: int
    shared_head: int  # tokens that every context starts with
    query: int
    repeats: int

    @property
    def cached(self) -> int:
        return self.prefix + self.contexts * self.context_len

    @property
    def prompt(self) -> int:
        return self.cached + self.query

    @property
    def pool(self) -> int:
        """KV slots: one copy of what is cached, and every query with its answer."""
        return self.cached + (self.repeats + WARM_UP + 1) * (self.query + ROW_SLACK)


class Texts:
    """The prompts' tokens, drawn once."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._numbers = np.random.default_rng(seed)
        self._order = random.Random(seed)
        self._workload = workload
        self._queries = 0
        self.prefix = self._draw(workload.prefix)
        head = self._draw(workload.shared_head)
        self.contexts = [
            head + self._draw(workload.context_len - workload.shared_head)
            for _ in range(workload.contexts)
        ]

    def query(self) -> array:
        """A query that was never asked."""
        self._queries += 1
        first = array("q", [FIRST_QUERY_TOKEN + self._queries])
        return first + self._draw(self._workload.query - 1)

    def shuffled(self) -> list[array]:
        return self._order.sample(self.contexts, len(self.contexts))

    def _draw(self, count: int) -> array:
        return array("q", self._numbers.integers(0, VOCAB, count, dtype=np.int64).tobytes())


class Side:
    """One tree with its pools, and the host's steps for a request on it: here stock SGLang's."""

    name = "stock"
    tree_class: type[RadixCache] = RadixCache
    backend_class: type[TorchNativeAttnBackend] = TorchNativeAttnBackend

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.hidden_tokens = 0  # by which a row is longer than the positions it uses
        width = workload.prompt + ROW_SLACK
        self.table = ReqToTokenPool(4, width, "cpu", enable_memory_saver=False)
        self.slots = TokenToKVPoolAllocator(workload.pool, torch.int64, "cpu", None, False)
        self.tree = self.tree_class(CacheInitParams(False, self.table, self.slots, page_size=1))
        self.runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=self.table,
            token_to_kv_pool=None,
            server_args=SimpleNamespace(enable_ape=True),
        )
        self.backend = self.backend_class(self.runner)
        self.held = np.zeros(workload.pool + 1, dtype=np.int64)  # slot -> token, instead of KV
        self.samples: dict[str, Steps] = {clock: {} for clock in CLOCKS}

    def request(self, texts: Texts, query: array) -> Req:
        ids = sum(texts.contexts, start=texts.prefix) + query
        return Req(f"{self.name}-{query[0]}", "", ids, SamplingParams(max_new_tokens=2))

    def serve(self, req: Req, expect_cached: int) -> None:
        """Take a request through the scheduler's steps, two generated tokens included."""
        with self._timed("read spec"):
            self.read_spec(req)
        with self._timed("match"):
            req.init_next_round_input(self.tree)
        if len(req.prefix_indices) != expect_cached:
            raise AssertionError(
                f"{self.name}: {len(req.prefix_indices)} tokens were cached, not {expect_cached}"
            )
        with self._timed("lock"):
            self.lock(req)
        with self._timed(WRITE_ROW):
            batch = self._extend_batch(req)
        self._hold(req)
        with self._timed("positions"):
            self.extend_positions(batch, req)
        self._check_last_position(batch)
        with self._timed("plan"):
            self.backend.init_forward_metadata(batch)
        req.output_ids.append(0)
        with self._timed("commit after prefill"):
            self.tree.cache_unfinished_req(req)
        batch = self._decode_batch(req)
        with self._timed("decode: positions"):
            self.decode_positions(batch, req)
        self._check_last_position(batch)
        with self._timed("decode: plan"):
            self.backend.init_forward_metadata(batch)
        req.output_ids.append(0)
        self._check_row(req)
        with self._timed("commit at the end"):
            self.tree.cache_finished_req(req, kv_len_to_handle=req.kv_committed_len)
        self.table.free(req)

    def read_spec(self, req: Req) -> None:
        """Nothing to read."""

    def lock(self, req: Req) -> None:
        """``PrefillAdder.add_one_req``: the request's lock, inside a temporary one."""
        self.tree.inc_lock_ref(req.last_node)
        self.tree.inc_lock_ref(req.last_node)
        self.tree.dec_lock_ref(req.last_node)

    def extend_positions(self, batch: Any, req: Req) -> None:
        """The part of ``ForwardBatch.init_new`` that sets an extend batch's positions."""
        lens = torch.tensor(batch.extend_seq_lens_cpu, dtype=torch.int32)
        starts = torch.tensor(batch.extend_prefix_lens_cpu, dtype=torch.int32)
        batch.positions, _ = compute_position("torch_native", starts, lens, int(lens[0]))

    def decode_positions(self, batch: Any, req: Req) -> None:
        """The same for a decode batch."""
        batch.positions = clamp_position(batch.seq_lens)

    def check_clean(self) -> None:
        """Every slot is free or in the tree, nothing is locked, and all of it can be evicted."""
        free, stored = self.slots.available_size(), self.tree.total_size()
        locked, size = self.tree.protected_size(), self.workload.pool
        if free + stored != size or locked or self.tree.evictable_size() != stored:
            raise AssertionError(
                f"{self.name}: {size} slots, {free} free, {stored} in the tree, {locked} locked, "
                f"{self.tree.evictable_size()} evictable"
            )
        self.tree.evict(EvictParams(num_tokens=stored))
        if len(set(self.slots.free_pages.tolist())) != size:
            raise AssertionError(f"{self.name}: slots are missing after evicting everything")

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        starts = [read() for read in CLOCKS.values()]
        yield
        stops = [read() for read in reversed(CLOCKS.values())]
        for clock, start, stop in zip(CLOCKS, starts, reversed(stops), strict=True):
            self.samples[clock].setdefault(step, []).append((stop - start) / 1e6)

    def _extend_batch(self, req: Req) -> SimpleNamespace:
        """Allocate and write the row as ``alloc_for_extend`` does; the batch it makes."""
        start, stop = len(req.prefix_indices), len(req.full_untruncated_fill_ids)
        req.set_extend_range(start, stop)
        self.table.alloc([req])
        self.table.write((req.req_pool_idx, slice(0, start)), req.prefix_indices)
        self.table.write((req.req_pool_idx, slice(start, stop)), self.slots.alloc(stop - start))
        req.kv_committed_len = stop
        return self._batch(req, ForwardMode.EXTEND, start, stop)

    def _decode_batch(self, req: Req) -> SimpleNamespace:
        start = req.kv_committed_len
        req.kv_committed_len += 1
        self.table.write((req.req_pool_idx, slice(start, start + 1)), self.slots.alloc(1))
        self.held[self._row(req)[start]] = req.output_ids[0]
        return self._batch(req, ForwardMode.DECODE, start, start + 1)

    def _batch(self, req: Req, mode: ForwardMode, start: int, stop: int) -> SimpleNamespace:
        """The fields of ``ForwardBatch`` that positions and metadata are made from."""
        return SimpleNamespace(
            forward_mode=mode,
            rids=[req.rid],
            reqs=[req],
            req_pool_indices=torch.tensor([req.req_pool_idx]),
            seq_lens=torch.tensor([stop]),
            extend_prefix_lens_cpu=[start],
            extend_seq_lens_cpu=[stop - start],
            out_cache_loc=None,
            positions=None,
        )

    def _row(self, req: Req) -> np.ndarray:
        return self.table.req_to_token[req.req_pool_idx, : req.kv_committed_len].numpy()

    def _hold(self, req: Req) -> None:
        new = slice(req.extend_range.start, req.extend_range.end)
        self.held[self._row(req)[new]] = req.full_untruncated_fill_ids[new]

    def _check_last_position(self, batch: Any) -> None:
        last, wanted = int(batch.positions[-1]), int(batch.seq_lens[0]) - 1 - self.hidden_tokens
        if last != wanted:
            raise AssertionError(f"{self.name}: the last position is {last}, not {wanted}")

    def _check_row(self, req: Req) -> None:
        ids = (req.origin_input_ids + req.output_ids)[: req.kv_committed_len]
        wrong = np.flatnonzero(self.held[self._row(req)] != np.asarray(ids))
        if len(wrong):
            raise AssertionError(f"{self.name}: {len(wrong)} slots of the row hold another token")


class ApeSide(Side):
    """The same with contexts side by side. The hook on positions runs after SGLang's own code."""

    name = "APE"
    tree_class = ApeRadixCache
    backend_class = ApeTorchNativeBackend

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.hidden_tokens = (workload.contexts - 1) * workload.context_len

    def request(self, texts: Texts, query: array) -> Req:
        contexts = texts.shuffled()
        spec = ApeSpec(len(texts.prefix), tuple(map(len, contexts)), 0.9, 0.9, "one set")
        params = SamplingParams(max_new_tokens=2, custom_params=spec.to_custom_params())
        ids = sum(contexts, start=texts.prefix) + query
        return Req(f"{self.name}-{query[0]}", "", ids, params)

    def read_spec(self, req: Req) -> None:
        """The first look, when the request comes in (``Scheduler.init_req_max_new_tokens``)."""
        spec = spec_of(req)
        assert spec is not None and spec.hidden_tokens >= 0

    def extend_positions(self, batch: Any, req: Req) -> None:
        super().extend_positions(batch, req)
        after_init_new(batch, Req, batch, self.runner)

    def decode_positions(self, batch: Any, req: Req) -> None:
        super().decode_positions(batch, req)
        after_init_new(batch, Req, batch, self.runner)


def measure(workload: Workload, seed: int) -> dict[str, dict[str, Steps]]:
    """What each step took, by clock and side."""
    texts = Texts(workload, seed)
    sides = [Side(workload), ApeSide(workload)]
    for side in sides:
        side.serve(side.request(texts, texts.query()), expect_cached=0)
    gc.collect()
    gc.freeze()  # what was there before is not collected on any request's time
    for _ in track(range(WARM_UP + workload.repeats), "requests", console=Console(stderr=True)):
        for side in sides:
            side.serve(side.request(texts, texts.query()), expect_cached=workload.cached)
        sides.reverse()
    gc.unfreeze()
    for side in sides:
        side.check_clean()
    return {
        clock: {side.name: _timed_ones(side.samples[clock]) for side in sides} for clock in CLOCKS
    }


def _timed_ones(steps: Steps) -> Steps:
    cold = 1
    return {step: times[cold + WARM_UP :] for step, times in steps.items()}


class Summary(NamedTuple):
    """Milliseconds."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.3f}  ({self.p10:.3f}-{self.p90:.3f})"


def summarise(samples: Sequence[float]) -> Summary:
    p10, p90 = np.percentile(samples, [10, 90])
    return Summary(statistics.median(samples), float(p10), float(p90))


def request_sums(steps: Steps) -> list[float]:
    """What each request cost in all steps that count."""
    counted = [times for step, times in steps.items() if step != WRITE_ROW]
    return [sum(parts) for parts in zip(*counted, strict=True)]


def ratio(sides: dict[str, Steps]) -> float:
    """APE's median cost of a request by stock SGLang's."""
    ape, stock = (statistics.median(request_sums(sides[side.name])) for side in (ApeSide, Side))
    return ape / stock


def result_of(workload: Workload, samples: dict[str, dict[str, Steps]]) -> dict[str, Any]:
    return {
        "workload": workload._asdict(),
        "target": TARGET,
        "ratio": {clock: ratio(sides) for clock, sides in samples.items()},
        "sums_ms": {
            clock: {side: summarise(request_sums(steps))._asdict() for side, steps in sides.items()}
            for clock, sides in samples.items()
        },
        "samples_ms": samples,
        "machine": machine(),
        "versions": {name: version(name) for name in ("sglang", "torch", "numpy", "sglang-ape")},
    }


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(result: dict[str, Any], console: Console) -> None:
    stock, ape = (result["samples_ms"]["processor"][side.name] for side in (Side, ApeSide))
    shape = Workload(**result["workload"])
    table = Table(
        title=f"{shape.cached} tokens cached, {shape.query} new: processor time of one request\n"
        f"in ms, median (p10-p90) of {shape.repeats}",
        caption="plan: stock torch_native makes none, it looks the slots up in every layer",
    )
    table.add_column("step")
    table.add_column("stock", justify="right")
    table.add_column("APE", justify="right")
    for step in stock:
        table.add_row(step, str(summarise(stock[step])), str(summarise(ape[step])))
    table.add_section()
    table.add_row("sum", *(str(summarise(request_sums(steps))) for steps in (stock, ape)))
    console.print(table)
    ratios = result["ratio"]
    verdict = "within" if ratios["processor"] <= TARGET else "over"
    console.print(
        f"APE / stock: {ratios['processor']:.2f}, {verdict} the target of {TARGET} "
        f"(wall clock: {ratios['wall']:.2f})"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_overhead", description=__doc__.split("\n\n")[0])
    add: Callable[..., Any] = parser.add_argument
    add("--prefix", type=int, default=64, help="tokens before the contexts (%(default)s)")
    add("--contexts", type=int, default=512, help="number of contexts (%(default)s)")
    add("--context-len", type=int, default=256, help="tokens of each context (%(default)s)")
    add(
        "--shared-head",
        type=int,
        default=0,
        help="tokens that every context starts with, as few-shot examples do (%(default)s)",
    )
    add("--query", type=int, default=256, help="tokens of the query, never cached (%(default)s)")
    add("--repeats", type=int, default=30, help="timed requests on each side (%(default)s)")
    add("--seed", type=int, default=0, help="of tokens and orders (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write raw samples, versions and machine there")
    given = parser.parse_args(arguments)
    if min(given.prefix, given.contexts, given.query, given.repeats) < 1:
        parser.error("--prefix, --contexts, --query and --repeats must be positive")
    if not 0 <= given.shared_head < given.context_len:
        parser.error("--shared-head must be at least 0 and less than --context-len")
    return given


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)  # copies of a megabyte: a second thread adds noise, not speed
    workload = Workload(**{name: getattr(given, name) for name in Workload._fields})
    result = result_of(workload, measure(workload, given.seed))
    show(result, Console())
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
