"""The scaled merge of two attention states, and of many, in one Triton kernel each.

The torch references have the same names in ``flashinfer_ext.reference``; they also run where there
is no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer_ext import reference
from flashinfer_ext.reference import EMPTY_LSE

_BLOCK_ELEMENTS = 2048  # of one program: a few heads of one row
_BLOCK_STATES = 16  # of one head, read at once


def merge_state_scaled(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    exponent_b: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states after raising the second's partition sum to a power.

    Follows ``flashinfer.merge_state`` (``flashinfer/cascade.py``), which it equals at
    ``exponent_b`` 1; see :func:`flashinfer_ext.reference.merge_state_scaled` for the formula. On
    CUDA one Triton kernel computes it in fp32.

    Args:
        v_a: (seq_len, num_heads, head_dim), fp16, bf16 or fp32.
        s_a: (seq_len, num_heads), base-2 log-sum-exp, fp32; an empty state has -inf or
            FlashInfer's -5e4.
        v_b: as ``v_a``.
        s_b: as ``s_a``.
        exponent_b: scalar or (seq_len,), fp32.

    Returns:
        ``(v, s)`` with the shapes and dtypes of ``v_a`` and ``s_a``. A row whose second state is
        empty returns the first unchanged.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check_states(v_a, s_a, v_b, s_b, exponent_b)
    if not v_a.is_cuda:
        return reference.merge_state_scaled(v_a, s_a, v_b, s_b, exponent_b)
    exponents = torch.as_tensor(exponent_b, dtype=torch.float32, device=v_a.device)
    v_a, s_a, v_b, s_b = (x.contiguous() for x in (v_a, s_a, v_b, s_b))
    v, s = torch.empty_like(v_a), torch.empty_like(s_a)
    launch_merge(v_a, s_a, v_b, s_b, exponents.expand(v_a.shape[0]), v, s)
    return v, s


def launch_merge(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    exponents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    v_scale: float = 1.0,
) -> None:
    """Launch the kernel into buffers; capturable in a CUDA graph.

    Rows may lie anywhere; within a row, heads and dimensions are contiguous.

    Args:
        exponents: (seq_len,) fp32, of any stride.
        out: gets the merged output times ``v_scale``; may be ``v_a`` itself, and then rows whose
            second state is empty are neither read nor written (at ``v_scale`` 1).
        lse: gets the merged log-sum-exp, None to skip it; may be ``s_a`` itself.
    """
    rows, heads, head_dim = v_a.shape
    if rows == 0:
        return
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(heads), max(_BLOCK_ELEMENTS // block_dim, 1))
    _merge_kernel[(rows, triton.cdiv(heads, block_heads))](
        v_a,
        s_a,
        v_b,
        s_b,
        exponents,
        out,
        s_a if lse is None else lse,
        heads,
        head_dim,
        v_a.stride(0),
        s_a.stride(0),
        v_b.stride(0),
        s_b.stride(0),
        exponents.stride(0),
        out.stride(0),
        0 if lse is None else lse.stride(0),
        v_scale,
        EMPTY_LSE=EMPTY_LSE,
        IN_PLACE=out.data_ptr() == v_a.data_ptr() and v_scale == 1.0,
        WRITE_LSE=lse is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
    )


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    v_a,
    s_a,
    v_b,
    s_b,
    exponents,
    out,
    lse,
    heads,
    head_dim,
    stride_v_a,
    stride_s_a,
    stride_v_b,
    stride_s_b,
    stride_exponents,
    stride_out,
    stride_lse,
    v_scale,
    EMPTY_LSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_heads = head < heads
    state_b = tl.load(s_b + row * stride_s_b + head, mask=in_heads, other=float("-inf"))
    empty_b = state_b <= EMPTY_LSE
    if IN_PLACE and not WRITE_LSE:  # noqa: SIM102  one is decided at compile time
        if tl.min(empty_b.to(tl.int32), axis=0) == 1:
            return
    state_a = tl.load(s_a + row * stride_s_a + head, mask=in_heads, other=float("-inf"))
    exponent = tl.load(exponents + row * stride_exponents)
    empty_a = state_a <= EMPTY_LSE
    scaled_b = tl.where(empty_b, state_b, state_b * exponent)
    # Weights of an empty state are set rather than computed: an exponent of 0 would give it one.
    highest = tl.where(empty_a, scaled_b, tl.where(empty_b, state_a, tl.maximum(state_a, scaled_b)))
    w_a = tl.where(empty_a, 0.0, tl.exp2(state_a - highest))
    w_b = tl.where(empty_b, 0.0, tl.exp2(scaled_b - highest))
    total = w_a + w_b
    # Both empty: the first state goes through.
    w_a = tl.where(empty_b, 1.0, w_a / total)
    w_b = tl.where(empty_b, 0.0, w_b / total)

    dim = tl.arange(0, BLOCK_DIM)
    offset = head[:, None] * head_dim + dim[None, :]
    mask = in_heads[:, None] & (dim < head_dim)[None, :]
    a = tl.load(v_a + row * stride_v_a + offset, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(v_b + row * stride_v_b + offset, mask=mask, other=0.0).to(tl.float32)
    merged = tl.where(empty_b[:, None], a, a * w_a[:, None] + b * w_b[:, None]) * v_scale
    tl.store(out + row * stride_out + offset, merged.to(out.dtype.element_ty), mask=mask)
    if WRITE_LSE:
        result = tl.where(empty_b, state_a, highest + tl.log2(total))
        tl.store(lse + row * stride_lse + head, result, mask=in_heads)


class StateLists(NamedTuple):
    """Which partial states are a row's: ``index[indptr[i]:indptr[i + 1]]``; int32.

    Those from ``path_start[i]`` on belong to its path, those before to its contexts.
    """

    indptr: torch.Tensor  # (rows + 1,)
    path_start: torch.Tensor  # (rows,) places in ``index``, like ``indptr``
    index: torch.Tensor  # (indptr[-1],) at least
    # fp32 like ``index``, base 2: added to the log-sum-exp of the state at each place; None for 0.
    bias: torch.Tensor | None = None


def merge_states_scaled(
    v_path: torch.Tensor,
    s_path: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    lists: StateLists,
    exponent: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the partial states of each row's contexts, scale them, and merge the path with them.

    With one state a row, of its contexts, this is :func:`merge_state_scaled`. On CUDA one Triton
    kernel computes it in fp32.

    Args:
        v_path: (rows, num_heads, head_dim), fp16, bf16 or fp32.
        s_path: (rows, num_heads), base-2 log-sum-exp, fp32; an empty state has -inf or
            FlashInfer's -5e4.
        v: (states, group_size, num_kv_heads, head_dim), as ``v_path``: head ``k * group_size + g``
            of a state stands at ``[g, k]``.
        s: (states, group_size, num_kv_heads), as ``s_path``.
        lists: the states of each row.
        exponent: scalar or (rows,), fp32: S * T, applied to the partition sum over all states of
            the row's contexts.

    Returns:
        ``(v, s)`` with the shapes and dtypes of ``v_path`` and ``s_path``. A row without a state
        that is not empty returns its path unchanged.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check_state_lists(v_path, s_path, v, s, lists, exponent)
    if not v_path.is_cuda:
        return reference.merge_states_scaled(v_path, s_path, v, s, *lists, exponent)
    exponents = torch.as_tensor(exponent, dtype=torch.float32, device=v_path.device)
    v_path, s_path, v, s = (x.contiguous() for x in (v_path, s_path, v, s))
    out, lse = torch.empty_like(v_path), torch.empty_like(s_path)
    exponents = exponents.expand(v_path.shape[0])
    launch_merge_states(v_path, s_path, v, s, lists, exponents, out, lse)
    return out, lse


def launch_merge_states(
    v_path: torch.Tensor,
    s_path: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    lists: StateLists,
    exponents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    v_scale: float = 1.0,
) -> None:
    """Launch the kernel into buffers; capturable in a CUDA graph.

    Rows and states may lie anywhere; within one, heads and dimensions are contiguous.

    Args:
        v: packed, as for :func:`merge_states_scaled`; so is ``s``.
        exponents: (rows,) fp32, of any stride.
        out: gets the merged output times ``v_scale``; may be ``v_path`` itself, and then rows
            without a state in their list are neither read nor written (at ``v_scale`` 1).
        lse: gets the merged log-sum-exp, None to skip it; may be ``s_path`` itself.
    """
    rows, heads, head_dim = v_path.shape
    if rows == 0:
        return
    _merge_states_kernel[(rows, heads)](
        v_path,
        s_path,
        v,
        s,
        *lists[:3],
        exponents if lists.bias is None else lists.bias,
        exponents,
        out,
        s_path if lse is None else lse,
        head_dim,
        v_path.stride(0),
        s_path.stride(0),
        v.stride(0),
        s.stride(0),
        exponents.stride(0),
        out.stride(0),
        0 if lse is None else lse.stride(0),
        v_scale,
        GROUP_SIZE=v.shape[1],
        EMPTY_LSE=EMPTY_LSE,
        HAS_BIAS=lists.bias is not None,
        IN_PLACE=out.data_ptr() == v_path.data_ptr() and v_scale == 1.0,
        WRITE_LSE=lse is not None,
        BLOCK_STATES=_BLOCK_STATES,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
    )


@triton.jit
def _merge_states_kernel(  # type: ignore[no-untyped-def]
    v_path,
    s_path,
    v,
    s,
    indptr,
    path_start,
    index,
    bias,
    exponents,
    out,
    lse,
    head_dim,
    stride_v_path,
    stride_s_path,
    stride_v,
    stride_s,
    stride_exponents,
    stride_out,
    stride_lse,
    v_scale,
    GROUP_SIZE: tl.constexpr,
    EMPTY_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    begin = tl.load(indptr + row)
    stop = tl.load(indptr + row + 1)
    if IN_PLACE and not WRITE_LSE:  # noqa: SIM102  one is decided at compile time
        if begin == stop:
            return
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < head_dim
    packed = head % GROUP_SIZE * (tl.num_programs(1) // GROUP_SIZE) + head // GROUP_SIZE
    middle = tl.load(path_start + row)
    # A finite start: two empty states have no difference.
    highest = tl.full([], EMPTY_LSE, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sums = tl.full([BLOCK_DIM], 0.0, tl.float32)
    for first in range(begin, middle, BLOCK_STATES):
        highest, total, sums = _add_states(
            highest, total, sums, first, middle, index, bias, s, stride_s, v, stride_v, packed,
            head_dim, dim, in_dim, EMPTY_LSE, HAS_BIAS, BLOCK_STATES,
        )  # fmt: skip
    log_path = tl.load(s_path + row * stride_s_path + head)
    path = tl.load(v_path + row * stride_v_path + head * head_dim + dim, mask=in_dim, other=0.0)
    highest_path = tl.maximum(log_path, EMPTY_LSE)
    total_path = tl.where(log_path <= EMPTY_LSE, 0.0, 1.0)
    path = path.to(tl.float32)  # of no weight if empty, unless nothing else comes
    for first in range(middle, stop, BLOCK_STATES):
        highest_path, total_path, path = _add_states(
            highest_path, total_path, path, first, stop, index, bias, s, stride_s, v, stride_v,
            packed, head_dim, dim, in_dim, EMPTY_LSE, HAS_BIAS, BLOCK_STATES,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    scaled = (highest + tl.log2(total)) * tl.load(exponents + row * stride_exponents)
    empty_path = total_path == 0.0
    total_path = tl.where(empty_path, 1.0, total_path)
    path = path / total_path
    log_path = tl.where(empty_path, log_path, highest_path + tl.log2(total_path))
    # Weights of an empty state are set rather than computed: an exponent of 0 would give it one.
    top = tl.where(empty_path, scaled, tl.where(empty, log_path, tl.maximum(log_path, scaled)))
    w_path = tl.where(empty_path, 0.0, tl.exp2(log_path - top))
    w_contexts = tl.where(empty, 0.0, tl.exp2(scaled - top))
    both = w_path + w_contexts
    merged = path * (w_path / both) + sums * (w_contexts / both / total)
    merged = tl.where(empty, path, merged) * v_scale
    place = out + row * stride_out + head * head_dim + dim
    tl.store(place, merged.to(out.dtype.element_ty), mask=in_dim)
    if WRITE_LSE:
        result = tl.where(empty, log_path, top + tl.log2(both))
        tl.store(lse + row * stride_lse + head, result)


@triton.jit
def _add_states(  # type: ignore[no-untyped-def]
    highest,
    total,
    sums,
    first,
    stop,
    index,
    bias,
    s,
    stride_s,
    v,
    stride_v,
    packed,
    head_dim,
    dim,
    in_dim,
    EMPTY_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
):
    """A block of a row's states added to a running softmax."""
    place = first + tl.arange(0, BLOCK_STATES)
    state = tl.load(index + place, mask=place < stop, other=0).to(tl.int64)
    logs = tl.load(s + state * stride_s + packed, mask=place < stop, other=float("-inf"))
    empty = logs <= EMPTY_LSE
    if HAS_BIAS:
        logs += tl.load(bias + place, mask=place < stop, other=0.0)
    new = tl.maximum(highest, tl.max(logs, axis=0))
    weights = tl.where(empty, 0.0, tl.exp2(logs - new))
    values = tl.load(
        v + state[:, None] * stride_v + packed * head_dim + dim[None, :],
        mask=(place < stop)[:, None] & in_dim[None, :],
        other=0.0,
    ).to(tl.float32)
    decay = tl.exp2(highest - new)
    return (
        new,
        total * decay + tl.sum(weights, axis=0),
        sums * decay + tl.sum(weights[:, None] * values, axis=0),
    )


