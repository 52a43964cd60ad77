"""The scaled merge of two attention states in one Triton kernel.

The torch reference is :func:`flashinfer_ext.reference.merge_state_scaled`, which also runs where
there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashinfer_ext import reference
from flashinfer_ext.reference import EMPTY_LSE

_BLOCK_ELEMENTS = 2048  # of one program: a few heads of one row


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
    for name, s in (("s_a", s_a), ("s_b", s_b)):
        if s.shape != v_a.shape[:2] or s.dtype != torch.float32:
            shape = tuple(v_a.shape[:2])
            raise ValueError(
                f"{name} must be fp32 of shape {shape}, got {tuple(s.shape)} {s.dtype}"
            )
    shape = tuple(getattr(exponent_b, "shape", ()))
    if shape not in ((), (v_a.shape[0],)):
        raise ValueError(f"exponent_b must be a scalar or of shape ({v_a.shape[0]},), got {shape}")
