"""The Triton kernels, run on the CPU by Triton's interpreter, against their torch references; and
what the functions around them refuse.
"""

import importlib.util
import math
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashinfer_ext import cascade, reference
from flashinfer_ext.merge import StateLists, merge_state_scaled, merge_states_scaled
from flashinfer_ext.reference import LOWEST_BIAS, attention_state
from flashinfer_ext.reference import merge_state_scaled as reference_merge
from tests.support.oracle import one_thread

# numpy, which the interpreter computes with, warns of the infinities of empty states.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

EMPTY = (-math.inf, -5e4)  # what torch and what FlashInfer write
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one ulp
fast = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def interpreted(name: str) -> ModuleType:
    """A private copy of a module, whose kernels are made while the interpreter is on."""
    found = importlib.util.find_spec(f"flashinfer_ext.{name}")
    assert found is not None and found.origin is not None
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", found.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> Iterator[SimpleNamespace]:
    with (
        triton.knobs.runtime.scope(),
        pytest.MonkeyPatch.context() as patch,
        one_thread(),
    ):
        triton.knobs.runtime.interpret = True
        # These were compiled at import, before the knob was on; tl.reduce the interpreter replaces.
        for name, combine in (
            ("min", tl.standard._elementwise_min),
            ("max", tl.standard._elementwise_max),
            ("sum", tl.standard._sum_combine),
        ):
            patch.setattr(tl, name, lambda x, axis, f=combine: tl.reduce(x, axis, f))
        names = ("merge", "gather", "lse")
        yield SimpleNamespace(**{name: interpreted(name) for name in names})


class Merge(NamedTuple):
    v_a: torch.Tensor
    s_a: torch.Tensor
    v_b: torch.Tensor
    s_b: torch.Tensor
    exponents: torch.Tensor


def expected_of(merge: Merge, v_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in fp32."""
    v_a, v_b = merge.v_a.float(), merge.v_b.float()
    out, lse = reference_merge(v_a, merge.s_a, v_b, merge.s_b, merge.exponents)
    return out * v_scale, lse


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = ROUNDING[out.dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance / 8)


def random_merge(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Merge:
    """The states are halves of one tensor, contexts (b) first, as the cascade makes them."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(2 * rows, heads, head_dim, generator=generator).to(dtype)
    s = 12 * torch.randn(2 * rows, heads, generator=generator)
    exponents = 1.5 * torch.rand(rows, generator=generator)
    return Merge(v[rows:], s[rows:], v[:rows], s[:rows], exponents)


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    """Small states of any sign, empty ones among them."""
    rows, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 5, 8]))
    logs = st.one_of(st.floats(-60, 60, width=32), st.sampled_from(EMPTY))
    drawn = draw(st.lists(logs, min_size=2 * rows * heads, max_size=2 * rows * heads))
    exponents = draw(st.lists(st.floats(0, 15, width=32), min_size=rows, max_size=rows))
    merge = random_merge(rows, heads, draw(st.sampled_from([64, 80, 128])), torch.float32)
    s_b, s_a = torch.tensor(drawn).view(2, rows, heads)
    return merge._replace(s_a=s_a, s_b=s_b, exponents=torch.tensor(exponents))


@fast
@given(merge=merges(), v_scale=st.sampled_from([1.0, 0.25, 3.0]), want_lse=st.booleans())
def test_the_merge_kernel_equals_the_reference(
    kernels: SimpleNamespace, merge: Merge, v_scale: float, want_lse: bool
) -> None:
    expected, expected_lse = expected_of(merge, v_scale)
    out = torch.full_like(merge.v_a, math.nan)
    lse = torch.full_like(merge.s_a, math.nan) if want_lse else None
    kernels.merge.launch_merge(*merge, out, lse, v_scale)
    assert_near(out, expected)
    if lse is not None:
        assert_near(lse, expected_lse)


@fast
@given(merge=merges(), v_scale=st.sampled_from([1.0, 0.25]), want_lse=st.booleans())
def test_merging_in_place_gives_the_same(
    kernels: SimpleNamespace, merge: Merge, v_scale: float, want_lse: bool
) -> None:
    expected, expected_lse = expected_of(merge, v_scale)
    kernels.merge.launch_merge(*merge, merge.v_a, merge.s_a if want_lse else None, v_scale)
    assert_near(merge.v_a, expected)
    if want_lse:
        assert_near(merge.s_a, expected_lse)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("want_lse", [False, True])
def test_rows_without_a_second_state_keep_every_bit_of_the_first(
    kernels: SimpleNamespace, in_place: bool, want_lse: bool, empty: float
) -> None:
    merge = random_merge(rows=3, heads=6, head_dim=64, dtype=torch.bfloat16)
    merge.s_b[1] = empty
    v_a, s_a = merge.v_a[1].clone(), merge.s_a[1].clone()
    out = merge.v_a if in_place else torch.full_like(merge.v_a, math.nan)
    lse = torch.full_like(merge.s_a, math.nan) if want_lse else None
    kernels.merge.launch_merge(*merge, out, lse)
    assert torch.equal(out[1], v_a)
    if lse is not None:
        assert torch.equal(lse[1], s_a)


