"""The Triton merge on a GPU against its fp32 reference and against ``flashinfer.merge_state``."""

import math
from typing import NamedTuple

import pytest
import torch

from flashinfer_ext.merge import (
    StateLists,
    launch_merge,
    launch_merge_states,
    merge_state_scaled,
    merge_states_scaled,
)
from flashinfer_ext.reference import merge_state_scaled as reference_merge
from flashinfer_ext.reference import merge_states_scaled as reference_merge_states

EMPTY = (-math.inf, -5e4)  # what torch and what FlashInfer write

# Of the norm, beside the fp32 reference of the same inputs. fp32: an exponent of base 2 of some
# 400 has a rounding error of 2^-16. Rounding a correct result to fp16 adds at most 2^-11 = 4.9e-4;
# to bf16 at most 2^-8 = 3.9e-3, which is why bf16 is also compared with the rounded reference,
# from which only values at a tie of the rounding may differ.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 2**-8}
TOLERANCE_OF_ROUNDED = 1e-3


class Merge(NamedTuple):
    v_a: torch.Tensor
    s_a: torch.Tensor
    v_b: torch.Tensor
    s_b: torch.Tensor
    exponents: torch.Tensor


def random_merge(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0, spread: float = 10.0
) -> Merge:
    """Log-sum-exps of both signs; exponents from 0 to 15."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    v_a, v_b = randn(2, rows, heads, head_dim).to(dtype)
    s_a, s_b = spread * randn(2, rows, heads)
    exponents = 15 * torch.rand(rows, generator=generator, device="cuda") ** 3
    return Merge(v_a, s_a, v_b, s_b, exponents)


def with_empty_rows(merge: Merge) -> Merge:
    """Rows 0 and 1 lack the second state, 2 and 3 the first, row 4 both; 5 lacks some heads."""
    merge.s_b[0], merge.s_b[1] = EMPTY
    merge.s_a[2], merge.s_a[3] = EMPTY
    merge.s_a[4], merge.s_b[4] = EMPTY
    merge.s_b[5, ::2] = -5e4
    return merge


def expected_of(merge: Merge, v_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    v_a, v_b = merge.v_a.float(), merge.v_b.float()
    out, lse = reference_merge(v_a, merge.s_a, v_b, merge.s_b, merge.exponents)
    return out * v_scale, lse


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.float() - expected.float()
    return (difference.norm() / expected.float().norm()).item()


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert error(out, expected) <= TOLERANCE[out.dtype]
    assert error(out, expected.to(out.dtype)) <= TOLERANCE_OF_ROUNDED


def assert_logs_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (28, 64), (5, 80)])
def test_merged_states_equal_the_reference(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    merge = with_empty_rows(random_merge(1000, heads, head_dim, dtype))
    out, lse = torch.full_like(merge.v_a, math.nan), torch.full_like(merge.s_a, math.nan)
    launch_merge(*merge, out, lse)
    expected, expected_lse = expected_of(merge)
    assert_near(out, expected)
    assert_logs_near(lse, expected_lse)
    assert torch.equal(out[[0, 1, 4]], merge.v_a[[0, 1, 4]])


@pytest.mark.parametrize("v_scale", [1.0, 0.25])
@pytest.mark.parametrize("want_lse", [False, True])
def test_merging_in_place_gives_the_same(want_lse: bool, v_scale: float) -> None:
    merge = with_empty_rows(random_merge(1000, 32, 128, torch.bfloat16))
    expected, expected_lse = expected_of(merge, v_scale)
    launch_merge(*merge, merge.v_a, merge.s_a if want_lse else None, v_scale)
    assert_near(merge.v_a, expected)
    if want_lse:
        assert_logs_near(merge.s_a, expected_lse)


def test_the_states_may_be_halves_of_one_launch() -> None:
    rows = 300
    both = random_merge(2 * rows, 32, 128, torch.bfloat16)
    halves = Merge(
        both.v_a[rows:], both.s_a[rows:], both.v_a[:rows], both.s_a[:rows], both.exponents[:rows]
    )
    out = torch.full_like(halves.v_a, math.nan)
    launch_merge(*halves, out, None)
    assert_near(out, expected_of(halves)[0])


@pytest.mark.parametrize("exponent", [0.0, 0.45, 1.0])
def test_one_exponent_serves_all_rows(exponent: float) -> None:
    merge = random_merge(100, 32, 128, torch.float16)
    shared = merge._replace(exponents=torch.full((100,), exponent, device="cuda"))
    expected, expected_lse = expected_of(shared)
    states = shared[:4]
    for form in (exponent, torch.tensor(exponent), shared.exponents):
        out, lse = merge_state_scaled(*states, form)
        assert_near(out, expected)
        assert_logs_near(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 32, 128), (2048, 32, 128)])
def test_exponent_one_is_flashinfers_merge(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    import flashinfer

    states = random_merge(rows, heads, head_dim, dtype, spread=2.0)[:4]
    out, lse = merge_state_scaled(*states, 1.0)
    expected, expected_lse = flashinfer.merge_state(*states)
    # Both are rounded, each from its own fp32 result: they differ at ties alone.
    assert error(out, expected) <= TOLERANCE_OF_ROUNDED
    assert_logs_near(lse, expected_lse)


def test_no_rows_give_no_rows() -> None:
    merge = random_merge(0, 8, 64, torch.float16)
    out, lse = merge_state_scaled(*merge)
    assert (out.shape, lse.shape) == (merge.v_a.shape, merge.s_a.shape)


def test_a_captured_merge_reads_its_inputs_at_each_replay() -> None:
    static = random_merge(64, 32, 128, torch.bfloat16)
    out, lse = torch.full_like(static.v_a, math.nan), torch.full_like(static.s_a, math.nan)
    launch_merge(*static, out, lse)  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_merge(*static, out, lse)
    for seed in (1, 2):
        fresh = with_empty_rows(random_merge(64, 32, 128, torch.bfloat16, seed))
        for kept, new in zip(static, fresh, strict=True):
            kept.copy_(new)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        expected, expected_lse = expected_of(fresh)
        assert_near(out, expected)
        assert_logs_near(lse, expected_lse)


##### Many states


def packed(rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """Head ``k * group_size + g`` of a row goes to ``[g, k]``."""
    return torch.stack([rows[:, g::group_size] for g in range(group_size)], dim=1)


PackedShape = tuple[int, int, int]  # group size, KV heads, head dimension


class States(NamedTuple):
    v_path: torch.Tensor
    s_path: torch.Tensor
    v: torch.Tensor
    s: torch.Tensor
    lists: StateLists
    exponents: torch.Tensor


Lens = list[tuple[int, int]]  # of each row: states of its contexts, and of its path

LENS = [(0, 0), (1, 0), (0, 1), (2, 15), (16, 0), (17, 1), (33, 33), (0, 17), (200, 3), (1, 200)]


def random_states(lens: Lens, shape: PackedShape, dtype: torch.dtype, seed: int = 0) -> States:
    """States in random order; every ninth is empty, of either kind, and so are heads of paths."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    contexts = torch.tensor([count for count, _ in lens], device="cuda").int()
    rows, needed = len(lens), sum(map(sum, lens))
    group_size, kv_heads, head_dim = shape
    heads = group_size * kv_heads
    s = 10 * randn(needed + 5, group_size, kv_heads)
    s[::9], s[4::18] = EMPTY
    s_path = 10 * randn(rows, heads)
    s_path[:, ::5], s_path[:, 2::10] = EMPTY
    order = torch.randperm(needed + 5, generator=generator, device="cuda")
    indptr = torch.tensor([0, *map(sum, lens)], device="cuda").cumsum(0).int()
    bias = -20 * torch.rand(needed, generator=generator, device="cuda")
    bias[::2] = 0
    exponents = 15 * torch.rand(rows, generator=generator, device="cuda") ** 3
    return States(
        randn(rows, heads, head_dim).to(dtype),
        s_path,
        randn(needed + 5, *shape).to(dtype),
        s,
        StateLists(indptr, indptr[:-1] + contexts, order[:needed].int(), bias),
        exponents,
    )


