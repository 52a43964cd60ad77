"""The torch reference against a plain softmax in float64."""

import math
from collections.abc import Iterator

import pytest
import torch

from flashinfer_ext.reference import EMPTY_LSE, attention_state, merge_state_scaled
from tests.support.oracle import one_thread

TOLERANCE = 1e-5
HEADS = 8
EMPTY = [-math.inf, -5e4, EMPTY_LSE]  # torch's, FlashInfer's, and the largest that counts as one
State = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(qo_len: int, kv_len: int, ratio: int, head_dim: int, seed: int = 0) -> list[torch.Tensor]:
    kv_heads = HEADS // ratio
    shapes = [(qo_len, HEADS, head_dim), *[(kv_len, kv_heads, head_dim)] * 2]
    return [randn(*shape, seed=3 * seed + i) for i, shape in enumerate(shapes)]


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    bias: torch.Tensor | float = 0.0,
) -> State:
    """Head by head in float64; base-2 log-sum-exp; a row that sees nothing is an empty state."""
    qo_len, heads, _ = q.shape
    kv_len, kv_heads, _ = k.shape
    out = torch.zeros(qo_len, heads, v.shape[2], dtype=torch.float64)
    lse = torch.full((qo_len, heads), -math.inf, dtype=torch.float64)
    hidden = torch.arange(kv_len) > torch.arange(qo_len)[:, None] + kv_len - qo_len
    for head in range(heads):
        own = head // (heads // kv_heads)
        logits = q[:, head].double() @ k[:, own].double().T * scale + bias
        if causal:
            logits = logits.masked_fill(hidden, -math.inf)
        seen = ~torch.isneginf(logits).all(-1)
        out[seen, head] = logits[seen].softmax(-1) @ v[:, own].double()
        lse[:, head] = logits.logsumexp(-1) / math.log(2)
    return out, lse


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative to the largest value; infinities must stand where they are expected."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(actual[~finite].double(), expected[~finite])
    difference = (actual.double() - expected)[finite].abs()
    if difference.numel():
        worst, unit = difference.max().item(), expected[finite].abs().max().item()
        assert worst <= TOLERANCE * max(unit, 1e-30), f"{worst} beyond {TOLERANCE} of {unit}"


def assert_same_state(actual: State, expected: State) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 1), (1, 17), (5, 17), (17, 17), (3, 700)])
def test_attention_equals_a_float64_softmax(
    qo_len: int, kv_len: int, head_dim: int, ratio: int, causal: bool
) -> None:
    q, k, v = qkv(qo_len, kv_len, ratio, head_dim)
    scale = head_dim**-0.5
    actual = attention_state(q, k, v, scale, causal)
    assert_same_state(actual, naive_attention(q, k, v, scale, causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 17), (5, 17), (600, 700)])
def test_a_bias_is_added_to_the_scaled_logits(qo_len: int, kv_len: int, causal: bool) -> None:
    q, k, v = qkv(qo_len, kv_len, ratio=4, head_dim=16)
    bias = -10 * randn(kv_len, seed=7).abs()
    actual = attention_state(q, k, v, 0.25, causal, bias)
    assert_same_state(actual, naive_attention(q, k, v, 0.25, causal, bias))


def test_a_bias_of_all_keys_of_a_sequence_is_added_to_its_log_sum_exp() -> None:
    q, k, v = qkv(5, 40, ratio=4, head_dim=16)
    out, lse = attention_state(q, k, v, 0.25, causal=False)
    biased = attention_state(q, k, v, 0.25, causal=False, bias=torch.full((40,), -3.0))
    assert_same_state(biased, (out.double(), lse.double() - 3 / math.log(2)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(512, 512), (513, 700), (1030, 1040)])