@pytest.mark.parametrize("empty_a", EMPTY)
@pytest.mark.parametrize("empty_b", EMPTY)
@pytest.mark.parametrize("exponent", [0.0, 1.0, 15.0])
def test_two_empty_states_stay_empty(
    kernels: SimpleNamespace, empty_a: float, empty_b: float, exponent: float
) -> None:
    v, s_a = torch.zeros(2, 3, 64), torch.full((2, 3), empty_a)
    merge = Merge(v, s_a, v, torch.full((2, 3), empty_b), torch.full((2,), exponent))
    out, lse = torch.full_like(v, math.nan), torch.full_like(s_a, math.nan)
    kernels.merge.launch_merge(*merge, out, lse)
    assert torch.equal(out, v)
    assert torch.equal(lse, s_a)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", [7, 28, 40])
def test_heads_beyond_one_block_and_every_dtype(
    kernels: SimpleNamespace, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    merge = random_merge(2, heads, head_dim, dtype)
    out, lse = torch.full_like(merge.v_a, math.nan), torch.full_like(merge.s_a, math.nan)
    kernels.merge.launch_merge(*merge, out, lse)
    expected, expected_lse = expected_of(merge, v_scale=1.0)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


def test_rows_may_stand_apart_and_share_one_exponent(kernels: SimpleNamespace) -> None:
    merge = random_merge(rows=3, heads=5, head_dim=64, dtype=torch.float32)
    v = torch.stack([merge.v_a, merge.v_b], dim=1)
    s = torch.stack([merge.s_a, merge.s_b], dim=1)
    apart = Merge(v[:, 0], s[:, 0], v[:, 1], s[:, 1], torch.tensor(0.7).expand(3))
    expected, expected_lse = expected_of(apart, v_scale=1.0)
    out = torch.full((3, 2, 5, 64), math.nan)
    kernels.merge.launch_merge(*apart, out[:, 1], apart.s_a)
    assert_near(out[:, 1], expected)
    assert_near(s[:, 0], expected_lse)
    assert out[:, 0].isnan().all()
    assert torch.equal(s[:, 1], merge.s_b)


def test_the_log_may_have_another_row_stride_than_the_states(kernels: SimpleNamespace) -> None:
    merge = random_merge(rows=3, heads=5, head_dim=64, dtype=torch.float32)
    apart = merge._replace(s_a=torch.stack([merge.s_a, merge.s_a], dim=1)[:, 0])
    lse = torch.full((9, 5), math.nan)
    kernels.merge.launch_merge(*apart, torch.empty_like(merge.v_a), lse[:3])
    assert_near(lse[:3], expected_of(merge, v_scale=1.0)[1])
    assert lse[3:].isnan().all()


def test_no_rows_need_no_launch(kernels: SimpleNamespace) -> None:
    merge = random_merge(rows=0, heads=4, head_dim=64, dtype=torch.float32)
    kernels.merge.launch_merge(*merge, merge.v_a, None)


def packed(rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """Head ``k * group_size + g`` of a row goes to ``[g, k]``."""
    return torch.stack([rows[:, g::group_size] for g in range(group_size)], dim=1)


PackedShape = tuple[int, int, int]  # group size, KV heads, head dimension


class States(NamedTuple):
    """What the merge of many states takes."""

    v_path: torch.Tensor
    s_path: torch.Tensor
    v: torch.Tensor
    s: torch.Tensor
    lists: StateLists
    exponents: torch.Tensor


def expected_states(states: States, v_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in fp32."""
    v_path, s_path, v, s, lists, exponents = states
    out, lse = reference.merge_states_scaled(
        v_path.float(), s_path, v.float(), s, *lists, exponents
    )
    return out * v_scale, lse


Lens = list[tuple[int, int]]  # of each row: states of its contexts, and of its path


def random_states(lens: Lens, shape: PackedShape, dtype: torch.dtype) -> States:
    """Each row's states are taken in random order from a few more than are needed."""
    generator = torch.Generator().manual_seed(3)
    contexts, path = torch.tensor(lens, dtype=torch.int32).T
    rows, needed = len(lens), int((contexts + path).sum())
    group_size, kv_heads, head_dim = shape
    heads = group_size * kv_heads
    indptr = torch.tensor([0, *map(sum, lens)]).cumsum(0, dtype=torch.int32)
    index = torch.randperm(needed + 3, generator=generator)[:needed].int()
    return States(
        torch.randn(rows, heads, head_dim, generator=generator).to(dtype),
        12 * torch.randn(rows, heads, generator=generator),
        torch.randn(needed + 3, *shape, generator=generator).to(dtype),
        12 * torch.randn(needed + 3, group_size, kv_heads, generator=generator),
        StateLists(indptr, indptr[:-1] + contexts, index),
        1.5 * torch.rand(rows, generator=generator),
    )


# No state, a few and more than are read at once.
LENS = [(0, 0), (1, 0), (0, 1), (5, 0), (0, 2), (2, 1), (16, 5), (17, 17), (1, 40), (40, 0)]


@st.composite
def state_lists(draw: st.DrawFn) -> States:
    """Empty states among those of the rows, and among their paths."""
    lens = draw(st.lists(st.sampled_from(LENS), min_size=1, max_size=3))
    shape = draw(st.sampled_from([(1, 1, 64), (1, 3, 80), (3, 1, 64), (2, 3, 80)]))
    states = random_states(lens, shape, torch.float32)
    logs = st.one_of(st.floats(-60, 60, width=32), st.sampled_from(EMPTY))
    s, s_path = (
        torch.tensor(draw(st.lists(logs, min_size=x.numel(), max_size=x.numel()))).view_as(x)
        for x in (states.s, states.s_path)
    )
    exponents = draw(st.lists(st.floats(0, 15, width=32), min_size=len(lens), max_size=len(lens)))
    return states._replace(s=s, s_path=s_path, exponents=torch.tensor(exponents))


def with_bias(states: States, lowest: float = -40.0) -> States:
    """A bias of every state that is taken; the first of all has none."""
    lists = states.lists
    generator = torch.Generator().manual_seed(4)
    bias = lowest * torch.rand(len(lists.index), generator=generator)
    bias[:1] = 0
    return states._replace(lists=lists._replace(bias=bias))


@fast
@given(
    states=st.one_of(state_lists(), state_lists().map(with_bias)),
    v_scale=st.sampled_from([1.0, 0.25]),
    want_lse=st.booleans(),
    in_place=st.booleans(),
)
def test_the_kernel_of_many_states_equals_the_reference(
    kernels: SimpleNamespace, states: States, v_scale: float, want_lse: bool, in_place: bool
) -> None:
    expected, expected_lse = expected_states(states, v_scale)
    out = states.v_path if in_place else torch.full_like(states.v_path, math.nan)
    lse = states.s_path if in_place else torch.full_like(states.s_path, math.nan)
    kernels.merge.launch_merge_states(*states, out, lse if want_lse else None, v_scale)
    assert_near(out, expected)
    if want_lse:
        assert_near(lse, expected_lse)


def test_a_bias_of_zeros_changes_no_bit(kernels: SimpleNamespace) -> None:
    states = random_states([(33, 20), (1, 0)], (2, 3, 64), torch.bfloat16)
    found = []
    for each in (states, with_bias(states, lowest=0.0)):
        out, lse = torch.full_like(states.v_path, math.nan), torch.full_like(states.s_path, 0)
        kernels.merge.launch_merge_states(*each, out, lse)
        found.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_bias_is_added_to_log_sum_exps_that_are_not_empty(kernels: SimpleNamespace) -> None:
    states = random_states([(9, 4), (3, 0)], (2, 3, 64), torch.float32)
    states.s[::3] = -5e4
    biased = with_bias(states)
    assert biased.lists.bias is not None
    moved = states.s.clone()
    moved[biased.lists.index.long()] += biased.lists.bias[:, None, None]
    expected, expected_lse = expected_states(states._replace(s=moved))
    for merged in (
        merge_states_scaled(*biased),
        _launched(kernels, biased),
    ):
        assert_near(merged[0], expected)
        assert_near(merged[1], expected_lse)


def test_a_state_with_the_lowest_bias_has_no_weight_unless_it_is_alone(
    kernels: SimpleNamespace,
) -> None:
    states = random_states([(2, 0), (1, 0)], (1, 3, 64), torch.float32)
    states.s_path[:] = -5e4
    lowest = LOWEST_BIAS * math.log2(math.e)
    states = states._replace(lists=states.lists._replace(bias=torch.tensor([lowest, 0, lowest])))
    (out, lse), exponent = _launched(kernels, states), states.exponents
    _, second, alone = states.lists.index.tolist()
    assert torch.equal(out[0], states.v[second, 0])
    assert_near(out[1], states.v[alone, 0])
    assert_near(lse[1], (states.s[alone, 0] + lowest) * exponent[1])


def _launched(kernels: SimpleNamespace, states: States) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.full_like(states.v_path, math.nan), torch.full_like(states.s_path, math.nan)
    kernels.merge.launch_merge_states(*states, out, lse)
    return out, lse


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(1, 5, 128), (7, 2, 64)])
def test_many_states_of_every_dtype(
    kernels: SimpleNamespace, shape: PackedShape, dtype: torch.dtype
) -> None:
    states = random_states([(0, 0), (1, 0), (0, 3), (33, 20)], shape, dtype)
    out = torch.full_like(states.v_path, math.nan)
    kernels.merge.launch_merge_states(*states, out, None)
    assert_near(out, expected_states(states)[0])
    assert torch.equal(out[0], states.v_path[0])


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("want_lse", [False, True])
def test_rows_whose_states_are_all_empty_keep_every_bit_of_the_path(
    kernels: SimpleNamespace, in_place: bool, want_lse: bool, empty: float
) -> None:
    states = random_states([(0, 0), (2, 0), (0, 2), (2, 2)], (2, 3, 64), torch.bfloat16)
    states.s[:] = empty
    states.s_path[:, ::2] = empty
    v_path, s_path = states.v_path.clone(), states.s_path.clone()
    out = states.v_path if in_place else torch.full_like(v_path, math.nan)
    lse = torch.full_like(s_path, math.nan) if want_lse else None
    kernels.merge.launch_merge_states(*states, out, lse)
    assert torch.equal(out, v_path)
    if lse is not None:
        assert torch.equal(lse, s_path)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_one_state_of_an_empty_path_is_the_path(
    kernels: SimpleNamespace, in_place: bool, empty: float
) -> None:
    """And no exponent acts on it."""
    states = random_states([(0, 1), (0, 1)], (2, 3, 64), torch.bfloat16)
    states.s_path[:] = empty
    out = states.v_path if in_place else torch.full_like(states.v_path, math.nan)
    lse = states.s_path if in_place else torch.full_like(states.s_path, math.nan)
    kernels.merge.launch_merge_states(*states, out, lse)
    taken = states.lists.index.long()
    assert torch.equal(packed(out, 2), states.v[taken])
    assert torch.equal(packed(lse, 2), states.s[taken])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group_size", [1, 2, 6])
@pytest.mark.parametrize(
    ("path_cuts", "contexts_cuts"),
    [
        ([0], [9, 10, 21, 30]),
        ([0, 1, 3], [9, 30]),
        ([0, 1, 3, 9], [9, 10, 21, 30]),  # nothing is left to the path's own state
        ([0, 1, 3], [9]),  # no contexts
        ([0, 1, 3, 9], [9]),
    ],
)
def test_pieces_of_a_state_merge_to_what_the_whole_merges_to(
    kernels: SimpleNamespace,
    path_cuts: list[int],
    contexts_cuts: list[int],
    group_size: int,
    exponent: float,
) -> None:
    """The exponent acts on the whole of the contexts, and on nothing of the path."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(6, 6, 64, generator=generator)
    k, v = torch.randn(2, 30, 6 // group_size, 64, generator=generator)

    def state(start: int, stop: int, causal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_state(q, k[start:stop], v[start:stop], 0.1, causal)

    causal = path_cuts[-1] < 9
    wanted = reference_merge(*state(0, 9, causal), *state(9, contexts_cuts[-1]), exponent)
    own = state(path_cuts[-1], 9, causal)
    parts = [state(*piece) for cuts in (contexts_cuts, path_cuts) for piece in pairwise(cuts)]
    states = [packed(torch.cat(part), group_size) for part in zip(*parts, strict=True)]
    index = torch.arange(6 * len(parts), dtype=torch.int32).view(-1, 6).T.reshape(-1)
    indptr = torch.arange(7, dtype=torch.int32) * len(parts)
    lists = StateLists(indptr, indptr[:-1] + len(contexts_cuts) - 1, index)
    out, lse = torch.full_like(own[0], math.nan), torch.full_like(own[1], math.nan)
    exponents = torch.tensor(exponent).expand(6)
    kernels.merge.launch_merge_states(*own, *states, lists, exponents, out, lse)
    for merged in ((out, lse), merge_states_scaled(*own, *states, lists, exponent)):
        for got, expected in zip(merged, wanted, strict=True):
            assert_near(got, expected)


GOOD_STATES = random_states([(2, 0), (1, 2)], (2, 3, 64), torch.float32)
GOOD_LISTS = GOOD_STATES.lists


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"v_path": GOOD_STATES.v_path[0]}, "v_path"),
        ({"s_path": GOOD_STATES.s_path[:1]}, "s_path"),
        ({"v": GOOD_STATES.v[:, :1]}, "^v must"),
        ({"v": GOOD_STATES.v[:, :, :2]}, "^v must"),
        ({"v": GOOD_STATES.v[..., :32]}, "^v must"),
        ({"v": GOOD_STATES.v.flatten(1, 2)}, "^v must"),
        ({"v": GOOD_STATES.v.half()}, "^v must"),
        ({"s": GOOD_STATES.s[:2]}, "^s must"),
        ({"s": GOOD_STATES.s.flatten(1, 2)}, "^s must"),
        ({"s": GOOD_STATES.s.double()}, "^s must"),
        ({"lists": GOOD_LISTS._replace(indptr=GOOD_LISTS.indptr[:2])}, "indptr"),
        ({"lists": GOOD_LISTS._replace(indptr=GOOD_LISTS.indptr.long())}, "indptr"),
        ({"lists": GOOD_LISTS._replace(path_start=GOOD_LISTS.indptr)}, "path_start"),
        ({"lists": GOOD_LISTS._replace(path_start=GOOD_LISTS.path_start.long())}, "path_start"),
        ({"lists": GOOD_LISTS._replace(index=GOOD_LISTS.index.long())}, "index"),
        ({"lists": GOOD_LISTS._replace(index=GOOD_LISTS.index[None])}, "index"),
        ({"lists": GOOD_LISTS._replace(bias=torch.zeros(4))}, "bias"),
        ({"lists": GOOD_LISTS._replace(bias=torch.zeros(5).double())}, "bias"),
        ({"exponents": torch.ones(3)}, "^exponent must"),
    ],
)
def test_a_merge_of_many_states_that_do_not_fit_names_the_argument(
    changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        merge_states_scaled(*GOOD_STATES._replace(**changes))


class Gather(NamedTuple):
    page_table: torch.Tensor
    rows: torch.Tensor
    segment_row: torch.Tensor
    segment_start: torch.Tensor
    segment_indptr: torch.Tensor


def gather_of(lines: int, width: int, segments: list[tuple[int, int, int]]) -> Gather:
    """Segments are (row, start, length); the rows are the table's lines from the last one down."""
    row, start, length = torch.tensor(segments, dtype=torch.int32).view(-1, 3).T.contiguous()
    return Gather(
        torch.arange(lines * width, dtype=torch.int32).view(lines, width),
        torch.arange(lines - 1, -1, -1),
        row,
        start,
        torch.cat([length.new_zeros(1), length.cumsum(0, dtype=torch.int32)]),
    )


@st.composite
def gathers(draw: st.DrawFn) -> Gather:
    lines, width = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    segments = []
    for _ in range(draw(st.integers(0, 6))):
        line, start = draw(st.integers(0, lines - 1)), draw(st.integers(0, width))
        segments.append((line, start, draw(st.integers(0, width - start))))
    return gather_of(lines, width, segments)


def assert_gathers(kernels: SimpleNamespace, gather: Gather) -> None:
    """Exactly the reference's slots, and nothing behind them."""
    lens = gather.segment_indptr.diff().tolist()
    out = torch.full((sum(lens) + 3,), -1, dtype=torch.int32)
    kernels.gather.gather_kv_indices(*gather, longest=max(lens, default=0), out=out)
    assert torch.equal(out[:-3], kernels.gather.gather_kv_indices_reference(*gather))
    assert torch.equal(out[-3:], torch.full((3,), -1, dtype=torch.int32))


@pytest.mark.parametrize(("block", "programs"), [(1024, 64), (8, 2)])
def test_the_gather_kernel_equals_the_reference(
    kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, block: int, programs: int
) -> None:
    """Small blocks and few programs make every program loop."""
    monkeypatch.setattr(kernels.gather, "_BLOCK", block)
    monkeypatch.setattr(kernels.gather, "_MAX_PROGRAMS_PER_SEGMENT", programs)

    @fast
    @given(gather=gathers())
    def check(gather: Gather) -> None:
        assert_gathers(kernels, gather)

    check()


def test_segments_longer_than_one_launch_covers_at_once(kernels: SimpleNamespace) -> None:
    width = 64 * 1024 + 2100
    segments = [(0, 5, 64 * 1024 + 1040), (1, 0, 0), (1, 9, 1), (0, 0, width)]
    assert_gathers(kernels, gather_of(2, width, segments))


def test_rows_may_be_of_any_integer_type(kernels: SimpleNamespace) -> None:
    gather = gather_of(3, 20, [(2, 3, 9), (0, 0, 20)])
    for dtype in (torch.int32, torch.int64):
        assert_gathers(kernels, gather._replace(rows=gather.rows.to(dtype)))


def test_the_reference_of_no_segments_is_empty(kernels: SimpleNamespace) -> None:
    gathered = kernels.gather.gather_kv_indices_reference(*gather_of(2, 4, []))
    assert (gathered.shape, gathered.dtype) == ((0,), torch.int32)


@pytest.mark.parametrize(("block", "programs"), [(1024, 64), (8, 2)])
@pytest.mark.parametrize("lens", [[], [0], [5, 0, 1, 40], [1] * 7])
def test_values_are_spread_over_their_segments(
    kernels: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    lens: list[int],
    block: int,
    programs: int,
) -> None:
    monkeypatch.setattr(kernels.gather, "_BLOCK", block)
    monkeypatch.setattr(kernels.gather, "_MAX_PROGRAMS_PER_SEGMENT", programs)
    values, lengths = -1.5 * torch.arange(len(lens)), torch.tensor(lens, dtype=torch.int32)
    indptr = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = torch.full((sum(lens) + 3,), math.nan)
    kernels.gather.spread(values, indptr, max(lens, default=0), out)
    assert torch.equal(out[:-3], torch.repeat_interleave(values, lengths))
    assert out[-3:].isnan().all()


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize(("group_size", "kv_heads"), [(1, 3), (3, 1), (2, 3)])
def test_rows_are_gathered_and_packed_as_far_as_they_are_counted(
    kernels: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    group_size: int,
    kv_heads: int,
    count: int,
) -> None:
    """Two programs take five rows in turn; what lies behind them stays."""
    monkeypatch.setattr(kernels.gather, "_MAX_PROGRAMS_OF_ROWS", 2)
    heads = group_size * kv_heads
    source = torch.arange(4 * 2 * heads * 10.0).view(4, 2 * heads, 10)[:, :heads]  # rows apart
    rows = int32(3, 0, 0, 2, 1)
    out = torch.full((7, group_size, kv_heads, 10), math.nan)
    kernels.gather.gather_packed(source, rows, int32(count), out)
    assert torch.equal(out[:count], packed(source[rows[:count].long()], group_size))
    assert out[count:].isnan().all()


def test_without_a_gpu_the_merge_is_the_reference() -> None:
    merge = random_merge(rows=4, heads=6, head_dim=64, dtype=torch.float32)
    for got, wanted in zip(merge_state_scaled(*merge), reference_merge(*merge), strict=True):
        assert torch.equal(got, wanted)


GOOD = random_merge(rows=4, heads=6, head_dim=64, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"v_a": GOOD.v_a[0]}, "v_a"),
        ({"v_b": GOOD.v_b[:3]}, "v_b"),
        ({"v_b": GOOD.v_b.half()}, "v_b"),
        ({"s_a": GOOD.s_a[:, :5]}, "s_a"),
        ({"s_b": GOOD.s_b[:3]}, "s_b"),
        ({"s_a": GOOD.s_a.double()}, "s_a"),
        ({"s_b": GOOD.s_b.half()}, "s_b"),
        ({"exponents": torch.ones(3)}, "exponent_b"),
    ],
)
def test_a_merge_of_states_that_do_not_fit_names_the_argument(
    changes: dict[str, torch.Tensor], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        merge_state_scaled(*GOOD._replace(**changes))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD_PLAN: dict[str, Any] = dict(
    qo_indptr_arr=[int32(0, 3, 5), int32(0, 2, 5)],
    paged_kv_indptr_arr=[int32(0, 4, 4), int32(0, 1, 2)],
    paged_kv_indices=int32(0, 1, 2, 3, 4, 5),
    paged_kv_last_page_len=[int32(1, 1), int32(1, 1)],
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=64,
    page_size=16,
    temperature=1.0,
    scale=1.0,
)


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> cascade.ApeCascadeAttentionWrapper:
    monkeypatch.setattr(cascade, "temperature_module", lambda key: None)
    return cascade.ApeCascadeAttentionWrapper(torch.empty(16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qo_indptr_arr": [int32(0, 5)]}, "two levels"),
        ({"qo_indptr_arr": [int32(0, 5), int32(0, 2, 5)]}, "contexts: .* 1, 2 and 2 groups"),
        ({"paged_kv_last_page_len": [int32(1, 1), int32(1)]}, "path: .* 2, 2 and 1 groups"),
        ({"qo_indptr_arr": [int32(0, 3, 5), int32(0, 6, 5)]}, "path: an indptr does not"),
        ({"paged_kv_indptr_arr": [int32(0, 4, 3), int32(0, 1, 2)]}, "contexts: an indptr does not"),
        ({"qo_indptr_arr": [int32(0, 3, 6), int32(0, 2, 5)]}, "cover 6 and 5 rows"),
        ({"paged_kv_indices": int32(0, 1)}, "paged_kv_indices holds 2 of"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": [0.5, -1.0]}, "temperature"),
        ({"temperature": [0.5, math.nan]}, "temperature"),
        ({"scale": torch.tensor([0.5, -0.1])}, "scale"),
        ({"temperature": [0.5, 0.5, 0.5]}, "temperature"),
        ({"scale": [0.5, 0.5, 0.5]}, "scale"),
        ({"bias": torch.zeros(63)}, "bias must be fp32 of 64 tokens"),
        ({"bias": torch.zeros(64).half()}, "bias must be fp32"),
        ({"bias": torch.zeros(64, 1)}, "bias must be fp32"),
        ({"rows_bias": torch.zeros(5)}, "rows_bias is for"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_is_wrong(
    wrapper: cascade.ApeCascadeAttentionWrapper, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**{**GOOD_PLAN, **changes})


def test_a_bias_without_its_module_is_refused(
    wrapper: cascade.ApeCascadeAttentionWrapper,
) -> None:
    """FlashInfer's stock kernel would leave it out."""
    with pytest.raises(RuntimeError, match="a bias needs the attention module"):
        wrapper.plan(**GOOD_PLAN, bias=torch.zeros(64))


class Level:
    """FlashInfer's wrapper on one of the modules; it does nothing but take note."""

    def __init__(self, module: str, events: list[str]) -> None:
        self.module = module
        self.events = events
        self.runs: list[tuple[Any, ...]] = []

    def plan(self, **_: Any) -> None:
        self.events.append(f"plan {self.module}")

    def run(self, q: Any, kv: Any, *tensors: Any, out: Any, **_: Any) -> Any:
        self.runs.append(tensors)
        return out, torch.zeros(out.shape[:2])


class Levels(NamedTuple):
    """Stand-ins for all that needs a GPU, and what happened to them in turn."""

    made: list[Level]
    events: list[str]


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> Levels:
    levels = Levels([], [])

    def new_level(key: Any, module: str, *_: Any, **__: Any) -> Level:
        assert key.with_bias == (module == "biased")
        levels.made.append(Level(module, levels.events))
        return levels.made[-1]

    class Event:
        def record(self, stream: str) -> None:
            levels.events.append(f"record on {stream}")

        def synchronize(self) -> None:
            levels.events.append("wait")

    monkeypatch.setattr(cascade, "temperature_module", lambda key: "plain")
    monkeypatch.setattr(cascade, "bias_module", lambda key: "biased")
    monkeypatch.setattr(cascade.variant, "VariantAttentionWrapper", new_level)
    monkeypatch.setattr(cascade, "launch_merge", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    return levels


def test_a_plan_waits_until_the_gpu_has_copied_the_work_lists_of_the_last_one(
    levels: Levels,
) -> None:
    """And not for those of its own, behind which all else would wait in vain."""
    wrapper = cascade.ApeCascadeAttentionWrapper(torch.empty(16, dtype=torch.uint8))
    wrapper.plan(**GOOD_PLAN)
    first = ["plan plain", "plan plain", "record on current"]
    assert levels.events == first
    wrapper.plan(**GOOD_PLAN)
    assert levels.events == [*first, "wait", *first]


def test_only_the_contexts_of_a_biased_plan_are_read_with_a_bias(levels: Levels) -> None:
    made = levels.made
    wrapper = cascade.ApeCascadeAttentionWrapper(torch.empty(16, dtype=torch.uint8))
    bias = -torch.rand(64)
    for each in (None, bias, None):
        wrapper.plan(**GOOD_PLAN, bias=each)
        wrapper.run(torch.empty(5, 4, 64), torch.empty(6, 2, 16, 2, 64))
    contexts, path, biased = made
    assert [level.module for level in made] == ["plain", "plain", "biased"]
    assert [len(level.runs) for level in made] == [2, 3, 1]
    _, read, scale = biased.runs[0]
    assert read is bias and scale == 64**-0.5
    assert all(len(tensors) == 2 for tensors in contexts.runs + path.runs)


def test_a_run_without_a_plan_is_refused(wrapper: cascade.ApeCascadeAttentionWrapper) -> None:
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(torch.empty(5, 4, 64), torch.empty(6, 2, 16, 2, 64))


@pytest.mark.parametrize("captured_with", [False, True])
def test_a_graph_takes_a_bias_as_it_was_captured(
    monkeypatch: pytest.MonkeyPatch, captured_with: bool
) -> None:
    monkeypatch.setattr(cascade, "temperature_module", lambda key: None)
    wrapper = cascade.ApeCascadeAttentionWrapper(
        torch.empty(16, dtype=torch.uint8),
        use_cuda_graph=True,
        batch_size=2,
        paged_kv_indices_buffer=torch.zeros(64, dtype=torch.int32),
        bias_buffer=torch.zeros(64 * 16) if captured_with else None,
    )
    one_each = {"qo_indptr_arr": [int32(0, 1, 2)] * 2}
    bias = None if captured_with else torch.zeros(64)
    with pytest.raises(ValueError, match="captured with a bias"):
        wrapper.plan(**{**GOOD_PLAN, **one_each}, bias=bias)


def test_a_graph_wrapper_names_the_buffers_that_it_needs() -> None:
    workspace = torch.empty(16, dtype=torch.uint8)
    for options in ({}, {"use_cuda_graph": True, "batch_size": 4, "rectangles": True}):
        buffers = {"paged_kv_indices_buffer": int32(0), "bias_buffer": torch.zeros(1)}
        with pytest.raises(ValueError, match="bias_buffer"):
            cascade.ApeCascadeAttentionWrapper(workspace, **options, **buffers)
    with pytest.raises(ValueError, match="paged_kv_indices_buffer"):
        cascade.ApeCascadeAttentionWrapper(workspace, use_cuda_graph=True, batch_size=4)
    with pytest.raises(ValueError, match="batch_size"):
        cascade.ApeCascadeAttentionWrapper(
            workspace, use_cuda_graph=True, paged_kv_indices_buffer=int32(0)
        )


@pytest.mark.parametrize("rows", [2, 4])
def test_a_graph_takes_exactly_its_rows_with_a_request_each(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cascade, "temperature_module", lambda key: None)
    wrapper = cascade.ApeCascadeAttentionWrapper(
        torch.empty(16, dtype=torch.uint8),
        use_cuda_graph=True,
        batch_size=3,
        paged_kv_indices_buffer=torch.zeros(64, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="3 rows"):
        wrapper.plan(**GOOD_PLAN)
    one_each = torch.arange(rows + 1, dtype=torch.int32)
    changes = {
        "qo_indptr_arr": [one_each] * 2,
        "paged_kv_indptr_arr": [one_each] * 2,
        "paged_kv_indices": torch.zeros(2 * rows, dtype=torch.int32),
        "paged_kv_last_page_len": [torch.ones(rows, dtype=torch.int32)] * 2,
    }
    with pytest.raises(ValueError, match="3 rows"):
        wrapper.plan(**{**GOOD_PLAN, **changes})


class Contexts(NamedTuple):
    """What the log-sum-exps of contexts take."""

    q: torch.Tensor
    k_cache: torch.Tensor
    slots: torch.Tensor
    indptr: torch.Tensor


def random_contexts(rows: int, shape: PackedShape, lens: list[int], seed: int = 5) -> Contexts:
    """Contexts at random slots of a cache that others stand in too."""
    generator = torch.Generator().manual_seed(seed)
    group_size, kv_heads, head_dim = shape
    slots = torch.randperm(sum(lens) + 9, generator=generator)[: sum(lens)]
    return Contexts(
        torch.randn(rows, group_size * kv_heads, head_dim, generator=generator),
        torch.randn(sum(lens) + 9, kv_heads, head_dim, generator=generator),
        slots.int(),
        torch.tensor([0, *lens]).cumsum(0).int(),
    )


def launched_lse(kernels: SimpleNamespace, given_: Contexts, sm_scale: float) -> torch.Tensor:
    rows, heads, _ = given_.q.shape
    out = torch.full((rows, heads, len(given_.indptr) - 1), math.nan)
    kernels.lse.launch_context_lse(*given_, sm_scale, out)
    return out


@fast
@given(
    rows=st.sampled_from([1, 3, 40, 150]),
    shape=st.sampled_from([(1, 1, 64), (3, 2, 80), (4, 1, 128)]),
    lens=st.lists(st.sampled_from([1, 2, 63, 64, 65, 130]), min_size=1, max_size=4),
    sm_scale=st.sampled_from([0.1, 1.0]),
)
def test_the_kernel_of_contexts_log_sum_exps_equals_the_reference(
    kernels: SimpleNamespace, rows: int, shape: PackedShape, lens: list[int], sm_scale: float
) -> None:
    contexts = random_contexts(rows, shape, lens)
    found = launched_lse(kernels, contexts, sm_scale)
    expected = reference.context_lse(*contexts, sm_scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_log_sum_exps_may_be_written_beside_others_of_queries_that_stand_apart(
    kernels: SimpleNamespace,
) -> None:
    contexts = random_contexts(6, (3, 2, 64), [5, 70])
    expected = reference.context_lse(*contexts, 0.3)
    apart = torch.stack([contexts.q, contexts.q + 1], 1)[:, 0]
    out = torch.full((6, 6, 4), math.nan)
    kernels.lse.launch_context_lse(apart, *contexts[1:], 0.3, out[..., 1:3])
    torch.testing.assert_close(out[..., 1:3], expected, rtol=1e-5, atol=1e-5)
    assert out[..., ::3].isnan().all()


def test_large_logits_do_not_overflow(kernels: SimpleNamespace) -> None:
    contexts = random_contexts(2, (2, 1, 64), [3, 80])
    contexts = contexts._replace(q=contexts.q * 1e3)
    found = launched_lse(kernels, contexts, 1.0)
    assert found.isfinite().all()
    expected = reference.context_lse(*contexts, 1.0)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_no_rows_or_no_contexts_need_no_launch(kernels: SimpleNamespace) -> None:
    launched_lse(kernels, random_contexts(0, (2, 1, 64), [3]), 1.0)
    none = random_contexts(2, (2, 1, 64), [])
    assert launched_lse(kernels, none, 1.0).shape == (2, 2, 0)
