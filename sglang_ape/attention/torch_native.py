"""APE on SGLang's ``torch_native`` backend: any device, meant for CPU and for tests.

Source: ``layers/attention/torch_native_backend.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from flashinfer_ext.reference import attention_state, context_lse, merge_state_scaled
from sglang_ape.attention.batch import ApeBatch, ape_batch
from sglang_ape.attention.mass import Measured, finished, measured_rows, most_held
from sglang_ape.attention.plan import RowRange, plan_request
from sglang_ape.spec import ApeSpec


class _PathWork(NamedTuple):
    rows: slice  # of the batch's new tokens
    slots: torch.Tensor  # (kv_len,) KV slots in the order of the path


class _Work(NamedTuple):
    """One request's share of a forward pass."""

    spec: ApeSpec | None  # None: a plain request, left to the stock code
    rows: slice
    paths: list[_PathWork]
    query_rows: slice | None
    context_slots: torch.Tensor | None
    bias: torch.Tensor | None = None  # (slots,) fp32, natural log; None for 0
    measured: Measured | None = None


class ApeTorchNativeBackend(TorchNativeAttnBackend):
    """Batches without an APE request, and plain requests beside one, take the stock code."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._work: list[_Work] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        finished.begin_pass()
        batch = ape_batch(forward_batch.rids)
        self._work = None if batch is None else self._plan(forward_batch, batch)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._work is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._work is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _plan(self, forward_batch: Any, batch: ApeBatch) -> list[_Work]:
        """Resolve row ranges to KV slots once a step; every layer reuses them."""
        stops = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode():
            lens = [1] * len(stops)
        else:
            lens = forward_batch.extend_seq_lens_cpu
        work, offset = [], 0
        table = self.req_to_token_pool.req_to_token
        indices = forward_batch.req_pool_indices.tolist()
        masses = batch.masses or [None] * len(stops)
        most = most_held(masses)
        for i, (spec, stop, length) in enumerate(zip(batch.specs, stops, lens, strict=True)):
            start = stop - length
            rid = forward_batch.rids[i]
            measured = measured_rows(rid, spec, masses[i], start, stop, offset, most)
            of_request = _request_work(table[indices[i]], spec, start, stop, offset)
            work.append(of_request._replace(measured=measured))
            offset += length
        return work

    def _forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty((q.shape[0], layer.tp_q_head_num, layer.v_head_dim))
        for i, work in enumerate(self._work or ()):
            if work.spec is None:
                self._stock(q, out, layer, forward_batch, i, work.rows)
            else:
                self._attend(q, out, layer, work, work.spec)
        return out.view(q.shape[0], -1)

    def _attend(
        self, q: torch.Tensor, out: torch.Tensor, layer: Any, work: _Work, spec: ApeSpec
    ) -> None:
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        scale, lses = layer.scaling, []
        for rows, slots in work.paths:
            state, lse = attention_state(q[rows], keys[slots], values[slots], scale, causal=True)
            out[rows] = state
            lses.append(lse)
        if work.measured is not None:
            indptr = torch.from_numpy(spec.context_indptr)
            given = dict(indices=work.context_slots, indptr=indptr, sm_scale=scale)
            of_contexts = partial(context_lse, k_cache=keys, **given)
            own = q[work.measured.rows]
            own_lse = torch.cat(lses)[-len(own) :]
            work.measured.add(layer.layer_id, own, own_lse, of_contexts)
        if work.query_rows is None:
            return
        # The query's path is the last one: ``state`` and ``lse`` are its own, still in fp32.
        slots, rows = work.context_slots, work.query_rows
        contexts, contexts_lse = attention_state(
            q[rows],
            keys[slots],
            values[slots],
            scale / spec.temperature,
            causal=False,
            bias=work.bias,
        )
        exponent = spec.scale * spec.temperature
        out[rows], _ = merge_state_scaled(state, lse, contexts, contexts_lse, exponent)

    def _stock(
        self, q: torch.Tensor, out: torch.Tensor, layer: Any, batch: Any, i: int, rows: slice
    ) -> None:
        """SGLang's own attention for request ``i`` of a mixed batch."""
        one = slice(i, i + 1)
        shared = dict(
            query=q[rows],
            output=out[rows],
            k_cache=self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            v_cache=self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            req_to_token=self.req_to_token_pool.req_to_token,
            req_pool_indices=batch.req_pool_indices[one],
            seq_lens=batch.seq_lens[one],
            scaling=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
        )
        if batch.forward_mode.is_decode():
            self._run_sdpa_forward_decode(**shared, causal=False)
            return
        self._run_sdpa_forward_extend(
            **shared,
            extend_prefix_lens=batch.extend_prefix_lens[one],
            extend_seq_lens=batch.extend_seq_lens[one],
            causal=True,
        )


def _request_work(
    row: torch.Tensor, spec: ApeSpec | None, start: int, stop: int, offset: int
) -> _Work:
    """Slots of one request; ``row`` is its line of the page table, ``offset`` its first token."""

    def tokens(rows: RowRange) -> slice:
        return slice(rows[0] - start + offset, rows[1] - start + offset)

    if spec is None:
        return _Work(None, tokens((start, stop)), [], None, None)
    plan = plan_request(spec, start, stop)
    row = row[:stop].long()
    paths = [
        _PathWork(tokens(path.rows), torch.cat([row[a:b] for a, b in path.kv]))
        for path in plan.paths
    ]
    return _Work(
        spec=spec,
        rows=tokens((start, stop)),
        paths=paths,
        query_rows=tokens(plan.query_rows) if plan.query_rows else None,
        context_slots=row[plan.contexts[0] : plan.contexts[1]],
        bias=_bias_of_slots(spec, row.device),
    )


def _bias_of_slots(spec: ApeSpec, device: torch.device) -> torch.Tensor | None:
    if not spec.bias:
        return None
    lens = torch.tensor(spec.context_lens)
    return torch.tensor(spec.bias, dtype=torch.float32).repeat_interleave(lens).to(device)