def _check_states(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    exponent_b: torch.Tensor | float,
) -> None:
    if v_a.dim() != 3 or v_a.shape != v_b.shape or v_a.dtype != v_b.dtype:
        raise ValueError(
            "v_a and v_b must have one shape (seq_len, num_heads, head_dim) and one dtype, got "
            f"{tuple(v_a.shape)} {v_a.dtype} and {tuple(v_b.shape)} {v_b.dtype}"
        )
    _check_log("s_a", s_a, v_a)
    _check_log("s_b", s_b, v_a)
    _check_exponent("exponent_b", exponent_b, v_a.shape[0])


def _check_state_lists(
    v_path: torch.Tensor,
    s_path: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    lists: StateLists,
    exponent: torch.Tensor | float,
) -> None:
    if v_path.dim() != 3:
        raise ValueError(
            f"v_path must have the shape (rows, num_heads, head_dim), got {tuple(v_path.shape)}"
        )
    heads, dim = v_path.shape[1:]
    if (
        v.dim() != 4
        or v.shape[1] * v.shape[2] != heads
        or v.shape[3] != dim
        or (v.dtype != v_path.dtype)
    ):
        raise ValueError(
            f"v must be {v_path.dtype} of shape (states, group_size, num_kv_heads, {dim}) for "
            f"{heads} heads, got {v.dtype} of shape {tuple(v.shape)}"
        )
    _check_log("s_path", s_path, v_path)
    _check_log("s", s, v)
    rows = v_path.shape[0]
    sizes = (rows + 1, rows, len(lists.index), len(lists.index))
    for name, given, size in zip(StateLists._fields, lists, sizes, strict=True):
        if given is None:
            continue
        dtype = torch.float32 if name == "bias" else torch.int32
        if given.shape != (size,) or given.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} of shape ({size},), got {given.dtype} of shape "
                f"{tuple(given.shape)}"
            )
    _check_exponent("exponent", exponent, v_path.shape[0])


def _check_log(name: str, s: torch.Tensor, v: torch.Tensor) -> None:
    shape = tuple(v.shape[:-1])
    if s.shape != shape or s.dtype != torch.float32:
        raise ValueError(f"{name} must be fp32 of shape {shape}, got {tuple(s.shape)} {s.dtype}")


def _check_exponent(name: str, exponent: torch.Tensor | float, rows: int) -> None:
    shape = tuple(getattr(exponent, "shape", ()))
    if shape not in ((), (rows,)):
        raise ValueError(f"{name} must be a scalar or of shape ({rows},), got {shape}")
