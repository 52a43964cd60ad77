"""Log-sum-exps of queries over each of many contexts, without values, in one Triton kernel.

The torch reference has the same name in ``flashinfer_ext.reference``; it also runs where there is
no GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flashinfer_ext import reference

# On an H100 within 3 % of the fastest of 45 combinations (72 rows, 32 heads of 128 over 8, 131,072
# tokens in bf16).
_BLOCK_ROWS = 128  # query heads of one KV head, of as many rows as that makes
_BLOCK_KEYS = 64
_BLOCK_KEY_ELEMENTS = 8192  # of one block of keys, of which a few have to fit the shared memory
_WARPS = 8
_STAGES = 3


def context_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """The log-sum-exp of each query over the keys of each context.

    Args:
        q: (rows, num_qo_heads, head_dim), fp16 or bf16 (fp32 is slow); contiguous within a row.
        k_cache: (slots, num_kv_heads, head_dim), as ``q`` or FP8; contiguous within a head.
        indices: (tokens,) int32 or int64, slots of the contexts' tokens, back to back.
        indptr: (contexts + 1,) int32: context i has ``indices[indptr[i]:indptr[i + 1]]``, at least
            one.
        sm_scale: multiplies the logits; with it the factor of stored keys.

    Returns:
        fp32, base 2, of shape (rows, num_qo_heads, contexts). On CUDA one Triton kernel computes
        it.
    """
    if not q.is_cuda:
        return reference.context_lse(q, k_cache, indices, indptr, sm_scale)
    rows, heads, _ = q.shape
    out = q.new_empty((rows, heads, len(indptr) - 1), dtype=torch.float32)
    launch_context_lse(q, k_cache, indices, indptr, sm_scale, out)
    return out


def launch_context_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    sm_scale: float,
    out: torch.Tensor,
) -> None:
    """Launch the kernel into ``out``, which may be a part of something larger."""
    rows, heads, head_dim = q.shape
    kv_heads, contexts = k_cache.shape[1], len(indptr) - 1
    group_size = heads // kv_heads
    tiles = triton.cdiv(rows * group_size, _BLOCK_ROWS)
    if tiles * contexts == 0:
        return
    block_dim = triton.next_power_of_2(head_dim)
    _context_lse_kernel[(tiles * contexts, kv_heads)](
        q,
        k_cache,
        indices,
        indptr,
        out,
        rows,
        tiles,
        q.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        out.stride(0),
        out.stride(1),
        sm_scale * math.log2(math.e),
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_KEYS=min(_BLOCK_KEYS, _BLOCK_KEY_ELEMENTS // block_dim),
        num_warps=_WARPS,
        num_stages=_STAGES,
    )


# Not compiled anew for each number of rows or contexts.
@triton.jit(do_not_specialize=["rows", "tiles", "stride_out_row", "stride_out_head"])
def _context_lse_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    indices,
    indptr,
    out,
    rows,
    tiles,
    stride_q,
    stride_slot,
    stride_kv_head,
    stride_out_row,
    stride_out_head,
    log2_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    # Neighbouring programs read the same keys.
    context = tl.program_id(0) // tiles
    kv_head = tl.program_id(1)
    packed = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = packed // GROUP_SIZE
    head = kv_head * GROUP_SIZE + packed % GROUP_SIZE
    in_rows = row < rows
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    place = row.to(tl.int64) * stride_q + head * HEAD_DIM
    mask = in_rows[:, None] & in_dim[None, :]
    queries = tl.load(q + place[:, None] + dim[None, :], mask=mask, other=0.0)

    begin = tl.load(indptr + context)
    end = tl.load(indptr + context + 1)
    keys_of_head = k_cache + kv_head.to(tl.int64) * stride_kv_head
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.full([BLOCK_ROWS], 0.0, tl.float32)
    for first in range(begin, end, BLOCK_KEYS):
        token = first + tl.arange(0, BLOCK_KEYS)
        in_context = token < end
        slot = tl.load(indices + token, mask=in_context, other=0).to(tl.int64)
        keys = tl.load(
            keys_of_head + slot[None, :] * stride_slot + dim[:, None],
            mask=in_context[None, :] & in_dim[:, None],
            other=0.0,
        )
        logits = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * log2_scale
        logits = tl.where(in_context[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp2(highest - higher)
        total += tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        highest = higher
    place = row.to(tl.int64) * stride_out_row + head * stride_out_head + context
    tl.store(out + place, highest + tl.log2(total), mask=in_rows)
