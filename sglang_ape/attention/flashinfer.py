"""APE on SGLang's FlashInfer backend: two-level cascade attention, with CUDA graphs for decoding.

Source: ``layers/attention/flashinfer_backend.py`` and
``model_executor/runner/decode_cuda_graph_runner.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashinfer_ext.cascade import ApeCascadeAttentionWrapper, temperature_module
from flashinfer_ext.gather import gather_kv_indices
from flashinfer_ext.variant import ModuleKey
from sglang_ape.attention.batch import ApeBatch, ape_batch, ape_batch_of_size
from sglang_ape.attention.levels import Levels, decode_levels, extend_levels
from sglang_ape.spec import ApeSpec

logger = logging.getLogger(__name__)

GRAPH_VARIANT = "ape"


class ApeFlashInferBackend(FlashInferAttnBackend):
    """Batches without an APE request take the stock code and the stock CUDA graphs.

    In a batch with one, all rows go through the cascade; plain rows are rows without contexts.
    Decode steps are captured a second time for such batches, under graph keys of their own.
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
        self._eager = ApeCascadeAttentionWrapper(self.workspace_buffer)
        self._graphs: dict[int, ApeCascadeAttentionWrapper] = {}
        self._capturing = False
        self._active: ApeCascadeAttentionWrapper | None = None  # None: the stock code's turn
        self._warm_up()

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

    def init_forward_metadata(self, forward_batch: Any) -> None:
        batch = ape_batch(forward_batch.rids)
        if batch is None:
            self._active = None
            super().init_forward_metadata(forward_batch)
            return
        stops = forward_batch.seq_lens_cpu
        if forward_batch.forward_mode.is_decode():
            levels = decode_levels(batch.specs, stops.numpy(), batch.context_sets)
        else:
            starts = forward_batch.extend_prefix_lens_cpu
            levels = extend_levels(batch.specs, starts, stops.tolist())
        self._plan(self._eager, levels, forward_batch.req_pool_indices)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        batch = self._batch_of_graph(forward_batch, in_capture)
        if batch is None:
            self._active = None
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        bs = forward_batch.batch_size
        indices = self.cuda_graph_kv_indices[0]
        if in_capture:
            self._graphs[bs] = ApeCascadeAttentionWrapper(
                self.workspace_buffer,
                use_cuda_graph=True,
                batch_size=bs,
                paged_kv_indices_buffer=indices,
            )
        seq_lens = forward_batch.seq_lens_cpu[:bs].numpy()
        levels = decode_levels(batch.specs, seq_lens, batch.context_sets)
        self._plan(self._graphs[bs], levels, forward_batch.req_pool_indices[:bs], indices)

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

    def capture_twice(self, capture: Callable[[], None], capture_ape: Callable[[], None]) -> None:
        """Capture one batch size on the stock path, then on the cascade."""
        capture()
        self._capturing = True
        try:
            capture_ape()
        finally:
            self._capturing = False

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
    ) -> None:
        device = self.workspace_buffer.device
        if indices is None:
            size = int(levels.segment_indptr[-1])
            indices = torch.empty(size, dtype=torch.int32, device=device)
        parts = levels.segment_row, levels.segment_start, levels.segment_indptr
        packed = torch.from_numpy(np.concatenate(parts)).pin_memory()
        row, start, indptr = packed.to(device, non_blocking=True).split([len(p) for p in parts])
        longest = int(np.diff(levels.segment_indptr).max())
        table = self.req_to_token_pool.req_to_token
        gather_kv_indices(table, req_pool_indices, row, start, indptr, longest, indices)
        wrapper.plan(
            [torch.from_numpy(indptr) for indptr in levels.qo_indptr],
            [torch.from_numpy(indptr) for indptr in levels.kv_indptr],
            indices,
            [torch.ones(len(indptr) - 1, dtype=torch.int32) for indptr in levels.kv_indptr],
            temperature=torch.from_numpy(levels.temperature),
            scale=torch.from_numpy(levels.scale),
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
        out = wrapper.run(
            q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim),
            pool.get_kv_buffer(layer.layer_id),
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
            sm_scale=layer.scaling,
        )
        assert isinstance(out, torch.Tensor)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _warm_up(self) -> None:
        """Compile or load every kernel now rather than at the first request."""
        arguments = self._plan_arguments
        key = ModuleKey(arguments["q_data_type"], arguments["kv_data_type"], arguments["head_dim"])
        logger.info("preparing %s (compiled on first use, which takes minutes)", key.name)
        begin = time.perf_counter()
        custom = temperature_module(key) is not None
        spec = ApeSpec(1, (2, 2), 0.9, 0.9, "warm-up")
        line = torch.zeros(1, dtype=torch.int64, device=self.workspace_buffer.device)
        shape = (3, arguments["num_qo_heads"], arguments["head_dim"])
        q = torch.zeros(shape, dtype=arguments["q_data_type"], device=line.device)
        kv = self.token_to_kv_pool.get_kv_buffer(self.token_to_kv_pool.start_layer)
        for levels in (
            extend_levels([spec], [4], [7]),  # a context's last row and two of the query
            decode_levels([spec], np.array([6]), ["warm-up"]),
        ):
            self._plan(self._eager, levels, line)
            self._eager.run(q[: levels.qo_indptr[0][-1]], kv)
        torch.cuda.synchronize()
        self._active = None
        kernel = key.name if custom else "FlashInfer's stock kernel"
        logger.info("attention of APE: %s, ready in %.1f s", kernel, time.perf_counter() - begin)


def around_resolve_lora_variant(
    original: Callable[..., Any], runner: Any, forward_batch: Any
) -> Any:
    """AROUND hook on ``DecodeCudaGraphRunner._resolve_lora_variant``: pick the APE graphs."""
    label = original(runner, forward_batch)
    if not isinstance(runner.attn_backend, ApeFlashInferBackend):
        return label
    return label if ape_batch(forward_batch.rids) is None else _ape_variant(label)


def around_capture_one_shape(
    original: Callable[..., None],
    runner: Any,
    size: int,
    forward: Any,
    stream_idx: int | None = None,
    variant_label: str | None = None,
) -> None:
    """AROUND hook on ``DecodeCudaGraphRunner.capture_one_shape``: capture for APE batches too."""

    def capture(label: str | None) -> None:
        original(runner, size, forward, stream_idx, label)

    backend = runner.attn_backend
    if isinstance(backend, ApeFlashInferBackend):
        ape = _ape_variant(variant_label)
        backend.capture_twice(lambda: capture(variant_label), lambda: capture(ape))
    else:
        capture(variant_label)


def _ape_variant(label: str | None) -> str:
    return GRAPH_VARIANT if label is None else f"{GRAPH_VARIANT}-{label}"
