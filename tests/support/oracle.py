"""Adaptive parallel encoding (APE) written out from its formula, as a reference for tests.

Yang, Chen and Chen, "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel
Encoding", ICLR 2025, section 4. Plain fp32 torch on the CPU: no serving code, no model library,
every operation of the model written down. It covers decoders of the Llama and Qwen2 kind without
scaled RoPE or sliding windows.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on small matrices, waiting for others costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Completion(NamedTuple):
    token_ids: list[int]  # greedy tokens
    logprobs: list[float]  # log-probability of each of them
    logits: torch.Tensor  # (max_new_tokens, vocab) fp32, those each token was taken from


class LayerKV(NamedTuple):
    """Keys, already rotated, and values of one layer, both (kv_heads, tokens, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, other: "LayerKV") -> "LayerKV":
        return LayerKV(
            torch.cat([self.keys, other.keys], dim=1), torch.cat([self.values, other.values], dim=1)
        )

    def since(self, start: int) -> "LayerKV":
        return LayerKV(self.keys[:, start:], self.values[:, start:])


class Contexts(NamedTuple):
    """All contexts as one group, and how the query reads them."""

    kv: list[LayerKV]  # one a layer, the contexts' own tokens only
    temperature: float
    scale: float
    bias: torch.Tensor  # (tokens,) natural log, added to their logits after the temperature