def expected_states(states: States, v_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    v_path, s_path, v, s, lists, exponents = states
    out, lse = reference_merge_states(v_path.float(), s_path, v.float(), s, *lists, exponents)
    return out * v_scale, lse


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(4, 8, 128), (7, 4, 64), (1, 5, 80)])
@pytest.mark.parametrize("biased", [False, True])
def test_many_merged_states_equal_the_reference(
    shape: PackedShape, dtype: torch.dtype, biased: bool
) -> None:
    states = random_states(LENS * 4, shape, dtype)
    if not biased:
        states = states._replace(lists=states.lists._replace(bias=None))
    out, lse = merge_states_scaled(*states)
    expected, expected_lse = expected_states(states)
    assert_near(out, expected)
    assert_logs_near(lse, expected_lse)
    assert torch.equal(out[0], states.v_path[0])


@pytest.mark.parametrize("v_scale", [1.0, 0.25])
@pytest.mark.parametrize("want_lse", [False, True])
def test_many_states_in_place_give_the_same(want_lse: bool, v_scale: float) -> None:
    states = random_states(LENS * 4, (4, 8, 128), torch.bfloat16)
    expected, expected_lse = expected_states(states, v_scale)
    launch_merge_states(*states, states.v_path, states.s_path if want_lse else None, v_scale)
    assert_near(states.v_path, expected)
    if want_lse:
        assert_logs_near(states.s_path, expected_lse)


