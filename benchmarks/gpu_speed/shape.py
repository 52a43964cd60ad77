"""The model's shape, and how many operations and bytes its steps cannot do without.

Attention is counted for every (query row, key row) pair that the mask lets through: one product
for the score and one for the value, each of ``head_dim`` multiply-adds a head and layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Shape(NamedTuple):
    """A Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str  # as SGLang's ``dtype`` takes it
    dtype_bytes: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices; the norms are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that one token takes in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128_256, "bfloat16", 2)
TINY = Shape(64, 128, 2, 4, 2, 16, 512, "float32", 4)


def write_config(shape: Shape, folder: Path) -> None:
    """Write a ``config.json`` from which SGLang builds the model with ``load_format="dummy"``."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "rope_theta": 500_000.0,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


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
