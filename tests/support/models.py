"""Tiny random-weight checkpoints in the Hugging Face layout, made on the spot.

The weights are far larger than any initialiser would draw them, so that attention is peaked,
greedy decoding wanders over the vocabulary, and a wrong mask, position, temperature or scale
moves the logits by whole units rather than by rounding.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 512
HIDDEN_SIZE = 64
NUM_LAYERS = 2

BOS, EOS, IM_START, IM_END = SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = range(4)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# How Qwen2 splits text. transformers' Qwen2Tokenizer rebuilds this splitting and the NFC
# normaliser whatever tokenizer.json says, so that a file with others would mean different ids to
# different loaders.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_WEIGHT_STD = 0.2  # at HIDDEN_SIZE
_NORM_STD = 0.1
_BIAS_STD = 0.5
_SPECIAL_ROW_FACTOR = 0.05

_TRAINING_TEXT = """\
The harbour master keeps a ledger of every ship that enters the bay.
On Monday the Heron brought salt and timber; on Tuesday the Lark brought wool and barley.
A lighthouse stands on the northern cliff, and its keeper trims the lamp each evening.
Question: which ship carried the timber? Answer: the Heron, on Monday.
Question: who trims the lamp? Answer: the keeper of the lighthouse on the northern cliff.
Rivers begin as springs in the mountains and grow as streams join them.
Snow that falls in winter becomes water in spring, and the fields below drink it in summer.
The museum opens at nine in the morning and closes at five in the afternoon.
Visitors should leave their umbrellas, bags and coats at the desk beside the entrance.
Document 1: copper melts at 1085 degrees. Document 2: tin melts at 232 degrees.
Document 3: bronze is a mixture of copper and tin, harder than either of them alone.
Use the documents above to answer the question below, and say so when they do not contain it.
You are a helpful assistant. Answer shortly, and only from what the documents say.
The baker mixes flour, water, salt and yeast, and lets the dough rest for three hours.
Then she heats the oven, shapes the loaves, and sells them warm before the school bell rings.
What does the baker do first? She mixes the flour with the water, then the salt and the yeast.
Seven trains leave the station between noon and midnight; the last of them stops everywhere.
A ticket costs 4 coins for a child, 8 coins for an adult, and 6 coins for a student.
The gardener planted beans in rows, and between the rows she planted lettuce and onions.
If the weather is dry she waters them twice a day, otherwise she leaves them to the rain.
Each letter was sorted by street, tied with string and carried up the hill by the postman.
The review was positive: a moving story, well told, with a surprising end.
The review was negative: a long and tiresome story, badly told, with no end at all.
Parallel lines never meet, however far they are drawn; other lines meet exactly once.
"""


class Shape(NamedTuple):
    """Attention heads of a checkpoint, and the type that its weights are stored in."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32


def tiny_llama(directory: Path, shape: Shape = Shape()) -> Path:  # noqa: B008  immutable
    """Write a two-layer Llama checkpoint to `directory`, unless it is there already.

    Untied embeddings, no biases; its tokenizer puts BOS first.
    """
    config = _base_config(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
    }
    return _write_checkpoint(Path(directory), config, seed=1)


def tiny_qwen2(directory: Path, shape: Shape = Shape()) -> Path:  # noqa: B008  immutable
    """Write a two-layer Qwen2 checkpoint to `directory`, unless it is there already.

    Tied embeddings, random query/key/value biases; its tokenizer knows no BOS.
    """
    config = _base_config(shape) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    return _write_checkpoint(Path(directory), config, seed=2)


def _base_config(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.num_heads * shape.head_dim,
        "intermediate_size": 2 * shape.num_heads * shape.head_dim,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS_ID,
        "torch_dtype": str(shape.dtype).removeprefix("torch."),
    }


def _write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> Path:
    config_path = directory / "config.json"
    if config_path.exists():
        return directory

    directory.mkdir(parents=True, exist_ok=True)
    qwen2 = config["model_type"] == "qwen2"
    dtype = getattr(torch, config["torch_dtype"])
    weights = {name: w.to(dtype) for name, w in _random_weights(config, qwen2, seed).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer_class = "Qwen2Tokenizer" if qwen2 else "PreTrainedTokenizerFast"
    _write_tokenizer(directory, tokenizer_class, with_bos=config["bos_token_id"] is not None)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", special_ids | {"do_sample": False})
    _write_json(config_path, config)  # last: its presence says that the rest is complete
    return directory


def _random_weights(config: dict[str, Any], qkv_bias: bool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, tied = config["hidden_size"], config["tie_word_embeddings"]
    intermediate, head_dim = config["intermediate_size"], config["head_dim"]
    weight_std = _WEIGHT_STD * (HIDDEN_SIZE / hidden) ** 0.5

    def normal(*shape: int, std: float = weight_std, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    def norm() -> torch.Tensor:
        return normal(hidden, std=_NORM_STD, mean=1.0)

    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    weights = {"model.embed_tokens.weight": normal(VOCAB_SIZE, hidden)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = normal(size, hidden)
            if qkv_bias:
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = normal(size, std=_BIAS_STD)
        weights[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, q_size)
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
        weights[f"{prefix}.mlp.gate_proj.weight"] = normal(intermediate, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = normal(intermediate, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, intermediate)
    weights["model.norm.weight"] = norm()
    if not tied:
        weights["lm_head.weight"] = normal(VOCAB_SIZE, hidden)

    # Short rows keep the special tokens' logits near zero, far below the largest of the others:
    # greedy decoding never ends a sequence on its own. They still differ from one another as
    # inputs, for RMSNorm removes the length and keeps the direction.
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    head[: len(SPECIAL_TOKENS)] *= _SPECIAL_ROW_FACTOR
    return weights


def _write_tokenizer(directory: Path, tokenizer_class: str, with_bos: bool) -> None:
    _train_tokenizer(with_bos).save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": tokenizer_class,
            "bos_token": BOS if with_bos else None,
            "eos_token": EOS,
            # Named, or Qwen2Tokenizer adds a token of its own beyond the model's vocabulary.
            "pad_token": EOS,
            "unk_token": EOS,
            "extra_special_tokens": [IM_START, IM_END],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _train_tokenizer(with_bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    split = Split(Regex(_SPLIT_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT.splitlines(keepends=True), trainer)
    if with_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
        )
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
