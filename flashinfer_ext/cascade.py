"""Two-level cascade attention over paged KV: the contexts as one group, beside each row's path."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper

from flashinfer_ext import variant
from flashinfer_ext.merge import launch_merge, launch_merge_states
from flashinfer_ext.rectangles import Heads, Kernel, RectangleLaunch
from flashinfer_ext.staging import staged
from flashinfer_ext.worklist import Groups

logger = logging.getLogger(__name__)

CONTEXTS, PATH, BIASED_CONTEXTS = 0, 1, 2
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

    With ``contexts_rows``, a row may stand in several groups of the contexts level, over different
    parts of its contexts (a cover by rectangles). Partial states of a row are merged first, so that
    S * T acts on the partition sum over all of its contexts.

    Contexts may have a bias (natural logarithm, at most 0 and at least -2e4): ``bias`` one for each
    token of the contexts level, added to its logits after the division by T; ``rows_bias``, with
    ``contexts_rows``, one for each place, added to the log-sum-exp of that row over that group.

    Args:
        float_workspace_buffer: uint8 on the GPU, 384 MB recommended; FlashInfer's split-KV results.
        kv_layout: ``"NHD"`` or ``"HND"``.
        use_cuda_graph: plan into fixed buffers, for batches of exactly ``batch_size`` rows with a
            path each; ``run`` may then be captured, and ``plan`` called again before a replay. Both
            levels run side by side there.
        batch_size: rows of the batch; only with ``use_cuda_graph``.
        paged_kv_indices_buffer: int32 on the GPU, as long as the longest ``paged_kv_indices``;
            only with ``use_cuda_graph``. Indices written to it before ``plan`` are not copied.
        rectangles: whether the captured ``run`` serves plans with ``contexts_rows``, or those
            without; only with ``use_cuda_graph``.
        bias_buffer: fp32 on the GPU, an entry for each token of ``paged_kv_indices_buffer``: the
            captured ``run`` serves plans with ``bias``, and no others; only with
            ``use_cuda_graph``, and not with ``rectangles``. A bias written to it before ``plan``
            is not copied.

    Source: APE paper (ICLR 2025), section 4.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        batch_size: int | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        rectangles: bool = False,
        bias_buffer: torch.Tensor | None = None,
    ) -> None:
        if use_cuda_graph and (batch_size is None or paged_kv_indices_buffer is None):
            raise ValueError("use_cuda_graph needs batch_size and paged_kv_indices_buffer")
        if bias_buffer is not None and (rectangles or not use_cuda_graph):
            raise ValueError("bias_buffer is for use_cuda_graph without rectangles")
        self._workspace = float_workspace_buffer
        self._device = float_workspace_buffer.device
        self._layout = kv_layout
        self._graph = (
            _GraphBuffers(batch_size, paged_kv_indices_buffer, rectangles, bias_buffer)
            if batch_size is not None and paged_kv_indices_buffer is not None
            else None
        )
        self._key: variant.ModuleKey | None = None
        self._module: Any = None  # None: FlashInfer's stock kernel
        self._bias: torch.Tensor | None = None
        self._levels: list[Any] = []
        self._side: torch.cuda.Stream | None = None
        self._rectangles: RectangleLaunch | None = None
        self._rectangles_for: dict[str, Any] = {}
        self._contexts_rows: torch.Tensor | None = None  # None: no virtual rows
        self._copied: torch.cuda.Event | None = None  # the work lists of the last plan

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
        contexts_rows: torch.Tensor | None = None,
        path_groups: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        rows_bias: torch.Tensor | None = None,
    ) -> None:
        """Prepare a batch; any number of ``run`` calls may follow, one a layer.

        Index pointers and lengths are best given on the CPU: they are read there, and a GPU tensor
        costs a synchronisation. Waits until the GPU has begun the ``run`` calls of the last plan,
        if it has not: FlashInfer copies its work list from one pinned buffer.

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
            contexts_rows: int32 on the CPU, (qo_indptr_arr[0][-1],): the row that stands at each
                place of the contexts level. A row may stand in any number of its groups, or in
                none; those of a row must not hold a page of its contexts twice. ``temperature``
                and ``scale`` are then for each row or for all, and the rows of one group have one
                T. Given in the very memory of the last call, the contexts level is kept as it was
                planned, with T, S and bias, and only the path is planned anew. Needs the attention
                module of this package. Default: row i at place i.
            path_groups: bool on the CPU, (groups of the contexts level,): those that belong to the
                paths of their rows, which lack these pages then. They are read without T, and S * T
                does not act on them. Only with ``contexts_rows``. Default: none.
            bias: fp32 on the GPU, natural logarithm: entry ``i * page_size + j`` is added to the
                logits of token j of the page at ``paged_kv_indices[i]``, for the pages of the
                contexts level. Read by ``run``, not copied but for a captured graph. Needs the
                module with a bias; not with ``contexts_rows``. Default: 0.
            rows_bias: fp32 on the CPU, like ``contexts_rows`` and only with it, natural logarithm:
                added to the log-sum-exp of the row at this place over its group. Default: 0.

        Raises:
            ValueError: lengths do not fit together, T or S is out of range, or rectangles are too
                many for a captured graph.
            RuntimeError: an attention module that is needed is neither prebuilt nor can be
                compiled here.
        """
        qo = [indptr.cpu() for indptr in qo_indptr_arr]
        kv = [indptr.cpu() for indptr in paged_kv_indptr_arr]
        last = [lens.cpu() for lens in paged_kv_last_page_len]
        _check_levels(qo, kv, last, contexts_rows)
        rows, groups = int(qo[PATH][-1]), len(qo[CONTEXTS]) - 1
        if path_groups is None:
            path_groups = torch.zeros(groups, dtype=torch.bool)
        elif contexts_rows is None or path_groups.shape != (groups,):
            raise ValueError(f"path_groups: {groups} are needed, and contexts_rows")
        settings = groups if contexts_rows is None else rows
        t = _as_floats("temperature", temperature, settings)
        s = _as_floats("scale", scale, settings)
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
        _check_bias(bias, int(kv[CONTEXTS][-1]) * page_size, rows_bias, contexts_rows)
        key = variant.ModuleKey(q_data_type, kv_data_type or q_data_type, head_dim)
        if self._graph is not None:
            self._check_graph(rows, len(qo[PATH]) - 1, key, contexts_rows is not None)
            bias = self._graph.with_bias(bias)
        if self._graph is not None and contexts_rows is None:
            if groups > rows:
                raise ValueError(f"{groups} groups of contexts in a CUDA graph of {rows} rows")
            # The number of groups is captured too.
            for lists in (qo, kv):
                lists[CONTEXTS] = _padded(lists[CONTEXTS], rows + 1, int(lists[CONTEXTS][-1]))
            last[CONTEXTS] = _padded(last[CONTEXTS], rows, 1)
            t, s = _padded(t, rows, 1), _padded(s, rows, 1)

        if key != self._key:
            self._key, self._module = key, temperature_module(key)
            self._levels = []
            self._rectangles = self._contexts_rows = None
        if bias is not None and self._module is None:
            raise RuntimeError(f"a bias needs the attention module {key.name}")
        self._rows, self._bias = rows, bias
        self._sm_scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        self._plan_arguments = dict(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim,
            page_size=page_size,
            q_data_type=key.q_dtype,
            kv_data_type=key.kv_dtype,
        )
        if self._copied is not None:  # the GPU may have to take the last lists from where these go
            self._copied.synchronize()
        if contexts_rows is None:
            self._contexts_rows = None
            self._plan_levels(qo, kv, indices, last, t, s)
        else:
            if rows_bias is None:
                rows_bias = torch.zeros(len(contexts_rows))
            self._plan_contexts_of_rows(contexts_rows, path_groups, rows_bias, qo, kv, last, t, s)
            self._indices = indices if self._graph is None else self._graph.indices
            self._plan_path(qo, kv, indices, last)
        self._record_copies()

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
        v_scale = 1.0 if v_scale is None else v_scale
        if self._contexts_rows is None and not self._has_contexts:
            s_path = self._run_path_alone(q, paged_kv_cache, scales, v_scale, out)
            return (out, s_path) if return_lse else out
        v_path, s_path, v, s = self._run_levels(q, paged_kv_cache, scales, out)
        lse = torch.empty_like(s_path) if return_lse else None
        to = self._exponents, out, lse, v_scale
        if self._contexts_rows is None:
            launch_merge(v_path, s_path, v, s, *to)
        else:
            assert self._rectangles is not None
            launch_merge_states(v_path, s_path, v, s, self._rectangles.state_lists, *to)
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
        self._make_levels()
        if self._has_contexts:
            level = self._contexts_level
            groups = qo[CONTEXTS], kv[CONTEXTS]
            self._plan_wrapper(level, *groups, indices, last[CONTEXTS], False)
        self._plan_path(qo, kv, indices, last)

    def _plan_path(
        self,
        qo: list[torch.Tensor],
        kv: list[torch.Tensor],
        indices: torch.Tensor,
        last: list[torch.Tensor],
    ) -> None:
        behind = kv[PATH] + kv[CONTEXTS][-1]
        self._plan_wrapper(self._levels[PATH], qo[PATH], behind, indices, last[PATH], True)

    def _plan_contexts_of_rows(
        self,
        contexts_rows: torch.Tensor,
        path_groups: torch.Tensor,
        rows_bias: torch.Tensor,
        qo: list[torch.Tensor],
        kv: list[torch.Tensor],
        last: list[torch.Tensor],
        t: torch.Tensor,
        s: torch.Tensor,
    ) -> None:
        """One launch over virtual rows, unless it is planned already."""
        if self._module is None:
            raise RuntimeError("contexts_rows needs the attention module of flashinfer_ext")
        self._make_levels()
        arguments = self._plan_arguments
        if self._rectangles is None or arguments != self._rectangles_for:
            self._rectangles, self._rectangles_for = self._make_rectangles(), arguments
            self._contexts_rows = None
        paths = len(qo[PATH]) - 1
        if _same_memory(contexts_rows, self._contexts_rows) and (
            self._rows == len(self._exponents) and paths == len(self._no_temperature)
        ):
            return
        given = qo[CONTEXTS], contexts_rows, kv[CONTEXTS], last[CONTEXTS], path_groups, rows_bias
        groups = Groups(*(x.numpy() for x in given))
        self._rectangles.plan(groups, 1 / _temperature_of(groups, t), self._rows)
        floats = self._on_device(torch.cat([s * t, torch.ones(paths)]))
        self._exponents, self._no_temperature = floats.split([self._rows, paths])
        self._contexts_rows = contexts_rows

    def _make_rectangles(self) -> RectangleLaunch:
        assert self._key is not None
        given = self._plan_arguments
        heads = Heads(given["num_qo_heads"], given["num_kv_heads"], given["head_dim_qk"])
        return RectangleLaunch(
            Kernel.best(self._key, heads, self._device),
            self._spaces()[CONTEXTS],
            self._layout,
            given["page_size"],
            captured_rows=None if self._graph is None else self._graph.rows,
        )

    def _check_graph(self, rows: int, paths: int, key: variant.ModuleKey, rectangles: bool) -> None:
        graph = self._graph
        assert graph is not None
        if not rows == paths == graph.rows:
            raise ValueError(f"a CUDA graph of {graph.rows} rows takes one path a row")
        if self._key not in (None, key):
            raise ValueError(f"a CUDA graph captured for {self._key} cannot run {key}")
        if rectangles != graph.rectangles:
            raise ValueError(
                "a CUDA graph captured with rectangles needs contexts_rows, one without takes none"
            )

    def _make_levels(self) -> None:
        """FlashInfer's wrappers, once, and none without need: each holds 8 MB on the GPU."""
        if not self._levels:
            if self._graph is not None:
                self._side = torch.cuda.Stream(self._device)
            contexts, path = self._spaces()
            graph = self._graph
            plain = graph is None or not (graph.rectangles or graph.bias is not None)
            self._levels = [self._wrapper(contexts) if plain else None, self._wrapper(path), None]
        if self._bias is not None and self._levels[BIASED_CONTEXTS] is None:
            self._levels[BIASED_CONTEXTS] = self._wrapper(self._spaces()[CONTEXTS], with_bias=True)

    def _record_copies(self) -> None:
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self._device))

    @property
    def _contexts_level(self) -> Any:
        return self._levels[CONTEXTS if self._bias is None else BIASED_CONTEXTS]

    def _spaces(self) -> list[torch.Tensor]:
        """Where each level writes its partial results.

        In a graph the path's launch runs beside the contexts': not to one place then.
        """
        return [self._workspace] * 2 if self._graph is None else list(self._workspace.chunk(2))

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
            qo_indptr=staged(qo_indptr),
            paged_kv_indptr=staged(kv_indptr),
            paged_kv_indices=indices,
            paged_kv_last_page_len=staged(last_page_len),
            causal=causal,
            **self._plan_arguments,
        )

    def _run_path_alone(
        self,
        q: torch.Tensor,
        kv_cache: Any,
        scales: _Scales,
        v_scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """No row has contexts: there is nothing to merge."""
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        v, lse = self._run_path(q, kv_cache, scales, out, lse)
        if v is not out or v_scale != 1.0:
            torch.mul(v, v_scale, out=out)
        return lse

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
        return self._call(level, q, kv_cache, [self._no_temperature], scales, True, out, lse)

    def _run_contexts(
        self, q: torch.Tensor, kv_cache: Any, scales: _Scales
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._contexts_rows is not None:
            assert self._rectangles is not None
            logits_scale = scales.sm_scale * scales.k_scale
            return self._rectangles.run(q, kv_cache, self._indices, logits_scale)
        if self._module is None:
            # The stock kernel has one softmax scale for all rows. Queries that are divided by T
            # instead are rounded once more to their own dtype.
            if self._one_temperature is not None:
                scales = scales._replace(sm_scale=scales.sm_scale / self._one_temperature)
            else:
                q = (q * self._inv_temperature_of_row.view(-1, 1, 1)).to(q.dtype)
        tensors = (
            [self._inv_temperature] if self._bias is None else [self._inv_temperature, self._bias]
        )
        out = torch.empty_like(q)  # FlashInfer would zero it
        return self._call(self._contexts_level, q, kv_cache, tensors, scales, False, out)

    def _call(
        self,
        wrapper: Any,
        q: torch.Tensor,
        kv_cache: Any,
        tensors: list[torch.Tensor],
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
        return wrapper.run(q, kv_cache, *tensors, logits_scale, out=out, lse=lse, return_lse=True)

    def _wrapper(
        self, workspace: torch.Tensor, with_bias: bool = False
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        buffers: dict[str, Any] = {} if self._graph is None else self._graph.arguments()
        key, module = self._key, self._module
        assert key is not None
        if with_bias:
            key = key._replace(with_bias=True)
            module = bias_module(key)
        if module is None:
            return BatchPrefillWithPagedKVCacheWrapper(
                workspace, self._layout, backend="fa2", **buffers
            )
        return variant.VariantAttentionWrapper(key, module, workspace, self._layout, **buffers)

    def _on_device(self, floats: torch.Tensor) -> torch.Tensor:
        if self._graph is None:
            return staged(floats).to(self._device, non_blocking=True)
        if self._graph.floats is None:
            self._graph.floats = floats.to(self._device)
        return self._graph.floats.copy_(staged(floats), non_blocking=True)


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


@functools.cache
def bias_module(key: variant.ModuleKey) -> Any:
    """The kernel with a bias for each token.

    Raises:
        RuntimeError: it cannot be had; no stock kernel does the same.
    """
    if not variant.is_available(key):
        raise RuntimeError(
            f"a bias needs the attention module {key.name}, which is neither prebuilt nor can be "
            "compiled here (no nvcc or no ninja); python -m flashinfer_ext.prebuild builds it "
            "elsewhere"
        )
    logger.info("loading the attention module %s", key.name)
    return variant.load_module(key)


class _Scales(NamedTuple):
    sm_scale: float
    k_scale: float


class _GraphBuffers:
    """What captured launches read: fixed addresses for a fixed number of rows."""

    def __init__(
        self, rows: int, indices: torch.Tensor, rectangles: bool, bias: torch.Tensor | None
    ) -> None:
        self.rows = rows
        self.indices = indices
        self.rectangles = rectangles
        self.bias = bias
        self.floats: torch.Tensor | None = None

    def with_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias where the captured launch reads it."""
        if (bias is None) != (self.bias is None):
            raise ValueError("a CUDA graph captured with a bias needs bias, one without takes none")
        if bias is not None and self.bias is not None and bias.data_ptr() != self.bias.data_ptr():
            self.bias[: len(bias)] = bias
        return self.bias

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


def _check_levels(
    qo: list[torch.Tensor],
    kv: list[torch.Tensor],
    last: list[torch.Tensor],
    contexts_rows: torch.Tensor | None,
) -> None:
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
    places, rows = int(qo[CONTEXTS][-1]), int(qo[PATH][-1])
    if contexts_rows is None:
        if places != rows:
            raise ValueError(f"the levels cover {places} and {rows} rows")
        return
    if contexts_rows.dtype != torch.int32 or contexts_rows.shape != (places,):
        raise ValueError(
            f"contexts_rows must be int32 of shape ({places},), got {contexts_rows.dtype} of "
            f"shape {tuple(contexts_rows.shape)}"
        )
    if places and not 0 <= int(contexts_rows.min()) <= int(contexts_rows.max()) < rows:
        raise ValueError(f"contexts_rows must be rows of the batch, 0 to {rows - 1}")


def _check_bias(
    bias: torch.Tensor | None,
    tokens: int,
    rows_bias: torch.Tensor | None,
    contexts_rows: torch.Tensor | None,
) -> None:
    if bias is not None:
        if contexts_rows is not None:
            raise ValueError("bias is for plans without contexts_rows, which have rows_bias")
        if bias.dtype != torch.float32 or bias.dim() != 1 or len(bias) < tokens:
            raise ValueError(
                f"bias must be fp32 of {tokens} tokens, got {bias.dtype} of shape "
                f"{tuple(bias.shape)}"
            )
    if rows_bias is not None:
        if contexts_rows is None:
            raise ValueError("rows_bias is for plans with contexts_rows")
        if rows_bias.dtype != torch.float32 or rows_bias.shape != contexts_rows.shape:
            raise ValueError(
                f"rows_bias must be fp32 of shape {tuple(contexts_rows.shape)}, got "
                f"{rows_bias.dtype} of shape {tuple(rows_bias.shape)}"
            )


def _as_floats(name: str, value: Floats, count: int) -> torch.Tensor:
    """fp32 on the CPU, one for each group of the contexts level, or for each row."""
    values = torch.as_tensor(value, dtype=torch.float32).cpu()
    if values.dim() > 1 or (values.dim() == 1 and len(values) != count):
        shape = tuple(values.shape)
        raise ValueError(f"{name}: {shape} values, 1 or {count} are needed")
    return values.expand(count)


def _temperature_of(groups: Groups, t: torch.Tensor) -> torch.Tensor:
    """Of each group, from (rows,) temperatures; 1 for groups of the path.

    Raises:
        ValueError: the rows of a group differ.
    """
    lens = torch.from_numpy(np.diff(groups.qo_indptr))
    of_place = t[torch.from_numpy(groups.rows).long()]
    in_path = torch.from_numpy(groups.in_path)
    of_place = of_place.masked_fill(in_path.repeat_interleave(lens), 1.0)
    of_group = torch.ones(len(lens))
    of_group[lens > 0] = of_place[torch.from_numpy(groups.qo_indptr[:-1]).long()[lens > 0]]
    if not torch.equal(of_group.repeat_interleave(lens), of_place):
        raise ValueError("temperature: the rows of one group of the contexts level have one")
    return of_group


def _same_memory(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _padded(values: torch.Tensor, size: int, with_value: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)), value=with_value)


def _one_value(values: torch.Tensor) -> float | None:
    """The value that all have, if there is one."""
    if len(values) and bool((values == values[0]).all()):
        return float(values[0])
    return None