class Oracle:
    """A checkpoint that answers APE requests one at a time.

    Terms: the prefix stands at positions 0…, every context at positions from len(prefix), the
    query and what is generated at positions from len(prefix) + the longest context's length.
    """

    def __init__(self, model_path: Path):
        self.model_path = Path(model_path)
        config = json.loads((self.model_path / "config.json").read_text())
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.rope_theta: float = config["rope_theta"]
        self.rms_norm_eps: float = config["rms_norm_eps"]
        self.weights: dict[str, torch.Tensor] = {}
        for shard in sorted(self.model_path.glob("*.safetensors")):
            self.weights |= {name: w.float() for name, w in load_file(shard).items()}
        tied = config.get("tie_word_embeddings", False)
        self.head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    @one_thread()
    def generate(
        self,
        prefix: Sequence[int],
        contexts: Sequence[Sequence[int]],
        query: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        scale: float = 1.0,
        bias: Sequence[float] | None = None,
    ) -> Completion:
        """Continue `query` greedily after `prefix` and `contexts`. EOS does not end it.

        `bias` is added to the log-sum-exp of each context before they are joined; none by default.
        """
        past, group, start = self._encode(prefix, contexts, temperature, scale, bias)
        return self._decode(query, start, past, group, max_new_tokens)

    @one_thread()
    def generate_plain(self, ids: Sequence[int], max_new_tokens: int) -> Completion:
        """Continue `ids` greedily as an ordinary causal sequence. EOS does not end it."""
        return self._decode(ids, 0, self._no_kv(), None, max_new_tokens)

    @one_thread()
    def query_logprobs(
        self,
        prefix: Sequence[int],
        contexts: Sequence[Sequence[int]],
        query: Sequence[int],
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> list[float]:
        """Log-probabilities of query[1:], each given all that stands before it."""
        past, group, start = self._encode(prefix, contexts, temperature, scale)
        logits, _ = self._forward(query, start, past, group)
        logprobs = logits[:-1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(query[1:]).view(-1, 1)).flatten().tolist()

    @one_thread()
    def likelihood(
        self, prefix: Sequence[int], context: Sequence[int], query: Sequence[int]
    ) -> float:
        """log P(query | prefix, context) in nats, as an ordinary causal sequence."""
        before = [*prefix, *context]
        logits, _ = self._forward([*before, *query], 0, self._no_kv(), None)
        logprobs = logits[len(before) - 1 : -1].log_softmax(-1)
        return float(logprobs.gather(1, torch.tensor(query).view(-1, 1)).sum())

    @cached_property
    def _null_text(self) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.model_path / "tokenizer.json"))
        return tokenizer.encode("N/A", add_special_tokens=False).ids

    def null(self, query: Sequence[int]) -> list[int]:
        """A null query: a text that asks for nothing, with the last tokens of the query."""
        return [*self._null_text, *query[len(query) - min(5, len(query) // 2) :]]

    @one_thread()
    def attention_scores(
        self,
        prefix: Sequence[int],
        contexts: Sequence[Sequence[int]],
        query: Sequence[int],
        null: Sequence[int],
    ) -> list[float]:
        """How much the query attends to each context, more than the null query does.

        Both read the prefix and themselves only. For a layer and a head, a context's mass is the
        mean over a query's tokens of its share of exp(log-sum-exp) among prefix, own past and all
        contexts. Its score is the log of the mean, over layers and heads, of the square of what
        the query's mass is above the null query's.
        """
        past, group, start = self._encode(prefix, contexts, 1.0, 1.0)
        assert group is not None
        masses = []
        for ids in (query, null):
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []
            self._forward(ids, start, past, None, seen)
            masses.append(
                torch.stack([self._mass(*own, group.kv[i], contexts) for i, own in enumerate(seen)])
            )
        squares = (masses[0] - masses[1]).clamp(min=0) ** 2  # (layers, heads, contexts)
        return (squares.mean((0, 1)) + 1e-12).log().tolist()

    def _mass(
        self, q: torch.Tensor, lse: torch.Tensor, kv: LayerKV, contexts: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        parts, start = [lse], 0
        for context in contexts:
            own = LayerKV(*(part[:, start : start + len(context)] for part in kv))
            parts.append(self._softmax_attention(q, own, self.head_dim**-0.5, causal=False)[1])
            start += len(context)
        return torch.stack(parts).softmax(0)[1:].mean(-1).T

    def _encode(
        self,
        prefix: Sequence[int],
        contexts: Sequence[Sequence[int]],
        temperature: float,
        scale: float,
        bias: Sequence[float] | None = None,
    ) -> tuple[list[LayerKV], Contexts | None, int]:
        """Encode the prefix, then each context as if it alone followed the prefix.

        Returns the prefix's KV, the contexts (None without context tokens) and the first
        position of the query.
        """
        past = self._no_kv()
        if len(prefix):
            _, past = self._forward(prefix, 0, past, None)
        group = self._no_kv()
        for context in filter(len, contexts):
            _, extended = self._forward(context, len(prefix), past, None)
            group = [g.append(kv.since(len(prefix))) for g, kv in zip(group, extended, strict=True)]

        longest = max(map(len, contexts), default=0)
        lens = torch.tensor([len(context) for context in contexts], dtype=torch.int64)
        of_token = torch.tensor(bias or [0.0] * len(contexts)).repeat_interleave(lens)
        read = Contexts(group, temperature, scale, of_token) if longest else None
        return past, read, len(prefix) + longest

    def _decode(
        self,
        query: Sequence[int],
        start: int,
        past: list[LayerKV],
        contexts: Contexts | None,
        max_new_tokens: int,
    ) -> Completion:
        tokens: list[int] = []
        logprobs: list[float] = []
        steps: list[torch.Tensor] = []
        ids, position = list(query), start
        while len(tokens) < max_new_tokens:
            logits, past = self._forward(ids, position, past, contexts)
            position += len(ids)
            steps.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
            logprobs.append(float(logits[-1].log_softmax(-1)[tokens[-1]]))
            ids = tokens[-1:]
        return Completion(tokens, logprobs, torch.stack(steps))

    @torch.no_grad()
    def _forward(
        self,
        ids: Sequence[int],
        start: int,
        past: list[LayerKV],
        contexts: Contexts | None,
        seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, list[LayerKV]]:
        """Run `ids` at positions from `start`, after `past` and beside `contexts`.

        Returns logits (tokens, vocab) and `past` with the new tokens appended. `seen` gets each
        layer's queries and their log-sum-exp over the path.
        """
        angles = self._rope_angles(start, len(ids))
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        extended = []
        for layer in range(self.num_layers):
            block = f"model.layers.{layer}"
            q, new = self._qkv(self._rms_norm(x, f"{block}.input_layernorm"), block, angles)
            path = past[layer].append(new)
            attended = self._attention(q, path, contexts, layer, seen)
            x = x + self._linear(attended, f"{block}.self_attn.o_proj")
            x = x + self._mlp(self._rms_norm(x, f"{block}.post_attention_layernorm"), block)
            extended.append(path)
        return self._rms_norm(x, "model.norm") @ self.head.T, extended

    def _attention(
        self,
        q: torch.Tensor,
        path: LayerKV,
        contexts: Contexts | None,
        layer: int,
        seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """APE attention of q (heads, tokens, head_dim); returns (tokens, heads * head_dim).

        `path` ends with the tokens of q themselves. The contexts are read without a mask and
        with the temperature, the path causally and without it; the two outputs are then weighted
        by softmax([S·T·L_c, L_o]).
        """
        output, lse = self._softmax_attention(q, path, self.head_dim**-0.5, causal=True)
        if seen is not None:
            seen.append((q, lse))
        if contexts is not None:
            temperature, scale = contexts.temperature, contexts.scale
            sm_scale = self.head_dim**-0.5 / temperature
            output_c, lse_c = self._softmax_attention(
                q, contexts.kv[layer], sm_scale, causal=False, bias=contexts.bias
            )
            weights = torch.stack([scale * temperature * lse_c, lse]).softmax(0).unsqueeze(-1)
            output = weights[0] * output_c + weights[1] * output
        return output.transpose(0, 1).flatten(1)

    def _softmax_attention(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        sm_scale: float,
        causal: bool,
        bias: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q (heads, tokens, head_dim) over `kv`, whose last tokens are q's if causal.

        Returns the output, shaped like q, and the natural log-sum-exp (heads, tokens).
        """
        heads_per_kv = self.num_heads // self.num_kv_heads
        keys = kv.keys.repeat_interleave(heads_per_kv, dim=0)
        values = kv.values.repeat_interleave(heads_per_kv, dim=0)
        scores = q @ keys.transpose(1, 2) * sm_scale + bias
        if causal:
            rows, columns = scores.shape[1:]
            visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    def _qkv(
        self, x: torch.Tensor, block: str, angles: torch.Tensor
    ) -> tuple[torch.Tensor, LayerKV]:
        def heads(name: str) -> torch.Tensor:
            projected = self._linear(x, f"{block}.self_attn.{name}_proj")
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

        return rotate(heads("q"), angles), LayerKV(rotate(heads("k"), angles), heads("v"))

    def _mlp(self, x: torch.Tensor, block: str) -> torch.Tensor:
        gate = F.silu(self._linear(x, f"{block}.mlp.gate_proj"))
        return self._linear(
            gate * self._linear(x, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj"
        )

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.rms_norm_eps) * self.weights[f"{name}.weight"]

    def _rope_angles(self, start: int, count: int) -> torch.Tensor:
        """Angles (count, head_dim / 2) of the positions from `start`."""
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        positions = torch.arange(start, start + count).float()
        return torch.outer(positions, 1.0 / self.rope_theta**exponents)

    def _no_kv(self) -> list[LayerKV]:
        empty = torch.empty(self.num_kv_heads, 0, self.head_dim)
        return [LayerKV(empty, empty)] * self.num_layers


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate x (heads, tokens, head_dim); coordinate i is paired with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
