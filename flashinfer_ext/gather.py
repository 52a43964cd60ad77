"""Collect KV slots of page-table segments, and queries of rows, and spread values over segments, in
one Triton kernel each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_MAX_PROGRAMS_PER_SEGMENT = 64
_MAX_PROGRAMS_OF_ROWS = 1024


def gather_kv_indices_reference(
    page_table: torch.Tensor,
    rows: torch.Tensor,
    segment_row: torch.Tensor,
    segment_start: torch.Tensor,
    segment_indptr: torch.Tensor,
) -> torch.Tensor:
    """The torch reference of :func:`gather_kv_indices`, on any device."""
    pieces = [
        page_table[rows[row], start : start + stop - begin]
        for row, start, begin, stop in zip(
            segment_row.tolist(),
            segment_start.tolist(),
            segment_indptr[:-1].tolist(),
            segment_indptr[1:].tolist(),
            strict=True,
        )
    ]
    return torch.cat(pieces) if pieces else page_table.new_empty(0)


def gather_kv_indices(
    page_table: torch.Tensor,
    rows: torch.Tensor,
    segment_row: torch.Tensor,
    segment_start: torch.Tensor,
    segment_indptr: torch.Tensor,
    longest: int,
    out: torch.Tensor,
) -> None:
    """Write ``page_table[rows[segment_row[i]], segment_start[i] + j]`` to ``out`` for all i, j.

    Args:
        page_table: (lines, width) int32, such as SGLang's ``req_to_token``; contiguous.
        rows: (batch,) the line of each request, any integer dtype.
        segment_row: (segments,) int32, index into ``rows``.
        segment_start: (segments,) int32, first column.
        segment_indptr: (segments + 1,) int32; segment i has ``indptr[i+1] - indptr[i]`` columns,
            which go to ``out[indptr[i]:indptr[i+1]]``.
        longest: columns of the longest segment, known to the host; only sizes the launch.
        out: int32, at least ``segment_indptr[-1]`` long.

    All tensors on one CUDA device. Source of the idea: ``create_flashinfer_kv_indices_triton`` of
    SGLang, which takes one segment a request.
    """
    segments = segment_row.shape[0]
    if segments == 0 or longest == 0:
        return
    programs = min(triton.cdiv(longest, _BLOCK), _MAX_PROGRAMS_PER_SEGMENT)
    _gather_kernel[(segments, programs)](
        page_table,
        rows,
        segment_row,
        segment_start,
        segment_indptr,
        out,
        page_table.stride(0),
        BLOCK=_BLOCK,
    )


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    page_table,
    rows,
    segment_row,
    segment_start,
    segment_indptr,
    out,
    stride,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    line = tl.load(rows + tl.load(segment_row + segment)).to(tl.int64)
    begin = tl.load(segment_indptr + segment)
    length = tl.load(segment_indptr + segment + 1) - begin
    source = page_table + line * stride + tl.load(segment_start + segment)
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < length
        tl.store(out + begin + column, tl.load(source + column, mask=mask), mask=mask)


def spread(values: torch.Tensor, indptr: torch.Tensor, longest: int, out: torch.Tensor) -> None:
    """Write ``values[i]`` to ``out[indptr[i]:indptr[i + 1]]`` for all i.

    The same as ``torch.repeat_interleave(values, indptr.diff())``, without waiting for the GPU.

    Args:
        values: (segments,) fp32.
        indptr: (segments + 1,) int32.
        longest: elements of the longest segment, known to the host; only sizes the launch.
        out: fp32, at least ``indptr[-1]`` long.

    All tensors on one CUDA device.
    """
    segments = values.shape[0]
    if segments == 0 or longest == 0:
        return
    programs = min(triton.cdiv(longest, _BLOCK), _MAX_PROGRAMS_PER_SEGMENT)
    _spread_kernel[(segments, programs)](values, indptr, out, BLOCK=_BLOCK)


@triton.jit
def _spread_kernel(values, indptr, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    segment = tl.program_id(0)
    begin = tl.load(indptr + segment)
    length = tl.load(indptr + segment + 1) - begin
    value = tl.load(values + segment)
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(out + begin + column, value, mask=column < length)


def gather_packed(
    source: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor
) -> None:
    """Write ``source[rows[i]]`` to ``out[i]`` for the first ``count`` i; capturable in a graph.

    What lies behind is left as it is, so that one captured launch serves any number of rows.

    Args:
        source: (n, heads, head_dim), contiguous within a row; head ``k * group_size + g`` goes to
            ``[g, k]``.
        rows: (capacity,) int32.
        count: (1,) int32, at most ``capacity``.
        out: (capacity or more, group_size, kv_heads, head_dim), contiguous, else as ``source``.
    """
    _, group_size, kv_heads, head_dim = out.shape
    width = group_size * kv_heads * head_dim
    _gather_packed_kernel[(min(len(rows), _MAX_PROGRAMS_OF_ROWS),)](
        source,
        rows,
        count,
        out,
        source.stride(0),
        width,
        GROUP_SIZE=group_size,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(width),
    )


@triton.jit
def _gather_packed_kernel(  # type: ignore[no-untyped-def]
    source,
    rows,
    count,
    out,
    stride,
    width,
    GROUP_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    mask = place < width
    packed = place // HEAD_DIM
    head = packed % KV_HEADS * GROUP_SIZE + packed // KV_HEADS
    column = head * HEAD_DIM + place % HEAD_DIM
    for i in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        row = tl.load(rows + i).to(tl.int64)
        values = tl.load(source + row * stride + column, mask=mask)
        tl.store(out + tl.cast(i, tl.int64) * width + place, values, mask=mask)
