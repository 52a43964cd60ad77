"""Covers: every pair of a row and one of its contexts once, whoever joins and leaves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_ape.attention.rectangles import CostModel, Cover, Planner, Rates, Reader
from sglang_ape.spec import ApeSpec

LENGTHS = {"a": 1, "b": 40, "c": 900, "d": 5000, "e": 30, "f": 1200, "g": 2, "h": 300}
COSTS = CostModel.of(32, 8, 128, 2, 128, Rates(prefix=1e-6, launch=3e-6))
# With these, any sharing pays and nothing is hidden behind "apart"; and with those, states are so
# dear that small classes are dissolved.
EAGER = COSTS.with_free_sharing()
DEAR_STATES = CostModel(1000, 10_000, 4, 0, 128, Rates(memory=1e12, cache=2e12, launch=0.0))
MODELS = [COSTS, EAGER, DEAR_STATES]
CUTS_ARE_DEAR = CostModel.of(32, 8, 128, 2, 128, Rates(rectangle=5e-6, launch=0.0))


def reader(
    names: Sequence[str],
    temperature: float = 0.9,
    prefix: int = 3,
    bias: Sequence[float] = (),
) -> Reader:
    """P is told apart by its length."""
    lens = tuple(LENGTHS[name] for name in names)
    spec = ApeSpec(prefix, lens, temperature, 0.9, "any", tuple(bias[: len(names)]))
    return Reader.of(spec, list(names), "whole", "P" if prefix else None)


readers = st.builds(
    reader,
    st.lists(st.sampled_from(list(LENGTHS)), min_size=1, max_size=8),
    st.sampled_from([0.9, 1.0]),
    st.sampled_from([0, 1, 5, 2000]),
    st.one_of(st.just(()), st.lists(st.sampled_from([0.0, -1.0, -7.5]), min_size=8, max_size=8)),
)
rows_of_batch = st.lists(st.one_of(st.none(), readers), min_size=1, max_size=12)


def planner(costs: CostModel = COSTS, items: int = 1000, states: int = 10_000) -> Planner:
    return Planner(costs, items, states)


def keys_at(owner: Reader, start: int, length: int) -> list[Any]:
    """The contexts that lie exactly in these columns."""
    starts = np.cumsum([owner.start, *owner.lengths]).tolist()
    assert {start, start + length} <= set(starts), "a context is cut"
    return [owner.keys[i] for i in range(starts.index(start), starts.index(start + length))]


def assert_covers(cover: Cover, batch: Sequence[Reader | None]) -> None:
    found: list[Counter[Any]] = [Counter() for _ in batch]
    segments = list(
        zip(
            cover.segment_row.tolist(),
            cover.segment_start.tolist(),
            cover.segment_length.tolist(),
            strict=True,
        )
    )
    ends = np.cumsum(cover.segment_length).tolist()
    assert ends[-1] == cover.kv_indptr[-1]
    rectangles = zip(
        pairwise(cover.qo_indptr.tolist()), pairwise(cover.kv_indptr), cover.is_prefix, strict=True
    )
    with_prefix: list[int] = []
    for (first, stop), (kv_start, kv_stop), is_prefix in rectangles:
        bias = cover.bias[first:stop].tolist()
        members = cover.rows[first:stop].tolist()
        assert members == sorted(set(members)) and members
        if is_prefix:
            owners = {(o.prefix, o.start) for row in members if (o := batch[row])}
            assert owners == {("P", kv_stop - kv_start)} and len(members) > 1
            assert not any(bias)
            (row,) = (s for s, end in zip(segments, ends, strict=True) if end == kv_stop)
            assert row[0] in members and row[1:] == (0, kv_stop - kv_start)
            with_prefix += members
            continue
        keys: list[Any] = []
        for (row, start, length), end in zip(segments, ends, strict=True):
            if kv_start < end <= kv_stop:
                owner = batch[row]
                assert row in members and owner is not None
                keys += keys_at(owner, start, length)
        for row, own_bias in zip(members, bias, strict=True):
            found[row].update(keys)
            owner = batch[row]
            assert owner is not None
            assert {owner.bias_of(key) for key in keys} == {own_bias}
    assert len(with_prefix) == len(set(with_prefix)), "a row reads its P twice"
    for row, wanted in enumerate(batch):
        assert found[row] == Counter(wanted.keys if wanted else ())


def assert_good(cover: Cover | None, batch: Sequence[Reader | None]) -> None:
    if cover is not None:
        assert cover.seconds < cover.seconds_apart
        assert_covers(cover, batch)
        for name, array in zip(cover._fields[:7], cover[:7], strict=True):
            assert array.dtype == (np.bool_ if name == "is_prefix" else np.int32)
        assert (cover.bias.dtype, cover.bias.shape) == (np.float32, cover.rows.shape)


@settings(deadline=None)
@given(batch=rows_of_batch, costs=st.sampled_from(MODELS))
def test_every_pair_is_covered_once_and_never_at_a_higher_cost(
    batch: list[Reader | None], costs: CostModel
) -> None:
    assert_good(planner(costs).follow(batch), batch)


class Server(RuleBasedStateMachine):
    """Requests join at the end, leave anywhere, and now and then the order changes."""

    def __init__(self) -> None:
        super().__init__()
        self.planners = [planner(costs) for costs in MODELS]
        self.batch: list[Reader | None] = []

    @rule(new=readers)
    def join(self, new: Reader) -> None:
        self.batch.append(new)

    @rule(new=readers, copies=st.integers(2, 6))
    def join_over_one_set(self, new: Reader, copies: int) -> None:
        self.batch += [replace(new) for _ in range(copies)]

    @rule(new=readers, copies=st.integers(2, 6))
    def join_over_one_set_with_any_bias(self, new: Reader, copies: int) -> None:
        count = len(new.keys)
        biases = [tuple(-float(i * k % 3) for k in range(count)) for i in range(copies)]
        self.batch += [replace(new, bias=bias) for bias in biases]

    @rule()
    def join_without_contexts(self) -> None:
        self.batch.append(None)

    @precondition(lambda self: self.batch)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.batch.pop(data.draw(st.integers(0, len(self.batch) - 1)))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        self.batch = data.draw(st.permutations(self.batch))

    @invariant()
    def covered(self) -> None:
        for each in self.planners:
            cover = each.follow(self.batch)
            assert_good(cover, self.batch)
            again = each.follow(list(self.batch))
            assert again is cover
        # Only ties in what is dissolved depend on the history.
        fresh, kept = planner(EAGER).follow(self.batch), self.planners[1].follow(self.batch)
        assert (fresh is None) == (kept is None)
        if fresh is not None:
            assert shape_of(fresh) == shape_of(kept)


TestServer = Server.TestCase
TestServer.settings = settings(deadline=None, max_examples=25, stateful_step_count=15)


@settings(deadline=None)
@given(batches=st.lists(rows_of_batch, min_size=1, max_size=4))
def test_equal_histories_give_equal_covers(batches: list[list[Reader | None]]) -> None:
    one, other = planner(DEAR_STATES), planner(DEAR_STATES)
    for batch in batches:
        a, b = one.follow(batch), other.follow(batch)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def shape_of(cover: Cover | None) -> list[tuple[int, int]]:
    """Rows and tokens of each rectangle, sorted."""
    assert cover is not None
    sizes = zip(np.diff(cover.qo_indptr), np.diff(cover.kv_indptr), strict=True)
    return sorted((int(rows), int(tokens)) for rows, tokens in sizes)


def test_a_long_prefix_is_read_once_and_a_short_one_with_each_path() -> None:
    for length, expected in ((8, [(20, 5900)]), (3000, [(20, 3000), (20, 5900)])):
        batch = [reader(["c", "d"], prefix=length) for _ in range(20)]
        cover = planner().follow(batch)
        assert shape_of(cover) == expected
        assert cover is not None and cover.is_prefix.sum() == len(expected) - 1


def test_a_long_prefix_alone_is_reason_enough() -> None:
    batch = [reader([name], prefix=20_000) for name in "acdefh"]
    cover = planner().follow(batch)
    assert shape_of(cover)[-1] == (6, 20_000)
    assert planner().follow([reader([name], prefix=50) for name in "acdefh"]) is None


def test_equal_sets_in_any_order_are_one_rectangle() -> None:
    batch = [reader(names) for names in (["c", "d"], ["d", "c"]) for _ in range(10)]
    assert shape_of(planner().follow(batch)) == [(20, 5900)]


def test_partial_overlap_is_shared_down_to_single_contexts() -> None:
    batch = [reader(["c", "d"]) for _ in range(8)] + [reader(["f", "d"]) for _ in range(8)]
    assert shape_of(planner().follow(batch)) == [(8, 900), (8, 1200), (16, 5000)]


def test_a_context_that_one_request_reads_alone_goes_with_the_others_of_its_kind() -> None:
    batch = [reader(["h", "d", "c"]), *(reader(["d"]) for _ in range(19))]
    assert shape_of(planner().follow(batch)) == [(1, 1200), (20, 5000)]


def test_a_context_too_short_for_a_rectangle_is_read_again_instead() -> None:
    batch = [reader(["a", "d"]) for _ in range(8)] + [reader(["a", "f"]) for _ in range(8)]
    assert shape_of(planner(DEAR_STATES).follow(batch)) == [(8, 1201), (8, 5001)]


def test_temperatures_are_not_mixed() -> None:
    batch = [reader(["d"], temperature) for temperature in (0.9, 1.0) for _ in range(12)]
    assert shape_of(planner().follow(batch)) == [(12, 5000), (12, 5000)]


def test_a_context_given_twice_counts_twice() -> None:
    batch = [reader(["d", "d", "c"]) for _ in range(9)] + [reader(["d"]) for _ in range(9)]
    assert shape_of(planner().follow(batch)) == [(9, 5900), (18, 5000)]


def test_a_biased_set_is_cut_into_contexts_of_equal_bias() -> None:
    batch = [reader(["c", "d", "f"], prefix=0, bias=[0.0, 0.0, -2.0]) for _ in range(9)]
    batch += [reader(["f", "d", "c"], prefix=0) for _ in range(9)]
    assert shape_of(planner(EAGER).follow(batch)) == [(18, 1200), (18, 5900)]
    batch.append(reader(["d", "c", "f"], prefix=0, bias=[0.0, -1.0, -2.0]))
    assert shape_of(planner(EAGER).follow(batch)) == [(19, 900), (19, 1200), (19, 5000)]
    plain = [reader(["c", "d", "f"], prefix=0, bias=[0.0] * 3) for _ in range(9)]
    assert shape_of(planner(EAGER).follow(plain)) == [(9, 7100)]


def test_rectangles_of_a_bias_count_where_they_do_not_fit() -> None:
    batch = [reader(["c", "d", "f"], prefix=0, bias=[0.0, -1.0, -2.0]) for _ in range(9)]
    assert planner(EAGER, items=3, states=27).follow(batch) is not None
    assert planner(EAGER, items=2, states=27).follow(batch) is None
    assert planner(EAGER, items=3, states=26).follow(batch) is None


def test_a_biased_set_that_costs_more_in_pieces_stays_apart() -> None:
    names = ["d", *"abceg"]
    for bias, shared in (((), True), ((0.0, -1.0, -2.0, -3.0, -4.0, -5.0), False)):
        batch = [reader(names, bias=bias) for _ in range(24)]
        assert (planner(CUTS_ARE_DEAR).follow(batch) is not None) == shared


def test_a_short_biased_context_is_not_moved_to_a_rectangle_of_another_bias() -> None:
    bias = [0.0, -1.0]
    batch = [reader(["a", "d"], bias=bias) for _ in range(8)] + [
        reader(["a", "f"]) for _ in range(8)
    ]
    cover = planner(DEAR_STATES).follow(batch)
    assert_good(cover, batch)


def test_a_bias_over_contexts_that_are_not_known_keeps_the_batch_apart() -> None:
    spec = ApeSpec(2, (900, 5000), 0.9, 0.9, "x", (0.0, -1.0))
    batch = [Reader.of(spec, None, "x") for _ in range(18)]
    batch += [reader(["d"]) for _ in range(18)]
    assert planner().follow(batch) is None
    assert planner().follow(batch[18:]) is not None


def test_requests_of_different_bias_read_apart_each_for_itself() -> None:
    """So that sharing pays sooner: neighbours are one group only where their bias is equal."""
    equal = [reader(["d"], bias=[0.0]) for _ in range(4)]
    assert planner().follow(equal) is None
    names = ["c", "d", "f"]
    different = [reader(names, bias=[0.0, -float(i), -1.0 - i]) for i in range(1, 5)]
    alike = [reader(names, bias=[0.0, -1.0, -2.0]) for _ in range(4)]
    assert planner().follow(alike) is None
    cover = planner().follow(different)
    assert cover is not None and len(cover.rows) == 12


def test_sets_whose_contexts_are_not_known_are_shared_whole() -> None:
    spec = ApeSpec(2, (900, 5000), 0.9, 0.9, "x")
    batch = [Reader.of(spec, None, whole) for whole in ("x", "y", "x", "y") for _ in range(9)]
    assert shape_of(planner().follow(batch)) == [(18, 5900), (18, 5900)]


@pytest.mark.parametrize(
    "batch",
    [
        [],
        [None, None],
        [reader(["d"])],
        [reader(["c"]), reader(["d"]), reader(["f"]), None],
        [reader(["d"]) for _ in range(4)],  # one tile of 16 as it is
    ],
)
def test_what_cannot_gain_stays_apart(batch: list[Reader | None]) -> None:
    assert planner().follow(batch) is None


@pytest.mark.parametrize("limits", [{"items": 1}, {"states": 23}])
def test_what_does_not_fit_stays_apart(limits: dict[str, int]) -> None:
    batch = [reader(["c", "d"]) for _ in range(8)] + [reader(["d"]) for _ in range(8)]
    assert planner(states=24, items=2).follow(batch) is not None
    assert planner(**{"items": 2, "states": 24, **limits}).follow(batch) is None


def test_the_model_gives_back_what_was_measured() -> None:
    """Contexts of 32 requests over 32K tokens: 529 us a layer apart, less 17 for all else."""
    assert COSTS.apart(32768, 32 * 32768) == pytest.approx(512e-6, rel=0.05)
