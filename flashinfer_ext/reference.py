"""Plain torch attention with log-sum-exp, and the scaled merge of two attention states.

These run anywhere; they are the CPU path of the engine and the reference for every kernel.
All log-sum-exps are base 2 and fp32, as FlashInfer's are (``flashinfer/cascade.py``).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

EMPTY_LSE = -4.5e4
"""A state with a log-sum-exp at or below this is empty: torch gives -inf, FlashInfer -5e4."""

LOWEST_BIAS = -2e4
"""A bias below this is as good as this: of no weight, and yet no state with it counts as empty."""

_ROWS_AT_ONCE = 512  # bounds the score matrix to heads * 512 * kv_len floats


def attention_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    causal: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, computed in fp32.

    Args:
        q: (qo_len, num_qo_heads, head_dim), any float dtype.
        k: (kv_len, num_kv_heads, head_dim); ``num_qo_heads`` is a multiple of ``num_kv_heads``.
        v: (kv_len, num_kv_heads, head_dim_v).
        sm_scale: multiplies the logits.
        causal: query i sees the first ``kv_len - qo_len + i + 1`` keys (bottom-right aligned).
        bias: (kv_len,) fp32, natural log, added to the scaled logits of every query; None for 0.

    Returns:
        ``(o, lse)``: o fp32 of shape (qo_len, num_qo_heads, head_dim_v); lse fp32, base 2, of
        shape (qo_len, num_qo_heads). With ``kv_len`` 0, o is 0 and lse is -inf.
    """
    qo_len, num_qo_heads, _ = q.shape
    kv_len, num_kv_heads, head_dim_v = v.shape
    if kv_len == 0:
        return (
            q.new_zeros((qo_len, num_qo_heads, head_dim_v), dtype=torch.float32),
            q.new_full((qo_len, num_qo_heads), -math.inf, dtype=torch.float32),
        )
    group = num_qo_heads // num_kv_heads
    keys = k.float().permute(1, 2, 0)  # (kv heads, head_dim, kv_len)
    values = v.float().transpose(0, 1)  # (kv heads, kv_len, head_dim_v)
    outs, lses = [], []
    for start in range(0, qo_len, _ROWS_AT_ONCE):
        rows = q[start : start + _ROWS_AT_ONCE].float()
        n = rows.shape[0]
        grouped = rows.view(n, num_kv_heads, group, -1).permute(1, 2, 0, 3)
        scores = (grouped.reshape(num_kv_heads, group * n, -1) @ keys) * sm_scale
        if bias is not None:
            scores += bias
        if causal:
            first_visible = kv_len - qo_len + start
            visible = torch.arange(kv_len, device=q.device) <= torch.arange(
                first_visible, first_visible + n, device=q.device
            ).unsqueeze(1)
            scores = scores.view(num_kv_heads, group, n, kv_len).masked_fill_(~visible, -math.inf)
            scores = scores.view(num_kv_heads, group * n, kv_len)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        # A row that sees no key has lse -inf; its weights, exp(-inf - 0), are 0.
        out = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)) @ values
        outs.append(out.view(num_kv_heads, group, n, head_dim_v).permute(2, 0, 1, 3))
        lses.append(lse.view(num_kv_heads, group, n).permute(2, 0, 1))
    return (
        torch.cat(outs).reshape(qo_len, num_qo_heads, head_dim_v),
        torch.cat(lses).reshape(qo_len, num_qo_heads) * math.log2(math.e),
    )


