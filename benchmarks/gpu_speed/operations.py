"""How many operations and bytes a model's steps cannot do without.

Attention is counted for every (query row, key row) pair that the mask lets through: one product
for the score and one for the value, each of ``head_dim`` multiply-adds a head and layer.
"""

from __future__ import annotations

from benchmarks.common.shape import Shape


def gemm_operations(shape: Shape, tokens: int) -> int:
    """Operations of all matrix products for ``tokens`` new tokens, the last of which is sampled."""
    return 2 * (tokens * shape.layers * shape.layer_weights + shape.vocab * shape.hidden)


def attention_operations(shape: Shape, pairs: int) -> int:
    """Operations of attention over ``pairs`` (query row, key row) pairs."""
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs


def causal_pairs(new: int, past: int = 0) -> int:
    """Pairs of ``new`` rows that see ``past`` rows, themselves and each other causally."""
    return new * past + new * (new + 1) // 2


def sequential_operations(shape: Shape, tokens: int, cached: int = 0) -> int:
    """Prefill of ``tokens`` new tokens after ``cached`` ones, as one sequence."""
    pairs = causal_pairs(tokens, cached)
    return gemm_operations(shape, tokens) + attention_operations(shape, pairs)


def parallel_operations(
    shape: Shape, prefix: int, contexts: int, context_len: int, query: int
) -> int:
    """Cold prefill of a prefix, contexts that see it and themselves only, and a query."""
    tokens = prefix + contexts * context_len
    pairs = (
        causal_pairs(prefix)
        + contexts * causal_pairs(context_len, prefix)
        + causal_pairs(query, tokens)
    )
    return gemm_operations(shape, tokens + query) + attention_operations(shape, pairs)


def decode_bytes(shape: Shape, batch: int, shared: int, own: float) -> float:
    """Bytes that one decode step has to read at least.

    All matrices once (of the input embedding a few rows only), the KV of ``shared`` tokens once
    for the whole batch, and the KV of ``own`` tokens for each of its requests.
    """
    weights = shape.layers * shape.layer_weights + shape.vocab * shape.hidden
    return weights * shape.dtype_bytes + shape.kv_bytes * (shared + batch * own)
