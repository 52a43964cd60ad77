"""Shapes of Llama models, for servers that make up the weights."""

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
    """Write a ``config.json`` from which SGLang builds the model without weights."""
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


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes beside a config, for engines that need one though all
    prompts are token ids.
    """
    # Not before: most who need a shape need no tokenizer.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