def context_lse(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    indptr: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """The log-sum-exp of each query over the keys of each context, computed in fp32.

    Args:
        q: (rows, num_qo_heads, head_dim), any float dtype.
        k_cache: (slots, num_kv_heads, head_dim); ``num_qo_heads`` is a multiple of
            ``num_kv_heads``.
        indices: (tokens,) integer, slots of the contexts' tokens, back to back.
        indptr: (contexts + 1,) integer: context i has ``indices[indptr[i]:indptr[i + 1]]``.
        sm_scale: multiplies the logits.

    Returns:
        fp32, base 2, of shape (rows, num_qo_heads, contexts).
    """
    rows, heads, _ = q.shape
    grouped = q.float().view(rows, k_cache.shape[1], heads // k_cache.shape[1], -1)
    lses = []
    for start, stop in pairwise(indptr.tolist()):
        keys = k_cache[indices[start:stop].long()].float()
        logits = torch.einsum("nkgd,skd->nkgs", grouped, keys) * sm_scale
        lses.append(torch.logsumexp(logits, -1).view(rows, heads))
    return torch.stack(lses, -1) * math.log2(math.e)


def merge_state_scaled(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    exponent_b: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states after raising the second's partition sum to a power.

    Follows ``flashinfer.merge_state``, which it equals at ``exponent_b`` 1. APE merges the path
    state (a) with the contexts state (b) at exponent S * T; a power of the partition sum is a
    factor on its logarithm, so the base of the logarithm does not matter to the weights.

    Args:
        v_a: (seq_len, num_heads, head_dim).
        s_a: (seq_len, num_heads), base-2 log-sum-exp, fp32; at most ``EMPTY_LSE`` for an empty
            state.
        v_b: as ``v_a``.
        s_b: as ``s_a``.
        exponent_b: scalar, or (seq_len,) or broadcastable to (seq_len, num_heads), fp32.

    Returns:
        ``(v, s)`` with the shapes of ``v_a`` and ``s_a``; v has the dtype of ``v_a``. A row whose
        second state is empty returns the first unchanged.
    """
    if isinstance(exponent_b, torch.Tensor) and exponent_b.dim() == 1:
        exponent_b = exponent_b.unsqueeze(1)
    empty_b = s_b <= EMPTY_LSE
    scaled_b = torch.where(empty_b, -math.inf, s_b * exponent_b)  # an exponent of 0 would fill it
    highest = torch.maximum(s_a, scaled_b)
    highest = torch.where(torch.isneginf(highest), torch.zeros_like(highest), highest)
    w_a, w_b = torch.exp2(s_a - highest), torch.exp2(scaled_b - highest)
    total = w_a + w_b
    safe = torch.where(total == 0, torch.ones_like(total), total)
    merged = v_a.float() * (w_a / safe).unsqueeze(-1) + v_b.float() * (w_b / safe).unsqueeze(-1)
    merged = torch.where(empty_b.unsqueeze(-1), v_a.float(), merged)
    merged_lse = torch.where(empty_b, s_a, torch.log2(total) + highest)
    return merged.to(v_a.dtype), merged_lse


def merge_states(
    v: torch.Tensor,
    s: torch.Tensor,
    indptr: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of attention states into one for each row.

    Args:
        v: (states, num_heads, head_dim).
        s: (states, num_heads), base-2 log-sum-exp, fp32; at most ``EMPTY_LSE`` for an empty state.
        indptr: (rows + 1,) integer: row i merges the states ``index[indptr[i]:indptr[i + 1]]``.
        index: integer, which states; a state may stand anywhere and more than once.
        bias: fp32 like ``index``, base 2, added to the log-sum-exps of these states; None for 0.

    Returns:
        ``(v, s)``, fp32 of shapes (rows, num_heads, head_dim) and (rows, num_heads); 0 and -inf
        for a row whose states are all empty, or that has none.
    """
    bounds = indptr.tolist()
    rows, heads = len(bounds) - 1, s.shape[1]
    out = v.new_zeros((rows, heads, v.shape[2]), dtype=torch.float32)
    lse = s.new_full((rows, heads), -math.inf)
    for row, (start, stop) in enumerate(pairwise(bounds)):
        states = index[start:stop].long()
        logs = torch.where(s[states] <= EMPTY_LSE, -math.inf, s[states])
        if bias is not None:
            logs = logs + bias[start:stop, None]
        highest = logs.amax(0) if start < stop else lse[row]
        weights = torch.exp2(logs - highest.masked_fill(highest == -math.inf, 0.0))
        total = weights.sum(0)
        lse[row] = torch.log2(total) + highest
        shares = weights / total.masked_fill(total == 0, 1.0)
        out[row] = (shares.unsqueeze(-1) * v[states].float()).sum(0)
    return out, lse


def merge_states_scaled(
    v_path: torch.Tensor,
    s_path: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    indptr: torch.Tensor,
    path_start: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    exponent: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the partial states of a row's contexts, scale the result, and merge the path with it.

    The exponent S * T acts on the partition sum over all contexts of the row, so it comes after
    the partial states are merged: a power of a sum is not a sum of powers.

    Args:
        v_path: (rows, num_heads, head_dim).
        s_path: (rows, num_heads), base-2 log-sum-exp, fp32.
        v: (states, group_size, num_kv_heads, head_dim): head ``k * group_size + g`` of a state
            stands at ``[g, k]``.
        s: (states, group_size, num_kv_heads), fp32.
        indptr: (rows + 1,), see :func:`merge_states`.
        path_start: (rows,): the states ``index[path_start[i]:indptr[i + 1]]`` of row i belong to
            its path and are merged with it first; those before are of its contexts.
        index: (indptr[-1],) at least.
        bias: fp32 like ``index``, base 2, added to the log-sum-exps of these states; None for 0.
        exponent: scalar or (rows,), fp32.

    Returns:
        ``(v, s)`` with the shapes of ``v_path`` and ``s_path``; v has the dtype of ``v_path``. A
        row without a state that is not empty returns its path unchanged.
    """
    v, s = v.transpose(1, 2).flatten(1, 2), s.transpose(1, 2).flatten(1, 2)
    rows = list(zip(indptr[:-1].tolist(), path_start.tolist(), indptr[1:].tolist(), strict=True))

    def merged(bounds: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.tensor([0, *(b - a for a, b in bounds)])

        def taken(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([*(values[a:b] for a, b in bounds), values[:0]])

        own = None if bias is None else taken(bias)
        return merge_states(v, s, counts.cumsum(0), taken(index), own)

    contexts = merged([(begin, middle) for begin, middle, _ in rows])
    more = merged([(middle, stop) for _, middle, stop in rows])
    path = merge_state_scaled(v_path.float(), s_path, *more, 1.0)
    out, lse = merge_state_scaled(*path, *contexts, exponent)
    return out.to(v_path.dtype), lse
