"""Two-level cascade attention over paged KV: the contexts as one group, beside each row's path."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper

from flashinfer_ext import variant
from flashinfer_ext.merge import launch_merge

logger = logging.getLogger(__name__)

CONTEXTS, PATH = 0, 1
Floats: TypeAlias = torch.Tensor | Sequence[float] | float


class ApeCascadeAttentionWrapper:
    """Attention of a ragged batch of rows over two levels of paged KV.

    The *contexts* level is not causal: a group of query rows sees a set of pages as a whole, with
    the softmax scale divided by the group's temperature T. The *path* level is causal (bottom-right
    aligned) with the plain softmax scale. The two states are merged after the partition sum of the
    contexts level was raised to the power S * T; rows whose contexts are empty keep the state of
    their path untouched. With T = S = 1 the result is one softmax over both levels.

    ``plan`` and ``run`` follow ``flashinfer.MultiLevelCascadeAttentionWrapper``
    (``flashinfer/cascade.py``): level 0 is the contexts, level 1 the path. Rows of several requests
    that read the same contexts can be one group of level 0, which reads them once for all.

    Args:
        float_workspace_buffer: uint8 on the GPU, 384 MB recommended; FlashInfer's split-KV results.
        kv_layout: ``"NHD"`` or ``"HND"``.
        use_cuda_graph: plan into fixed buffers, for batches of exactly ``batch_size`` rows with a
            path each; ``run`` may then be captured, and ``plan`` called again before a replay. Both
            levels run side by side there.
        batch_size: rows of the batch; only with ``use_cuda_graph``.
        paged_kv_indices_buffer: int32 on the GPU, as long as the longest ``paged_kv_indices``;
            only with ``use_cuda_graph``. Indices written to it before ``plan`` are not copied.

    Source: APE paper (ICLR 2025), section 4.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        batch_size: int | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
    ) -> None:
        if use_cuda_graph and (batch_size is None or paged_kv_indices_buffer is None):
            raise ValueError("use_cuda_graph needs batch_size and paged_kv_indices_buffer")
        self._workspace = float_workspace_buffer
        self._device = float_workspace_buffer.device
        self._layout = kv_layout
        self._graph = (
            _GraphBuffers(batch_size, paged_kv_indices_buffer)
            if batch_size is not None and paged_kv_indices_buffer is not None
            else None
        )
        self._key: variant.ModuleKey | None = None
        self._module: Any = None  # None: FlashInfer's stock kernel
        self._levels: list[BatchPrefillWithPagedKVCacheWrapper] = []
        self._side: torch.cuda.Stream | None = None

    def plan(
        self,
        qo_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indices: Sequence[torch.Tensor] | torch.Tensor,
        paged_kv_last_page_len: Sequence[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        temperature: Floats,
        scale: Floats,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        """Prepare a batch; any number of ``run`` calls may follow, one a layer.

        Index pointers and lengths are best given on the CPU: they are read there, and a GPU tensor
        costs a synchronisation. Without one, the next ``plan`` has to wait until the GPU has begun
        the ``run`` calls of this one: FlashInfer copies its work list from one pinned buffer.

        Args:
            qo_indptr_arr: for each level int32 (groups + 1,): group i of the level holds the rows
                ``indptr[i]`` to ``indptr[i + 1]``. Both levels cover the same rows; rows without
                contexts stand in a group with no pages.
            paged_kv_indptr_arr: for each level int32 (groups + 1,), into the level's page indices.
            paged_kv_indices: for each level int32 page indices on the GPU; or one tensor that holds
                those of the contexts and behind them those of the path.
            paged_kv_last_page_len: for each level int32 (groups,), tokens in a group's last page; 1
                for a group without pages.
            num_qo_heads: query heads, a multiple of ``num_kv_heads``.
            num_kv_heads: KV heads.
            head_dim: 64, 128 or 256.
            page_size: tokens of a page.
            temperature: T > 0, for each group of the contexts level or for all of them.
            scale: S >= 0, likewise.
            sm_scale: softmax scale, default ``1 / sqrt(head_dim)``.
            q_data_type: float16 or bfloat16; also of the output.
            kv_data_type: default ``q_data_type``; float8_e4m3fn and float8_e5m2 are possible.

        Raises:
            ValueError: lengths do not fit together, or T or S is out of range.
        """
        qo = [indptr.cpu() for indptr in qo_indptr_arr]
        kv = [indptr.cpu() for indptr in paged_kv_indptr_arr]
        last = [lens.cpu() for lens in paged_kv_last_page_len]
        _check_levels(qo, kv, last)
        rows, groups = int(qo[PATH][-1]), len(qo[CONTEXTS]) - 1
        t = _per_group("temperature", temperature, groups)
        s = _per_group("scale", scale, groups)
        if not bool((t > 0).all()) or not bool((s >= 0).all()):
            raise ValueError("temperature must be > 0 and scale >= 0")
        indices = (
            paged_kv_indices
            if isinstance(paged_kv_indices, torch.Tensor)
            else torch.cat(list(paged_kv_indices))
        )
        pages = int(kv[CONTEXTS][-1] + kv[PATH][-1])
        if len(indices) < pages:
            raise ValueError(f"paged_kv_indices holds {len(indices)} of {pages} pages")
        key = variant.ModuleKey(q_data_type, kv_data_type or q_data_type, head_dim)
        if self._graph is not None:
            if not groups <= rows == len(qo[PATH]) - 1 == self._graph.rows:
                raise ValueError(f"a CUDA graph of {self._graph.rows} rows takes one path a row")
            if self._key not in (None, key):
                raise ValueError(f"a CUDA graph captured for {self._key} cannot run {key}")
            # The number of groups is captured too.
            for lists in (qo, kv):
                lists[CONTEXTS] = _padded(lists[CONTEXTS], rows + 1, int(lists[CONTEXTS][-1]))
            last[CONTEXTS] = _padded(last[CONTEXTS], rows, 1)
            t, s = _padded(t, rows, 1), _padded(s, rows, 1)

        if key != self._key:
            self._key, self._module = key, temperature_module(key)
            self._levels = []
        self._rows = rows
        self._sm_scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        self._plan_arguments = dict(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            page_size=page_size,
            q_data_type=key.q_dtype,
            kv_data_type=key.kv_dtype,
        )
        self._plan_levels(qo, kv, indices, last, t, s)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
        sm_scale: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned rows.

        Args:
            q: (rows, num_qo_heads, head_dim).
            paged_kv_cache: as FlashInfer takes it: (pages, 2, page_size, num_kv_heads, head_dim),
                or a pair of key and value caches; with heads and tokens swapped for ``"HND"``.
            k_scale: factor of stored keys (FP8), default 1.
            v_scale: factor of stored values, default 1.
            out: like ``q``; gets the output if given.
            return_lse: return the merged log-sum-exp too.
            sm_scale: replaces the one given to ``plan``.

        Returns:
            Output like ``q``; with ``return_lse`` also the base-2 log-sum-exp, fp32 of shape (rows,
            num_qo_heads): ``log2(2^L_path + 2^(S T L_contexts))``.
        """
        if self._key is None:
            raise RuntimeError("plan() has to be called before run()")
        if out is None:
            out = torch.empty_like(q)
        scales = _Scales(
            self._sm_scale if sm_scale is None else sm_scale, 1.0 if k_scale is None else k_scale
        )
        v_path, s_path, v_contexts, s_contexts = self._run_levels(q, paged_kv_cache, scales, out)
        lse = torch.empty_like(s_path) if return_lse else None
        launch_merge(
            v_path,
            s_path,
            v_contexts,
            s_contexts,
            self._exponents,
            out,
            lse,
            1.0 if v_scale is None else v_scale,
        )
        return out if lse is None else (out, lse)

    def _plan_levels(
        self,
        qo: list[torch.Tensor],
        kv: list[torch.Tensor],
        indices: torch.Tensor,
        last: list[torch.Tensor],
        t: torch.Tensor,
        s: torch.Tensor,
    ) -> None:
        """One launch a level; the contexts' is left out when no row has any."""
        lens = qo[CONTEXTS].diff()
        floats = [1 / t, (s * t).repeat_interleave(lens), (1 / t).repeat_interleave(lens)]
        sizes = [len(part) for part in floats] + [len(qo[PATH]) - 1]
        (
            self._inv_temperature,
            self._exponents,
            self._inv_temperature_of_row,
            self._no_temperature,
        ) = self._on_device(torch.cat([*floats, torch.ones(sizes[-1])])).split(sizes)
        # What a graph has captured has to serve every later batch.
        self._has_contexts = self._graph is not None or int(kv[CONTEXTS][-1]) > 0
        self._one_temperature = (
            _one_value(t[kv[CONTEXTS].diff() > 0]) if self._graph is None else None
        )
        if not self._levels:
            self._levels = self._make_levels()
        if self._has_contexts:
            self._plan_wrapper(
                self._levels[CONTEXTS], qo[CONTEXTS], kv[CONTEXTS], indices, last[CONTEXTS], False
            )
        behind = kv[PATH] + kv[CONTEXTS][-1]
        self._plan_wrapper(self._levels[PATH], qo[PATH], behind, indices, last[PATH], True)

    def _make_levels(self) -> list[BatchPrefillWithPagedKVCacheWrapper]:
        """In a graph the path's launch runs beside the contexts'.

        They must not write their partial results to one place then.
        """
        spaces = [self._workspace] * 2
        if self._graph is not None:
            self._side = torch.cuda.Stream(self._device)
            spaces = list(self._workspace.chunk(2))
        return [self._wrapper(space) for space in spaces]

    def _plan_wrapper(
        self,
        wrapper: BatchPrefillWithPagedKVCacheWrapper,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        causal: bool,
    ) -> None:
        if self._graph is not None and indices.data_ptr() == self._graph.indices.data_ptr():
            indices = indices[:0]  # in place already, nothing to copy
        wrapper.plan(
            qo_indptr=_staged(qo_indptr),
            paged_kv_indptr=_staged(kv_indptr),
            paged_kv_indices=indices,
            paged_kv_last_page_len=_staged(last_page_len),
            causal=causal,
            **self._plan_arguments,
        )

    def _run_levels(
        self, q: torch.Tensor, kv_cache: Any, scales: _Scales, out: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        if self._side is None:
            path = self._run_path(q, kv_cache, scales, out, lse)
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                path = self._run_path(q, kv_cache, scales, out, lse)
        contexts = self._run_contexts(q, kv_cache, scales)
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return *path, *contexts

    def _run_path(
        self, q: torch.Tensor, kv_cache: Any, scales: _Scales, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        level = self._levels[PATH]
        return self._call(level, q, kv_cache, self._no_temperature, scales, True, out, lse)

    def _run_contexts(
        self, q: torch.Tensor, kv_cache: Any, scales: _Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._has_contexts:
            return q, q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
        if self._module is None:
            # The stock kernel has one softmax scale for all rows. Queries that are divided by T
            # instead are rounded once more to their own dtype.
            if self._one_temperature is not None:
                scales = scales._replace(sm_scale=scales.sm_scale / self._one_temperature)
            else:
                q = (q * self._inv_temperature_of_row.view(-1, 1, 1)).to(q.dtype)
        level, out = self._levels[CONTEXTS], torch.empty_like(q)  # FlashInfer would zero it
        return self._call(level, q, kv_cache, self._inv_temperature, scales, False, out)

    def _call(
        self,
        wrapper: Any,
        q: torch.Tensor,
        kv_cache: Any,
        inv_temperature: torch.Tensor,
        scales: _Scales,
        causal: bool,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._module is None:
            return wrapper.forward_return_lse(
                q, kv_cache, causal=causal, sm_scale=scales.sm_scale, k_scale=scales.k_scale
            )
        logits_scale = scales.sm_scale * scales.k_scale
        return wrapper.run(
            q, kv_cache, inv_temperature, logits_scale, out=out, lse=lse, return_lse=True
        )

    def _wrapper(self, workspace: torch.Tensor) -> BatchPrefillWithPagedKVCacheWrapper:
        buffers: dict[str, Any] = {} if self._graph is None else self._graph.arguments()
        if self._module is None:
            return BatchPrefillWithPagedKVCacheWrapper(
                workspace, self._layout, backend="fa2", **buffers
            )
        return variant.TemperatureAttentionWrapper(self._module, workspace, self._layout, **buffers)

    def _on_device(self, floats: torch.Tensor) -> torch.Tensor:
        if self._graph is None:
            return _staged(floats).to(self._device, non_blocking=True)
        if self._graph.floats is None:
            self._graph.floats = floats.to(self._device)
        return self._graph.floats.copy_(_staged(floats), non_blocking=True)


@functools.cache
def temperature_module(key: variant.ModuleKey) -> Any:
    """The kernel with a temperature for each request, or None where only stock kernels can run.

    Without it, FlashInfer's stock kernel is used: with T in its softmax scale while all rows share
    one T, else with queries divided by T, which rounds them once more.
    """
    if variant.is_available(key):
        logger.info("loading the attention module %s", key.name)
        return variant.load_module(key)
    logger.warning(
        "attention module %s is neither prebuilt nor can be compiled here (no nvcc or no ninja): "
        "using FlashInfer's stock kernel; python -m flashinfer_ext.prebuild builds it elsewhere",
        key.name,
    )
    return None


class _Scales(NamedTuple):
    sm_scale: float
    k_scale: float


class _GraphBuffers:
    """What captured launches read: fixed addresses for a fixed number of rows."""

    def __init__(self, rows: int, indices: torch.Tensor) -> None:
        self.rows = rows
        self.indices = indices
        self.floats: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Buffers of one of FlashInfer's wrappers, with as many groups as rows."""
        indptr = torch.zeros(self.rows + 1, dtype=torch.int32, device=self.indices.device)
        return dict(
            use_cuda_graph=True,
            qo_indptr_buf=indptr,
            paged_kv_indptr_buf=indptr.clone(),
            paged_kv_indices_buf=self.indices,
            paged_kv_last_page_len_buf=indptr[1:].clone(),
        )


def _check_levels(qo: list[torch.Tensor], kv: list[torch.Tensor], last: list[torch.Tensor]) -> None:
    if not len(qo) == len(kv) == len(last) == 2:
        raise ValueError("two levels are needed: the contexts, then the path")
    for name, q, k, n in zip(("contexts", "path"), qo, kv, last, strict=True):
        if not len(q) == len(k) == len(n) + 1:
            raise ValueError(
                f"{name}: qo_indptr, paged_kv_indptr and paged_kv_last_page_len are for "
                f"{len(q) - 1}, {len(k) - 1} and {len(n)} groups"
            )
        for indptr in (q, k):
            if int(indptr[0]) != 0 or bool((indptr.diff() < 0).any()):
                raise ValueError(f"{name}: an indptr does not start at 0 or decreases")
    if qo[CONTEXTS][-1] != qo[PATH][-1]:
        raise ValueError(f"the levels cover {int(qo[CONTEXTS][-1])} and {int(qo[PATH][-1])} rows")


def _per_group(name: str, value: Floats, groups: int) -> torch.Tensor:
    """fp32 on the CPU, one for each group of the contexts level."""
    values = torch.as_tensor(value, dtype=torch.float32).cpu()
    if values.dim() > 1 or (values.dim() == 1 and len(values) != groups):
        shape = tuple(values.shape)
        raise ValueError(f"{name}: {shape} values for {groups} groups of the contexts level")
    return values.expand(groups)


def _padded(values: torch.Tensor, size: int, with_value: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)), value=with_value)


def _one_value(values: torch.Tensor) -> float | None:
    """The value that all have, if there is one."""
    if len(values) and bool((values == values[0]).all()):
        return float(values[0])
    return None


def _staged(host: torch.Tensor) -> torch.Tensor:
    """Ready for a copy to the GPU that does not wait for what runs there.

    CUDA stages up to 64 KB of ordinary memory by itself; more has to be pinned.
    """
    host = host.contiguous()
    return host if host.nbytes <= 65536 else host.pin_memory()