@pytest.mark.parametrize("group_size", [1, 4, 32])
def test_one_state_a_row_is_the_merge_of_two(group_size: int) -> None:
    """With the row's exponent if it is of the contexts, with exponent 1 if it is of the path."""
    merge = random_merge(300, 32, 128, torch.bfloat16)
    states = packed(merge.v_b, group_size), packed(merge.s_b, group_size)
    one = torch.arange(301, dtype=torch.int32, device="cuda")
    path = merge.v_a, merge.s_a
    for path_start, exponents in ((one[1:], merge.exponents), (one[:-1], 1.0)):
        lists = StateLists(one, path_start, one[:-1])
        out, lse = merge_states_scaled(*path, *states, lists, merge.exponents)
        expected, expected_lse = merge_state_scaled(*merge[:4], exponents)
        assert error(out, expected) <= TOLERANCE_OF_ROUNDED
        assert_logs_near(lse, expected_lse)


def test_a_bias_of_zeros_changes_no_bit() -> None:
    states = random_states(LENS * 4, (4, 8, 128), torch.bfloat16)
    assert states.lists.bias is not None
    found = [
        merge_states_scaled(*states._replace(lists=states.lists._replace(bias=bias)))
        for bias in (None, torch.zeros_like(states.lists.bias))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_states_of_the_path_are_merged_before_those_of_the_contexts() -> None:
    """Row i has the states i, of its contexts, and 300 + i, of its path."""
    merge = with_empty_rows(random_merge(300, 32, 128, torch.float32))
    more = random_merge(300, 32, 128, torch.float32, seed=1)
    more.s_b[3], more.s_b[6] = EMPTY
    path = merge_state_scaled(*merge[:2], more.v_b, more.s_b, 1.0)
    expected, expected_lse = merge_state_scaled(*path, *merge[2:])
    states = [packed(torch.cat(x), 4) for x in ((merge.v_b, more.v_b), (merge.s_b, more.s_b))]
    indptr = torch.arange(0, 601, 2, dtype=torch.int32, device="cuda")
    index = torch.arange(600, dtype=torch.int32, device="cuda").view(2, 300).T.reshape(-1)
    lists = StateLists(indptr, indptr[:-1] + 1, index)
    out, lse = merge_states_scaled(*merge[:2], *states, lists, merge.exponents)
    assert_near(out, expected)
    assert_logs_near(lse, expected_lse)


def test_a_captured_merge_of_many_follows_its_lists() -> None:
    shape = (4, 8, 128)
    static = random_states([(20, 20)] * 16, shape, torch.bfloat16)
    out, lse = torch.full_like(static.v_path, math.nan), torch.full_like(static.s_path, math.nan)
    launch_merge_states(*static, out, lse)  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_merge_states(*static, out, lse)
    some = [(3, 0), (0, 0), (40, 37), (0, 1)]
    for seed, lens in ((1, [(0, 0)] * 16), (2, some * 4), (3, [(40, 0)] * 16), (4, [(0, 40)] * 16)):
        fresh = random_states(lens, shape, torch.bfloat16, seed)
        pairs = zip((*static, *static.lists), (*fresh, *fresh.lists), strict=True)
        for kept, new in pairs:
            if isinstance(kept, torch.Tensor):
                kept[: len(new)] = new
        graph.replay()
        expected, expected_lse = expected_states(fresh)
        assert_near(out, expected)
        assert_logs_near(lse, expected_lse)
