"""The fp32 oracle against transformers, and against the properties the formula promises."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from tests.support.models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_llama, tiny_qwen2
from tests.support.oracle import Oracle, one_thread

PREFIX_LEN = 5
CONTEXT_LENS = (9, 4, 13)
QUERY_LEN = 6
NEW_TOKENS = 8
VISIBLE = 0.1  # a change of logits that no rounding explains


class Prompt(NamedTuple):
    prefix: list[int]
    contexts: list[list[int]]
    query: list[int]


class Layout(NamedTuple):
    """An APE prompt as one dense sequence of prefix, contexts and query."""

    ids: torch.Tensor  # (tokens,)
    positions: torch.Tensor  # (tokens,)
    visible: torch.Tensor  # (tokens, tokens) bool, which key (column) a token (row) attends to
    from_contexts: slice  # the columns of all contexts
    to_query: slice  # the rows of the query


def adaptive_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    ape: tuple[Layout, float, float],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """APE as one softmax for transformers' models, another way to say the two-part merge.

    exp(S·T·L_c) · softmax_j(s_j / T) = exp(s_j / T + (S·T - 1)·L_c), so that a query token's
    context scores need an offset, and no log-sum-exp of the rest.
    """
    layout, temperature, scale = ape
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling + attention_mask
    block = scores[..., layout.to_query, layout.from_contexts] / temperature
    offset = (scale * temperature - 1) * block.logsumexp(-1, keepdim=True)
    scores[..., layout.to_query, layout.from_contexts] = block + offset
    output = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("adaptive_attention", adaptive_attention)


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session", params=[tiny_llama, tiny_qwen2])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = request.param
    return make(tmp_path_factory.mktemp(make.__name__))


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture
def prompt() -> Prompt:
    contexts = [random_ids(length, seed=10 + i) for i, length in enumerate(CONTEXT_LENS)]
    return Prompt(random_ids(PREFIX_LEN, seed=1), contexts, random_ids(QUERY_LEN, seed=2))


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (length,), generator=generator).tolist()


def load_model(checkpoint: Path, attention: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )


def lay_out(prompt: Prompt) -> Layout:
    prefix, contexts, query = prompt
    query_start = len(prefix) + max(map(len, contexts))
    starts = [0, *(len(prefix) for _ in contexts), query_start]
    segments = [prefix, *contexts, query]
    positions = [s + i for s, part in zip(starts, segments, strict=True) for i in range(len(part))]
    owner = torch.tensor([i for i, part in enumerate(segments) for _ in part])

    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    same_segment = owner[:, None] == owner[None, :]
    key_in_prefix = owner[None, :] == 0
    row_in_query = owner[:, None] == len(segments) - 1
    return Layout(
        ids=torch.tensor([token for part in segments for token in part]),
        positions=torch.tensor(positions),
        visible=causal & (same_segment | key_in_prefix | row_in_query),
        from_contexts=slice(len(prefix), len(owner) - len(query)),
        to_query=slice(len(owner) - len(query), len(owner)),
    )


@torch.no_grad()
def dense_query_logits(
    model: PreTrainedModel, layout: Layout, bias: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    bias = torch.zeros(layout.visible.shape) if bias is None else bias
    mask = bias.masked_fill(~layout.visible, -torch.inf)
    output = model(
        input_ids=layout.ids[None],
        position_ids=layout.positions[None],
        attention_mask=mask[None, None],
        use_cache=False,
        **kwargs,
    )
    return output.logits[0, layout.to_query]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def largest_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def with_answer(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """The prompt whose last logits are those each of `token_ids` was taken from."""
    return prompt._replace(query=[*prompt.query, *token_ids[:-1]])


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_plain_logits_equal_transformers(checkpoint: Path, oracle: Oracle, length: int) -> None:
    ids = random_ids(length, seed=length)
    completion = oracle.generate_plain(ids, NEW_TOKENS)
    with torch.no_grad():
        output = load_model(checkpoint, "eager")(torch.tensor([ids + completion.token_ids[:-1]]))
    expected = output.logits[0, -NEW_TOKENS:]
    assert_same(completion.logits, expected)
    assert completion.token_ids == expected.argmax(-1).tolist()


def test_one_context_without_temperature_and_scale_is_the_plain_sequence(
    oracle: Oracle, prompt: Prompt
) -> None:
    context = prompt.contexts[0]
    plain = oracle.generate_plain([*prompt.prefix, *context, *prompt.query], NEW_TOKENS)
    parallel = oracle.generate(prompt.prefix, [context], prompt.query, NEW_TOKENS)
    assert parallel.token_ids == plain.token_ids
    assert_same(parallel.logits, plain.logits)


@pytest.mark.parametrize("contexts", [[], [[]], [[], []]])
def test_no_context_tokens_leave_the_plain_sequence(
    oracle: Oracle, prompt: Prompt, contexts: list[list[int]]
) -> None:
    plain = oracle.generate_plain([*prompt.prefix, *prompt.query], NEW_TOKENS)
    bare = oracle.generate(prompt.prefix, contexts, prompt.query, NEW_TOKENS, 0.5, 0.5)
    assert bare.token_ids == plain.token_ids
    assert_same(bare.logits, plain.logits)


@pytest.mark.parametrize("prefix_len", [0, PREFIX_LEN])
def test_neutral_logits_equal_one_softmax_over_a_dense_mask(
    checkpoint: Path, oracle: Oracle, prompt: Prompt, prefix_len: int
) -> None:
    prompt = prompt._replace(prefix=prompt.prefix[:prefix_len], contexts=prompt.contexts[:2])
    completion = oracle.generate(*prompt, NEW_TOKENS)
    layout = lay_out(with_answer(prompt, completion.token_ids))
    logits = dense_query_logits(load_model(checkpoint, "eager"), layout)
    assert_same(completion.logits, logits[-NEW_TOKENS:])


@pytest.mark.parametrize("temperature", [0.2, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 0.8, 1.0, 2.0])
def test_temperature_and_scale_equal_offset_scores_in_one_softmax(
    checkpoint: Path, oracle: Oracle, prompt: Prompt, temperature: float, scale: float
) -> None:
    completion = oracle.generate(*prompt, NEW_TOKENS, temperature, scale)
    layout = lay_out(with_answer(prompt, completion.token_ids))
    model = load_model(checkpoint, "adaptive_attention")
    logits = dense_query_logits(model, layout, ape=(layout, temperature, scale))
    assert_same(completion.logits, logits[-NEW_TOKENS:])


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, 0.5), (2.0, 1.0), (1.0, 2.0)])
def test_temperature_and_scale_each_move_the_logits(
    oracle: Oracle, prompt: Prompt, temperature: float, scale: float
) -> None:
    neutral = oracle.generate(*prompt, 1)
    moved = oracle.generate(*prompt, 1, temperature, scale)
    assert largest_change(moved.logits, neutral.logits) > VISIBLE


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_order_of_contexts_changes_nothing(
    oracle: Oracle, prompt: Prompt, order: tuple[int, ...]
) -> None:
    permuted = prompt._replace(contexts=[prompt.contexts[i] for i in order])
    given, other = (oracle.generate(*p, NEW_TOKENS, 0.8, 0.9) for p in (prompt, permuted))
    assert given.token_ids == other.token_ids
    assert_same(given.logits, other.logits)


def test_equal_contexts_count_as_often_as_given(
    checkpoint: Path, oracle: Oracle, prompt: Prompt
) -> None:
    first, second, _ = prompt.contexts
    once = prompt._replace(contexts=[first, second])
    twice = prompt._replace(contexts=[first, second, first])
    completion = oracle.generate(*twice, NEW_TOKENS)

    # Twice is the same as once with log 2 added to the scores of the repeated context.
    layout = lay_out(with_answer(once, completion.token_ids))
    bias = torch.zeros(layout.visible.shape)
    bias[layout.to_query, PREFIX_LEN : PREFIX_LEN + len(first)] = torch.tensor(2.0).log()
    logits = dense_query_logits(load_model(checkpoint, "eager"), layout, bias=bias)
    assert_same(completion.logits, logits[-NEW_TOKENS:])
    assert largest_change(completion.logits[0], oracle.generate(*once, 1).logits[0]) > VISIBLE


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("scale", [0.8, 1.0])
def test_a_bias_is_added_to_the_scores_of_its_context_behind_the_temperature(
    checkpoint: Path, oracle: Oracle, prompt: Prompt, temperature: float, scale: float
) -> None:
    bias = [-0.7, 0.0, -2.0]
    completion = oracle.generate(*prompt, NEW_TOKENS, temperature, scale, bias)
    layout = lay_out(with_answer(prompt, completion.token_ids))
    of_token = torch.tensor(bias).repeat_interleave(torch.tensor(CONTEXT_LENS))
    mask = torch.zeros(layout.visible.shape)
    mask[layout.to_query, layout.from_contexts] = temperature * of_token  # which divides it again
    model = load_model(checkpoint, "adaptive_attention")
    logits = dense_query_logits(model, layout, bias=mask, ape=(layout, temperature, scale))
    assert_same(completion.logits, logits[-NEW_TOKENS:])
    without = oracle.generate(*prompt, 1, temperature, scale)
    assert largest_change(completion.logits[0], without.logits[0]) > VISIBLE


def test_a_likelihood_is_that_of_the_ordinary_sequence(
    checkpoint: Path, oracle: Oracle, prompt: Prompt
) -> None:
    context = prompt.contexts[1]
    before = [*prompt.prefix, *context]
    with torch.no_grad():
        logits = load_model(checkpoint, "eager")(torch.tensor([[*before, *prompt.query]])).logits[0]
    expected = sum(
        logits[len(before) + i - 1].log_softmax(-1)[token].item()
        for i, token in enumerate(prompt.query)
    )
    found = oracle.likelihood(prompt.prefix, context, prompt.query)
    assert found == pytest.approx(expected, abs=1e-4)


def test_query_logprobs_agree_with_generation(oracle: Oracle, prompt: Prompt) -> None:
    completion = oracle.generate(*prompt, NEW_TOKENS, 0.8, 0.9)
    query = [*prompt.query, *completion.token_ids]
    logprobs = oracle.query_logprobs(prompt.prefix, prompt.contexts, query, 0.8, 0.9)
    assert len(logprobs) == len(query) - 1
    assert logprobs[-NEW_TOKENS:] == pytest.approx(completion.logprobs, abs=1e-4)


def test_greedy_tokens_vary(oracle: Oracle) -> None:
    for seed in range(4):
        tokens = oracle.generate_plain(random_ids(20, seed), 16).token_ids
        assert len(set(tokens)) >= 8, tokens
        assert min(tokens) >= len(SPECIAL_TOKENS), tokens
