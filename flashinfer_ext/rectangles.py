"""The contexts level over rectangles: gathered queries, one attention launch, partial states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from flashinfer.utils import MaskMode, TensorLayout, _unpack_paged_kv_cache, device_support_pdl

from flashinfer_ext.gather import gather_rows
from flashinfer_ext.worklist import (
    Groups,
    Shape,
    WorkList,
    WorkSizes,
    captured_sizes,
    make_work_list,
    smallest_tile,
)

_WHOLE_GROUP = 1 << 30  # chunk length, which must not be 0; not used without split KV


class Heads(NamedTuple):
    qo: int
    kv: int
    dim: int


class _Ints(NamedTuple):
    """The lists of a launch on the GPU, int32 views of one buffer in this order."""

    query_row: torch.Tensor
    item_group: torch.Tensor
    item_tile: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    last_page_len: torch.Tensor
    state_start: torch.Tensor
    state_indptr: torch.Tensor
    state_index: torch.Tensor
    no_kv_tile: torch.Tensor  # (items,) zeros
    queries: torch.Tensor  # (1,) how many there are
    chunk: torch.Tensor  # (1,)


class RectangleLaunch:
    """Plans and runs rectangles with the attention module of this package.

    Args:
        module: of :func:`flashinfer_ext.variant.load_module`.
        space: uint8 on the GPU; a captured launch keeps its queries and states there.
        layout: ``"NHD"`` or ``"HND"``.
        heads: of the model.
        page_size: tokens of a page.
        dtype: of queries and outputs.
        captured_rows: rows of the batch of a CUDA graph, None where launches are eager.
    """

    def __init__(
        self,
        module: Any,
        space: torch.Tensor,
        layout: str,
        heads: Heads,
        page_size: int,
        dtype: torch.dtype,
        captured_rows: int | None,
    ) -> None:
        self._module = module
        self._space = space
        self._layout = layout
        self._heads = heads
        self._page_size = page_size
        self._dtype = dtype
        self._slots = blocks_at_once(space.device, heads.kv)
        self._sizes: WorkSizes | None = None
        if captured_rows is not None:
            shape = self._shape(captured_rows)
            self._sizes = captured_sizes(shape, heads.dim, heads.qo, dtype.itemsize, len(space))
        self._buffer: torch.Tensor | None = None
        self._inv_temperature: torch.Tensor | None = None

    @property
    def state_lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of each row: ``indptr`` (rows + 1,) and ``index``, both int32."""
        return self._ints.state_indptr, self._ints.state_index

    def plan(self, groups: Groups, inv_temperature: torch.Tensor, rows: int) -> None:
        """Lay out the work and send it to the GPU.

        Args:
            groups: the rectangles.
            inv_temperature: (groups,) fp32 on the CPU.
            rows: of the batch.

        Raises:
            ValueError: the rectangles do not fit the captured launch.
        """
        shape, sizes = self._shape(rows), self._sizes
        longest = int(np.diff(groups.qo_indptr).max(initial=0))
        tile = smallest_tile(longest * shape.group_size, self._heads.dim)
        work = make_work_list(groups, shape, sizes.tile if sizes else tile, sizes)
        self._states = max(len(work.query_row), work.states) if sizes is None else sizes.states
        queries = len(work.query_row)
        if sizes is not None:
            work = work.padded(sizes)
        self._send(work, queries)
        some = torch.nn.functional.pad(inv_temperature, (0, 1), value=1.0)  # even of no group
        floats = some[torch.from_numpy(work.rectangle).long()]
        self._inv_temperature = self._on_device(floats, self._inv_temperature)

    def run(
        self, q: torch.Tensor, kv_cache: Any, indices: torch.Tensor, logits_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial states of all virtual rows.

        Args:
            q: (rows, num_qo_heads, head_dim).
            kv_cache: as FlashInfer takes it.
            indices: int32 page indices that ``kv_indptr`` of the plan points into.
            logits_scale: softmax scale, times the factor of stored keys.

        Returns:
            ``(v, s)``: (states, num_qo_heads, head_dim) like ``q``, and fp32 (states,
            num_qo_heads), base-2 log-sum-exp; rows behind the planned states are undefined.
        """
        queries, v, s = self._state_buffers()
        ints = self._ints
        if len(ints.item_group) == 0:
            return v, s
        gather_rows(q, ints.query_row, ints.queries, queries)
        keys, values = _unpack_paged_kv_cache(kv_cache, self._layout)
        self._module.paged_run(
            self._space,
            self._buffer,
            self._plan_info,
            queries,
            keys,
            values,
            ints.qo_indptr,
            ints.kv_indptr,
            indices,
            ints.last_page_len,
            v,
            s,
            MaskMode.NON_CAUSAL.value,
            TensorLayout[self._layout].value,
            -1,  # no window
            device_support_pdl(q.device),
            self._inv_temperature,
            logits_scale,
        )
        return v, s

    def _shape(self, rows: int) -> Shape:
        group_size = self._heads.qo // self._heads.kv
        return Shape(rows, group_size, self._page_size, self._slots)

    def _send(self, work: WorkList, queries: int) -> None:
        items = len(work.item_group)
        parts = [
            work.query_row,
            work.item_group,
            work.item_tile,
            work.qo_indptr,
            work.kv_indptr,
            work.last_page_len,
            work.state_start,
            work.state_indptr,
            work.state_index,
            np.zeros(items, np.int32),
            np.array([queries], np.int32),
            np.array([_WHOLE_GROUP], np.int32),
        ]
        host = torch.from_numpy(np.concatenate(parts))
        self._buffer = self._on_device(host, self._buffer)
        self._ints = _Ints(*self._buffer.split([len(part) for part in parts]))
        self._plan_info = plan_info(work.tile, self._buffer, self._ints)

    def _on_device(self, host: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """A captured launch reads the same addresses for ever."""
        if self._sizes is None or kept is None:
            return staged(host).to(self._space.device, non_blocking=True)
        return kept.copy_(staged(host), non_blocking=True)

    def _state_buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """FlashInfer asks for as many outputs as queries: all three have one length."""
        shape = (self._states, self._heads.qo, self._heads.dim)
        device = self._space.device
        if self._sizes is None:
            q, v = torch.empty((2, *shape), dtype=self._dtype, device=device)
            return q, v, torch.empty(shape[:2], dtype=torch.float32, device=device)
        size = shape[0] * shape[1] * shape[2] * self._dtype.itemsize
        q, v, s = self._space[: 2 * size + shape[0] * shape[1] * 4].split(
            [size, size, shape[0] * shape[1] * 4]
        )
        return (
            q.view(self._dtype).view(shape),
            v.view(self._dtype).view(shape),
            s.view(torch.float32).view(shape[:2]),
        )


def plan_info(tile: int, buffer: torch.Tensor, ints: _Ints) -> list[int]:
    """FlashInfer's ``PrefillPlanInfo``, in the order of its ``ToVector``; offsets in bytes."""

    def offset(part: torch.Tensor) -> int:
        return part.data_ptr() - buffer.data_ptr()

    return [
        len(ints.item_group),  # blocks of the grid
        0,  # rows in all and where that number lies: of split KV
        0,
        tile,
        offset(ints.item_group),
        offset(ints.item_tile),
        offset(ints.no_kv_tile),
        0,  # merge lists of split KV
        offset(ints.state_start),
        offset(ints.chunk),
        0,  # workspace and valid blocks of split KV
        0,
        0,
        0,  # CUDA graph: says where the number of rows lies
        0,  # no split KV
    ]


def blocks_at_once(device: torch.device, num_kv_heads: int) -> int:
    """Thread blocks of one KV head that run at the same time, two on a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(2 * processors // num_kv_heads, 1)


def staged(host: torch.Tensor) -> torch.Tensor:
    """Ready for a copy to the GPU that does not wait for what runs there.

    CUDA stages up to 64 KB of ordinary memory by itself; more has to be pinned.
    """
    host = host.contiguous()
    return host if host.nbytes <= 65536 else host.pin_memory()
