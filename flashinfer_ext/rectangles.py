"""The contexts level over rectangles: gathered queries, one attention launch, partial states."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from flashinfer.utils import MaskMode, TensorLayout, _unpack_paged_kv_cache, device_support_pdl

from flashinfer_ext import fa2, fa3, variant
from flashinfer_ext.gather import gather_packed
from flashinfer_ext.merge import StateLists
from flashinfer_ext.staging import Lists, staged
from flashinfer_ext.worklist import (
    Groups,
    Shape,
    Work,
    WorkSizes,
    make_work,
    padded,
    state_capacity,
)

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)
_LOG2_E = np.float32(np.log2(np.e))


class Heads(NamedTuple):
    qo: int
    kv: int
    dim: int

    @property
    def group_size(self) -> int:
        return self.qo // self.kv


class Kernel(NamedTuple):
    """The attention kernel that runs rectangles, on one GPU and for one model."""

    key: variant.ModuleKey
    module: Any  # of ``variant.load_module``
    heads: Heads
    processors: int  # of the GPU

    @classmethod
    def best(cls, key: variant.ModuleKey, heads: Heads, device: torch.device) -> Kernel:
        """FA3 on Hopper, FA2 on other GPUs, for FP8 keys and where FA3 cannot be had.

        Args:
            key: of the FA2 module, which must be available.
        """
        properties = torch.cuda.get_device_properties(device)
        hopper = key.on_hopper
        if hopper is not None and (properties.major, properties.minor) == _HOPPER:
            if variant.is_available(hopper):
                key = hopper
            else:
                logger.warning("%s cannot be had: shared contexts are read by FA2", hopper.name)
        return cls(key, variant.load_module(key), heads, properties.multi_processor_count)

    @property
    def slots(self) -> int:
        """Thread blocks of one KV head that run at the same time."""
        template = fa2 if self.key.template == "fa2" else fa3
        return max(template.BLOCKS_PER_PROCESSOR * self.processors // self.heads.kv, 1)

    def tile(self, packed_rows: int) -> int:
        """Packed rows of a tile, if no rectangle has more than so many."""
        if self.key.template == "fa3":
            return fa3.TILES[self.heads.dim]
        return fa2.tile_for(packed_rows, self.heads.dim)

    def captured_sizes(self, rows: int, nbytes: int) -> WorkSizes:
        """Sizes for every cover of a batch of so many rows that fits buffers of ``nbytes``."""
        heads, template = self.heads, fa2 if self.key.template == "fa2" else fa3
        return WorkSizes(
            self.tile(rows * heads.group_size),
            template.MOST_ROUNDS * self.slots + rows,
            state_capacity(heads.qo, heads.dim, self.key.q_dtype.itemsize, nbytes),
        )


class RectangleLaunch:
    """Plans and runs rectangles.

    Queries and states are *packed*: the ``group_size`` query heads of a KV head are rows of their
    own, and the head that is left is the KV head.

    Args:
        kernel: to launch.
        space: uint8 on the GPU; a captured launch keeps its queries and states there.
        layout: ``"NHD"`` or ``"HND"``.
        page_size: tokens of a page.
        captured_rows: rows of the batch of a CUDA graph, None where launches are eager.
    """

    def __init__(
        self,
        kernel: Kernel,
        space: torch.Tensor,
        layout: str,
        page_size: int,
        captured_rows: int | None,
    ) -> None:
        self._kernel = kernel
        self._space = space
        self._layout = layout
        self._page_size = page_size
        self._sizes: WorkSizes | None = None
        if captured_rows is not None:
            self._sizes = kernel.captured_sizes(captured_rows, len(space))
        self._buffer: torch.Tensor | None = None
        self._inv_temperature: torch.Tensor | None = None

    @property
    def state_lists(self) -> StateLists:
        """The states of each row."""
        ints = self._ints
        bias = ints["state_bias"].view(torch.float32)
        return StateLists(ints["state_indptr"], ints["path_start"], ints["state_index"], bias)

    def plan(self, groups: Groups, inv_temperature: torch.Tensor, rows: int) -> None:
        """Lay out the work and send it to the GPU.

        Args:
            groups: the rectangles.
            inv_temperature: (groups,) fp32 on the CPU.
            rows: of the batch.

        Raises:
            ValueError: the rectangles do not fit the captured launch.
        """
        kernel, sizes = self._kernel, self._sizes
        shape = Shape(rows, kernel.heads.group_size, self._page_size, kernel.slots)
        longest = int(np.diff(groups.qo_indptr).max(initial=0))
        tile = sizes.tile if sizes else kernel.tile(longest * shape.group_size)
        work = make_work(groups, shape, tile, sizes)
        if sizes is not None:
            work.check_fits(sizes)
        self._states = len(work.state_row) if sizes is None else sizes.states
        self._send(work, shape)
        of_chunk = np.append(inv_temperature.numpy()[work.rectangle], np.float32(1.0))
        floats = staged(torch.from_numpy(of_chunk[self._chunk_of_group(work)]))
        self._inv_temperature = self._on_device(floats, self._inv_temperature)

    def run(
        self, q: torch.Tensor, kv_cache: Any, indices: torch.Tensor, logits_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial states.

        Args:
            q: (rows, num_qo_heads, head_dim).
            kv_cache: as FlashInfer takes it.
            indices: int32 page indices that ``kv_indptr`` of the plan points into.
            logits_scale: softmax scale, times the factor of stored keys.

        Returns:
            ``(v, s)``: (states, group_size, num_kv_heads, head_dim) like ``q``, and fp32 (states,
            group_size, num_kv_heads), base-2 log-sum-exp; what lies behind the planned states is
            undefined.
        """
        heads, ints = self._kernel.heads, self._ints
        queries, v, s = self._state_buffers(q.device)
        if self._states > 0:
            gather_packed(q, ints["state_row"], ints["state_count"], queries)
            packed = (self._states * heads.group_size, heads.kv, heads.dim)
            self._launch(
                queries.view(packed), kv_cache, indices, v.view(packed), s.view(packed[:2]),
                logits_scale,
            )  # fmt: skip
        return v, s

    def _launch(
        self,
        q: torch.Tensor,
        kv_cache: Any,
        indices: torch.Tensor,
        v: torch.Tensor,
        s: torch.Tensor,
        logits_scale: float,
    ) -> None:
        unused = self._ints["state_count"]
        self._kernel.module.paged_run(
            self._space,
            self._buffer,
            self._plan_info,
            q,
            *_unpack_paged_kv_cache(kv_cache, self._layout),
            # FA3 reads its lists alone.
            self._ints.get("qo_indptr", unused),
            self._ints.get("kv_indptr", unused),
            indices,
            self._ints.get("last_page_len", unused),
            v,
            s,
            MaskMode.NON_CAUSAL.value,
            TensorLayout[self._layout].value,
            -1,  # no window
            device_support_pdl(q.device),
            self._inv_temperature,
            logits_scale,
        )

    @cached_property
    def _is_fa3(self) -> bool:
        return self._kernel.key.template == "fa3"

    def _lists_of(self, work: Work, shape: Shape) -> dict[str, np.ndarray]:
        if not self._is_fa3:
            return fa2.lists_of(work, shape.group_size, self._sizes)
        heads, blocks = self._kernel.heads.kv, self._kernel.processors
        size = shape.group_size, heads, shape.page_size, blocks
        return fa3.lists_of(work, *size, self._sizes)

    def _chunk_of_group(self, work: Work) -> np.ndarray:
        """For each group that the kernel knows the chunk whose temperature it has."""
        chunks = np.arange(len(work.rectangle))
        if not self._is_fa3:
            chunks = np.repeat(chunks, 2)
        # FA2's padding belongs to a group behind those of all chunks.
        size = len(chunks) if self._sizes is None else 2 * self._sizes.items + 1
        return padded(chunks, size, -1)

    def _send(self, work: Work, shape: Shape) -> None:
        size = self._states
        parts = {
            "state_row": padded(work.state_row, size, 0),
            "state_count": np.array([len(work.state_row)]),
            "state_indptr": work.state_indptr,
            "path_start": work.path_start,
            "state_index": padded(work.state_index, size, 0),
            "state_bias": padded((work.state_bias * _LOG2_E).view(np.int32), size, 0),
            **self._lists_of(work, shape),
        }
        lists = Lists(list(parts.values()))
        self._buffer = self._on_device(lists.host, self._buffer)
        self._ints = dict(zip(parts, lists.views(self._buffer), strict=True))
        start = self._buffer.data_ptr()
        offset = {name: view.data_ptr() - start for name, view in self._ints.items()}
        if self._is_fa3:
            self._plan_info = fa3.plan_info(offset)
        else:
            self._plan_info = fa2.plan_info(offset, work.tile, len(parts["item_group"]))

    def _on_device(self, host: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """A captured launch reads the same addresses for ever."""
        if self._sizes is None or kept is None:
            return host.to(self._space.device, non_blocking=True)
        return kept.copy_(host, non_blocking=True)

    def _state_buffers(
        self, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, outputs and log-sum-exps."""
        heads, dtype = self._kernel.heads, self._kernel.key.q_dtype
        shape = (self._states, heads.group_size, heads.kv, heads.dim)
        if self._sizes is None:
            q, v = torch.empty((2, *shape), dtype=dtype, device=device)
            return q, v, torch.empty(shape[:3], dtype=torch.float32, device=device)
        size = self._states * heads.qo * heads.dim * dtype.itemsize
        logs = self._states * heads.qo * 4
        q, v, s = self._space[: 2 * size + logs].split([size, size, logs])
        return (
            q.view(dtype).view(shape),
            v.view(dtype).view(shape),
            s.view(torch.float32).view(shape[:3]),
        )
