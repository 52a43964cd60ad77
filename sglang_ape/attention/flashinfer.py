"""APE on SGLang's FlashInfer backend: two-level cascade attention, with CUDA graphs for decoding.

Source: ``layers/attention/flashinfer_backend.py`` and
``model_executor/runner/decode_cuda_graph_runner.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashinfer_ext.cascade import ApeCascadeAttentionWrapper, temperature_module
from flashinfer_ext.gather import gather_kv_indices, spread
from flashinfer_ext.lse import context_lse
from flashinfer_ext.rectangles import Heads, Kernel
from flashinfer_ext.staging import Lists, staged
from flashinfer_ext.variant import ModuleKey, is_available
from sglang_ape import metrics
from sglang_ape.arguments import ATTENTION
from sglang_ape.attention.batch import (
    ApeBatch,
    ape_batch,
    ape_batch_of_size,
    set_serves_bias,
)
from sglang_ape.attention.levels import (
    NO_BIAS,
    Levels,
    decode_levels,
    extend_levels,
    rectangle_levels,
)
from sglang_ape.attention.mass import Measured, finished, measured_rows, most_held
from sglang_ape.attention.rectangles import (
    EMPTY_COVER,
    HOPPER_RATES,
    CostModel,
    Cover,
    Planner,
    Rates,
    prefill_groups,
)
from sglang_ape.spec import ApeSpec

logger = logging.getLogger(__name__)

TEST_ALWAYS_SHARE = "SGLANG_APE_TEST_ALWAYS_SHARE"
"""Set for tests only, whose contexts are too short for sharing to pay."""

MOST_PREFILL_ROWS = 4096
"""Rows of queries that are packed for rectangles; more would take much memory beside the pool."""

GRAPH_VARIANT = "ape"
SHARED_VARIANT = "ape-shared"
SOFT_VARIANT = "ape-soft"


class _Probe(NamedTuple):
    """A request whose attention is measured, and where its contexts are."""

    measured: Measured
    slots: torch.Tensor  # (tokens of contexts,) int32
    indptr: torch.Tensor  # (contexts + 1,) int32, into ``slots``


class ApeFlashInferBackend(FlashInferAttnBackend):
    """Batches without an APE request take the stock code and the stock CUDA graphs.

    In a batch with one, all rows go through the cascade; plain rows are rows without contexts.
    Decode steps are captured three times more for such batches, under graph keys of their own: with
    a group of contexts for each row or run of rows; the same with a bias for each KV index, where a
    request has one; and with rectangles, where requests share the reading of contexts and that
    pays.
    """

    def __init__(self, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_runner, *args, **kwargs)
        stock = self.indices_updater_decode
        self._plan_arguments = dict(
            num_qo_heads=stock.num_qo_heads,
            num_kv_heads=stock.num_kv_heads,
            head_dim=stock.head_dim,
            page_size=1,
            q_data_type=stock.q_data_type,
            kv_data_type=stock.data_type,
        )
        counted = model_runner.server_args.enable_metrics and model_runner.ps.tp_rank == 0
        self._steps = metrics.decode_steps(model_runner.server_args) if counted else None
        self._eager = ApeCascadeAttentionWrapper(self.workspace_buffer)
        self._graphs: dict[tuple[int, str], ApeCascadeAttentionWrapper] = {}  # by rows, variant
        self._graph_bias: torch.Tensor | None = None
        self._capturing: str | None = None  # the variant
        self._active: ApeCascadeAttentionWrapper | None = None  # None: the stock code's turn
        self._probes: list[_Probe] = []  # of the active batch
        self._shares_reads = not model_runner.server_args.ape_disable_shared_reads
        self._planner: Planner | None = None  # None: no rectangles
        self.serves_bias = False  # no stock kernel stands in for the module with a bias
        self._warm_up(measures=model_runner.server_args.ape_scorer == ATTENTION)
        self._followed: tuple[ApeBatch | None, Cover | None] = (None, None)

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """One buffer of KV indices for stock and APE graphs, which are never both in flight.

        Rows with contexts may be longer than the model's window, by which stock sizes it.
        """
        if kv_indices_buf is None:
            width = max(self.req_to_token_pool.req_to_token.shape[1], self.max_context_len)
            kv_indices_buf = torch.zeros(
                max_num_tokens * width, dtype=torch.int32, device=self.workspace_buffer.device
            )
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        if self.serves_bias:
            indices = self.cuda_graph_kv_indices[0]
            self._graph_bias = torch.zeros_like(indices, dtype=torch.float32)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        finished.begin_pass()
        batch = ape_batch(forward_batch.rids)
        if batch is None:
            self._active = None
            super().init_forward_metadata(forward_batch)
            return
        stops = forward_batch.seq_lens_cpu
        self._probes = []
        if forward_batch.forward_mode.is_decode():
            levels = _levels(batch, stops.numpy(), self.cover_of(batch))
        else:
            bounds = forward_batch.extend_prefix_lens_cpu, stops.tolist()
            levels = extend_levels(batch.specs, *bounds, self._prefill_groups(batch, *bounds))
            self._probes = self._plan_probes(forward_batch, batch, *bounds)
        self._plan(self._eager, levels, forward_batch.req_pool_indices)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        finished.begin_pass()
        self._probes = []
        batch = self._batch_of_graph(forward_batch, in_capture)
        if batch is None:
            self._active = None
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        bs = forward_batch.batch_size
        indices = self.cuda_graph_kv_indices[0]
        if in_capture:
            assert self._capturing is not None
            variant = self._capturing
            cover = EMPTY_COVER if variant == SHARED_VARIANT else None
            self._graphs[bs, variant] = ApeCascadeAttentionWrapper(
                self.workspace_buffer,
                use_cuda_graph=True,
                batch_size=bs,
                paged_kv_indices_buffer=indices,
                rectangles=variant == SHARED_VARIANT,
                bias_buffer=self._graph_bias if variant == SOFT_VARIANT else None,
            )
        else:
            announced = ape_batch_of_size(bs - forward_batch.num_padding)
            assert announced is not None
            variant, cover = self.variant_of(announced), self.cover_of(announced)
        levels = _levels(batch, forward_batch.seq_lens_cpu[:bs].numpy(), cover)
        if variant == SOFT_VARIANT and levels.bias is None:
            levels = levels._replace(bias=NO_BIAS)
        buffers = indices, self._graph_bias
        wrapper = self._graphs[bs, variant]
        self._plan(wrapper, levels, forward_batch.req_pool_indices[:bs], *buffers)

    def _prefill_groups(
        self, batch: ApeBatch, starts: Sequence[int], stops: Sequence[int]
    ) -> list[list[int]] | None:
        """Requests of a prefill batch whose queries read equal contexts at once."""
        if self._planner is None or _has_bias(batch):
            return None
        rows, tokens = [], []
        for spec, start, stop in zip(batch.specs, starts, stops, strict=True):
            reads_all = spec is not None and spec.row_len is None
            end = spec.context_end if spec else stop
            rows.append(max(stop - max(start, end), 0) if reads_all else 0)
            tokens.append(end - spec.prefix_len if spec else 0)
        if sum(rows) > MOST_PREFILL_ROWS:
            return None
        return prefill_groups(rows, tokens, batch.context_sets, self._planner.costs)

    def _plan_probes(
        self, forward_batch: Any, batch: ApeBatch, starts: Sequence[int], stops: Sequence[int]
    ) -> list[_Probe]:
        """The requests of a prefill batch whose attention is measured in it."""
        probes, offset = [], 0
        most = most_held(batch.masses)
        rows = zip(forward_batch.rids, batch.specs, batch.masses, starts, stops, strict=True)
        for i, (rid, spec, mass, start, stop) in enumerate(rows):
            measured = measured_rows(rid, spec, mass, start, stop, offset, most)
            offset += stop - start
            if measured is None or spec is None:
                continue
            line = forward_batch.req_pool_indices[i : i + 1]
            columns = slice(spec.prefix_len, spec.context_end)
            slots = self.req_to_token_pool.req_to_token[line, columns].view(-1)
            indptr = staged(torch.from_numpy(spec.context_indptr))
            probes.append(_Probe(measured, slots, indptr.to(slots.device, non_blocking=True)))
        return probes

    def cover_of(self, batch: ApeBatch | None) -> Cover | None:
        """The rectangles of a decode batch, None where it is read without any."""
        if batch is None:
            return None
        if batch is not self._followed[0]:
            cover = self._planner.follow(batch.readers) if self._planner else None
            self._followed = batch, cover
            if self._steps is not None:
                self._steps["apart" if cover is None else "shared"].inc()
        return self._followed[1]

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._active is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(self._active, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._active is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(self._active, q, k, v, layer, forward_batch, save_kv_cache)

    @property
    def variants(self) -> tuple[str, ...]:
        """The graphs that each batch size is captured as, beside the stock path's."""
        found = [GRAPH_VARIANT]
        if self.serves_bias:
            found.append(SOFT_VARIANT)
        if self._planner is not None:
            found.append(SHARED_VARIANT)
        return tuple(found)

    def variant_of(self, batch: ApeBatch) -> str:
        """The one that a batch replays."""
        if self.cover_of(batch) is not None:
            return SHARED_VARIANT
        return SOFT_VARIANT if _has_bias(batch) else GRAPH_VARIANT

    def capture_all(self, capture: Callable[[str | None], None]) -> None:
        """Capture one batch size on the stock path, then on the cascade in each of its variants."""
        capture(None)
        try:
            for variant in self.variants:
                self._capturing = variant
                capture(variant)
        finally:
            self._capturing = None

    def _batch_of_graph(self, forward_batch: Any, in_capture: bool) -> ApeBatch | None:
        """What the rows of a captured batch size hold, None if it is the stock path's."""
        bs = forward_batch.batch_size
        if in_capture:
            return ApeBatch([None] * bs, [None] * bs) if self._capturing else None
        padding = [None] * forward_batch.num_padding
        batch = ape_batch_of_size(bs - len(padding))
        if batch is None:
            return None
        return ApeBatch([*batch.specs, *padding], [*batch.context_sets, *padding])

    def _plan(
        self,
        wrapper: ApeCascadeAttentionWrapper,
        levels: Levels,
        req_pool_indices: torch.Tensor,
        indices: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Plan a wrapper; what it reads goes to ``indices`` and ``bias``, or to new tensors."""
        device = self.workspace_buffer.device
        if indices is None:
            size = int(levels.segment_indptr[-1])
            indices = torch.empty(size, dtype=torch.int32, device=device)
        given = [levels.segment_row, levels.segment_start, levels.segment_indptr]
        if levels.bias is not None:
            given += [levels.bias.value.view(np.int32), levels.bias.indptr]
        lists = Lists(given)
        row, start, indptr, *of_bias = lists.views(lists.host.to(device, non_blocking=True))
        longest = int(np.diff(levels.segment_indptr).max())
        table = self.req_to_token_pool.req_to_token
        gather_kv_indices(table, req_pool_indices, row, start, indptr, longest, indices)
        if levels.bias is None:
            bias = None
        else:
            if bias is None:
                size = int(levels.bias.indptr[-1])
                bias = torch.empty(size, dtype=torch.float32, device=device)
            value, indptr = of_bias
            longest = int(np.diff(levels.bias.indptr).max(initial=0))
            spread(value.view(torch.float32), indptr, longest, bias)
        wrapper.plan(
            [torch.from_numpy(indptr) for indptr in levels.qo_indptr],
            [torch.from_numpy(indptr) for indptr in levels.kv_indptr],
            indices,
            [torch.ones(len(indptr) - 1, dtype=torch.int32) for indptr in levels.kv_indptr],
            temperature=torch.from_numpy(levels.temperature),
            scale=torch.from_numpy(levels.scale),
            contexts_rows=_tensor(levels.contexts_rows),
            path_groups=_tensor(levels.path_groups),
            rows_bias=_tensor(levels.rows_bias),
            bias=bias,
            **self._plan_arguments,
        )
        self._active = wrapper

    def _attend(
        self,
        wrapper: ApeCascadeAttentionWrapper,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        pool = self.token_to_kv_pool
        if k is not None and save_kv_cache:
            location = KVWriteLoc(forward_batch.out_cache_loc, None)
            pool.set_kv_buffer(layer, location, k, v, *self._kv_write_scales(layer))
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        kv_cache = pool.get_kv_buffer(layer.layer_id)
        out = wrapper.run(
            q,
            kv_cache,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
            sm_scale=layer.scaling,
            return_lse=bool(self._probes),
        )
        if isinstance(out, tuple):
            out, lse = out
            logits_scale = layer.scaling * (layer.k_scale_float or 1.0)
            for measured, slots, indptr in self._probes:
                given = dict(k_cache=kv_cache[0], indices=slots, indptr=indptr)
                of_contexts = partial(context_lse, **given, sm_scale=logits_scale)
                rows = measured.rows
                measured.add(layer.layer_id, q[rows], lse[rows], of_contexts)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _warm_up(self, measures: bool) -> None:
        """Compile or load every kernel now rather than at the first request."""
        arguments = self._plan_arguments
        key = ModuleKey(arguments["q_data_type"], arguments["kv_data_type"], arguments["head_dim"])
        logger.info("preparing %s (compiled on first use, which takes minutes)", key.name)
        begin = time.perf_counter()
        custom = temperature_module(key) is not None
        self.serves_bias = custom and is_available(key._replace(with_bias=True))
        if custom and self._shares_reads:
            self._planner = self._make_planner(key)
        spec = ApeSpec(1, (2, 2), 0.9, 0.9, "warm-up")
        biased = replace(spec, bias=(0.0, -1.0))
        line = torch.zeros(1, dtype=torch.int64, device=self.workspace_buffer.device)
        shape = (3, arguments["num_qo_heads"], arguments["head_dim"])
        q = torch.zeros(shape, dtype=arguments["q_data_type"], device=line.device)
        kv = self.token_to_kv_pool.get_kv_buffer(self.token_to_kv_pool.start_layer)
        prepared = [
            extend_levels([spec], [4], [7]),  # a context's last row and two of the query
            decode_levels([spec], np.array([6]), ["warm-up"]),
        ]
        if self._planner is not None:
            prepared.append(rectangle_levels([spec], np.array([6]), _whole_cover(spec)))
        set_serves_bias(self.serves_bias)
        if self.serves_bias:
            prepared.append(extend_levels([biased], [4], [7]))
        else:
            logger.warning(
                "attention module %s cannot be had: requests with soft are refused",
                key._replace(with_bias=True).name,
            )
        for levels in prepared:
            self._plan(self._eager, levels, line)
            self._eager.run(q[: levels.qo_indptr[1][-1]], kv)
        if measures:
            first = line.int()
            context_lse(q, kv[0], first, torch.stack([first, first + 1]).view(-1), 1.0)
        torch.cuda.synchronize()
        self._active = None
        kernel = key.name if custom else "FlashInfer's stock kernel"
        logger.info("attention of APE: %s, ready in %.1f s", kernel, time.perf_counter() - begin)

    def _make_planner(self, key: ModuleKey) -> Planner:
        """Limits are those of the captured launches, whose sizes grow with the batch."""
        given = self._plan_arguments
        heads = Heads(given["num_qo_heads"], given["num_kv_heads"], given["head_dim"])
        kernel = Kernel.best(key, heads, self.workspace_buffer.device)
        sizes = kernel.captured_sizes(1, self.workspace_buffer.nbytes // 2)
        rates = HOPPER_RATES if kernel.key.template == "fa3" else Rates()
        costs = CostModel.of(*heads, key.kv_dtype.itemsize, kernel.tile(2**30), rates)
        if os.environ.get(TEST_ALWAYS_SHARE):
            costs = costs.with_free_sharing()
        logger.info("contexts that requests share are read by %s", kernel.key.name)
        return Planner(costs, sizes.items, sizes.states)


def _has_bias(batch: ApeBatch) -> bool:
    return any(spec.bias for spec in batch.specs if spec)


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)


def _levels(batch: ApeBatch, seq_lens: np.ndarray, cover: Cover | None) -> Levels:
    if cover is None:
        return decode_levels(batch.specs, seq_lens, batch.context_sets)
    return rectangle_levels(batch.specs, seq_lens, cover)


def _whole_cover(spec: ApeSpec) -> Cover:
    """One rectangle: the contexts of a single request."""
    tokens = spec.context_end - spec.prefix_len
    bounds, columns = (np.array(given, np.int32) for given in ([0, 1], [spec.prefix_len, tokens]))
    return EMPTY_COVER._replace(
        qo_indptr=bounds,
        rows=bounds[:1],
        is_prefix=np.zeros(1, np.bool_),
        kv_indptr=bounds * np.int32(tokens),
        segment_row=bounds[:1],
        segment_start=columns[:1],
        segment_length=columns[1:],
        bias=np.zeros(1, np.float32),
    )


def around_resolve_lora_variant(
    original: Callable[..., Any], runner: Any, forward_batch: Any
) -> Any:
    """AROUND hook on ``DecodeCudaGraphRunner._resolve_lora_variant``: pick the APE graphs."""
    label = original(runner, forward_batch)
    backend = runner.attn_backend
    if not isinstance(backend, ApeFlashInferBackend):
        return label
    batch = ape_batch(forward_batch.rids)
    return label if batch is None else _labelled(backend.variant_of(batch), label)


def around_capture_one_shape(
    original: Callable[..., None],
    runner: Any,
    size: int,
    forward: Any,
    stream_idx: int | None = None,
    variant_label: str | None = None,
) -> None:
    """AROUND hook on ``DecodeCudaGraphRunner.capture_one_shape``: capture for APE batches too."""

    def capture(variant: str | None) -> None:
        label = variant_label if variant is None else _labelled(variant, variant_label)
        original(runner, size, forward, stream_idx, label)

    backend = runner.attn_backend
    if isinstance(backend, ApeFlashInferBackend):
        backend.capture_all(capture)
    else:
        capture(None)


def _labelled(variant: str, label: str | None) -> str:
    return variant if label is None else f"{variant}-{label}"