def test_rows_beyond_one_block_are_aligned_like_the_first(
    qo_len: int, kv_len: int, causal: bool
) -> None:
    q, k, v = qkv(qo_len, kv_len, ratio=4, head_dim=16)
    actual = attention_state(q, k, v, 0.25, causal)
    assert_same_state(actual, naive_attention(q, k, v, 0.25, causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qo_len", [1, 5, 600])
def test_no_keys_give_an_empty_state(qo_len: int, causal: bool) -> None:
    q, k, v = qkv(qo_len, 0, ratio=4, head_dim=16)
    out, lse = attention_state(q, k, v, 0.25, causal)
    assert torch.equal(out, torch.zeros(qo_len, HEADS, 16))
    assert torch.equal(lse, torch.full((qo_len, HEADS), -math.inf))


def test_a_row_that_sees_no_key_is_an_empty_state() -> None:
    q, k, v = qkv(5, 3, ratio=4, head_dim=16)
    actual = attention_state(q, k, v, 0.25, causal=True)
    assert_same_state(actual, naive_attention(q, k, v, 0.25, causal=True))


def test_values_may_be_narrower_than_keys() -> None:
    q, k, v = qkv(4, 9, ratio=4, head_dim=32)
    actual = attention_state(q, k, v[..., :16], 0.2, causal=True)
    assert_same_state(actual, naive_attention(q, k, v[..., :16], 0.2, causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_attended_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(6, 40, ratio=4, head_dim=64))
    actual = attention_state(q, k, v, 0.125, causal=True)
    assert_same_state(actual, naive_attention(q, k, v, 0.125, causal=True))


def test_large_logits_do_not_overflow() -> None:
    q, k, v = qkv(3, 20, ratio=1, head_dim=16)
    out, lse = attention_state(100 * q, k, v, 1.0, causal=False)
    expected, expected_lse = naive_attention(100 * q, k, v, 1.0, causal=False)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)  # fp32 logits near 1000
    assert_close(lse, expected_lse)


def naive_merge(a: State, b: State, exponent: torch.Tensor) -> State:
    """Weights 2^s_a and 2^(exponent * s_b) in float64, one row and head at a time."""
    (v_a, s_a), (v_b, s_b) = a, b
    out, lse = v_a.double().clone(), s_a.double().clone()
    for row in range(s_a.shape[0]):
        for head in range(s_a.shape[1]):
            if s_b[row, head] == -math.inf:
                continue
            w_b = (s_b[row, head].double() * exponent[row].double()) * math.log(2)
            logs = torch.stack([s_a[row, head].double() * math.log(2), w_b])
            weights = logs.softmax(0)
            pair = torch.stack([v_a[row, head].double(), v_b[row, head].double()])
            out[row, head] = weights @ pair
            lse[row, head] = logs.logsumexp(0) / math.log(2)
    return out, lse


def state(rows: int, low: float, high: float, seed: int) -> State:
    """A state whose log-sum-exps are spread over [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, HEADS, generator=generator)
    return randn(rows, HEADS, 16, seed=seed + 100), low + (high - low) * spread


def joined_in_two(qo_len: int, first: int, second: int, ratio: int) -> tuple[State, State, State]:
    """States over the first keys, over the others, and (float64) over all."""
    q, k, v = qkv(qo_len, first + second, ratio, head_dim=64)
    scale = 0.125
    a = attention_state(q, k[:first], v[:first], scale, causal=False)
    b = attention_state(q, k[first:], v[first:], scale, causal=False)
    return a, b, naive_attention(q, k, v, scale, causal=False)


@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (17, 700), (700, 17), (0, 17)])
def test_exponent_one_is_one_softmax_over_everything(first: int, second: int, ratio: int) -> None:
    a, b, whole = joined_in_two(5, first, second, ratio)
    assert_same_state(merge_state_scaled(*a, *b, 1.0), whole)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("bounds_a", [(-20.0, -1.0), (-3.0, 3.0), (1.0, 20.0)])
@pytest.mark.parametrize("bounds_b", [(-20.0, -1.0), (-3.0, 3.0), (1.0, 20.0)])
def test_the_second_partition_sum_is_raised_to_the_power(
    bounds_a: tuple[float, float],
    bounds_b: tuple[float, float],
    scale: float,
    temperature: float,
) -> None:
    a, b = state(4, *bounds_a, seed=1), state(4, *bounds_b, seed=2)
    exponent = scale * temperature
    expected = naive_merge(a, b, torch.full((4,), exponent, dtype=torch.float64))
    assert_same_state(merge_state_scaled(*a, *b, exponent), expected)


def test_scale_zero_counts_the_second_state_as_one() -> None:
    a, b = state(3, -5.0, 5.0, seed=3), state(3, -5.0, 5.0, seed=4)
    first = torch.exp2(a[1].double())
    share = (first / (first + 1)).unsqueeze(-1)
    expected = a[0].double() * share + b[0].double() * (1 - share)
    out, lse = merge_state_scaled(*a, *b, 0.0)
    assert_close(out, expected)
    assert_close(lse, torch.log2(first + 1))


def test_two_logs_of_any_base_share_one_power() -> None:
    """The weights are those of exp(L_o) and exp(S * T * L_c) with natural logarithms."""
    q, k, v = qkv(3, 30, ratio=4, head_dim=16)
    temperature, scale = 0.5, 0.8
    a = naive_attention(q, k[:10], v[:10], 0.25, causal=False)
    b = naive_attention(q, k[10:], v[10:], 0.25 / temperature, causal=False)
    natural = torch.stack([a[1], scale * temperature * b[1]]) * math.log(2)
    weights = natural.softmax(0).unsqueeze(-1)
    states = [x.float() for x in (*a, *b)]
    out, _ = merge_state_scaled(*states, scale * temperature)
    assert_close(out, weights[0] * a[0] + weights[1] * b[0])


@pytest.mark.parametrize("form", ["rows", "column", "full"])
def test_every_row_may_have_an_exponent_of_its_own(form: str) -> None:
    a, b = state(4, -6.0, 6.0, seed=5), state(4, -6.0, 6.0, seed=6)
    rows = torch.tensor([0.0, 0.45, 1.0, 1.5])
    shaped = {"rows": rows, "column": rows[:, None], "full": rows[:, None].expand(4, HEADS)}
    assert_same_state(merge_state_scaled(*a, *b, shaped[form]), naive_merge(a, b, rows))


def test_as_many_rows_as_heads_does_not_confuse_the_exponents() -> None:
    a, b = state(HEADS, -6.0, 6.0, seed=7), state(HEADS, -6.0, 6.0, seed=8)
    rows = torch.linspace(0, 1.5, HEADS)
    assert_same_state(merge_state_scaled(*a, *b, rows), naive_merge(a, b, rows))


def empty_state(rows: int, lse: float) -> State:
    return torch.zeros(rows, HEADS, 16), torch.full((rows, HEADS), lse)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_an_empty_second_state_leaves_the_first_unchanged(exponent: float, empty: float) -> None:
    a = state(4, -30.0, 30.0, seed=9)
    out, lse = merge_state_scaled(*a, *empty_state(4, empty), exponent)
    assert torch.equal(out, a[0])
    assert torch.equal(lse, a[1])


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_an_empty_first_state_gives_the_second_with_its_power(
    exponent: float, empty: float
) -> None:
    b = state(4, -10.0, 10.0, seed=10)
    out, lse = merge_state_scaled(*empty_state(4, empty), *b, exponent)
    assert_close(out, b[0].double())
    assert_close(lse, b[1].double() * exponent)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_two_empty_states_stay_empty(exponent: float, empty: float) -> None:
    out, lse = merge_state_scaled(*empty_state(2, empty), *empty_state(2, empty), exponent)
    assert torch.equal(out, torch.zeros(2, HEADS, 16))
    assert (lse <= EMPTY_LSE).all()


@pytest.mark.parametrize("low", [-4e4, -1e4])
def test_a_very_small_second_state_is_not_an_empty_one(low: float) -> None:
    """At exponent 0 it still counts as one; an empty state would count as nothing."""
    a, b = state(2, -0.5, 0.5, seed=15), state(2, low, low, seed=16)
    expected = naive_merge(a, b, torch.zeros(2, dtype=torch.float64))
    assert_same_state(merge_state_scaled(*a, *b, 0.0), expected)


def test_only_rows_with_an_empty_second_state_keep_the_first() -> None:
    a, b = state(3, -2.0, 2.0, seed=11), state(3, -2.0, 2.0, seed=12)
    b[1][1] = -math.inf
    expected = naive_merge(a, b, torch.full((3,), 0.7, dtype=torch.float64))
    out, lse = merge_state_scaled(*a, *b, 0.7)
    assert_same_state((out, lse), expected)
    assert torch.equal(out[1], a[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_keeps_its_dtype_and_the_log_stays_fp32(dtype: torch.dtype) -> None:
    a, b = state(2, 0.0, 4.0, seed=13), state(2, 0.0, 4.0, seed=14)
    out, lse = merge_state_scaled(a[0].to(dtype), a[1], b[0].to(dtype), b[1], 0.9)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
