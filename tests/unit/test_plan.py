"""The plan of new rows against the mask that the formula prescribes."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.attention.plan import Path, RequestPlan, RowRange, plan_request
from sglang_ape.spec import ApeSpec, ProbeSpec, ScoreSpec

fast = settings(deadline=None, max_examples=80)
score_specs = st.builds(
    ScoreSpec.of,
    prefix_len=st.integers(0, 6),
    context_lens=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    copy_len=st.integers(2, 5),
)


@st.composite
def chunked_rows(draw: st.DrawFn) -> tuple[ApeSpec, int, list[RowRange]]:
    """A spec, the length of its query and chunk boundaries over the whole row."""
    lens = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    spec = ApeSpec(draw(st.integers(0, 6)), tuple(lens), 0.9, 0.9, "")
    query_len = draw(st.integers(0, 6))
    total = spec.prefix_len + sum(lens) + query_len
    cuts = draw(st.lists(st.integers(1, max(total - 1, 1)), max_size=6))
    bounds = sorted({0, *(cut for cut in cuts if cut < total), total})
    return spec, query_len, list(pairwise(bounds))


def segment_of(spec: ApeSpec, row: int) -> str | int:
    """``p``, ``q`` or the index of a context, found by counting."""
    if row < spec.prefix_len:
        return "p"
    row -= spec.prefix_len
    for index, length in enumerate(spec.context_lens):
        if row < length:
            return index
        row -= length
    return "q"


def visible_in_path(spec: ApeSpec, row: int) -> list[int]:
    """The keys of the path pass: the causal past in P and in the row's own segment."""
    own = segment_of(spec, row)
    return [key for key in range(row + 1) if segment_of(spec, key) in ("p", own)]


def context_rows(spec: ApeSpec) -> list[int]:
    stop = spec.prefix_len + sum(spec.context_lens)
    return list(range(spec.prefix_len, stop))


def expand(ranges: tuple[RowRange, ...]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


def seen_by_path(path: Path) -> dict[int, list[int]]:
    """Keys of each row of a causal path, bottom-right aligned."""
    kv, rows = expand(path.kv), expand((path.rows,))
    hidden = len(kv) - len(rows)
    return {row: kv[: hidden + i + 1] for i, row in enumerate(rows)}


def seen_by_plan(plan: RequestPlan) -> dict[int, list[int]]:
    merged: dict[int, list[int]] = {}
    for path in plan.paths:
        merged |= seen_by_path(path)
    return merged


@fast
@given(row=chunked_rows())
def test_paths_cover_every_new_row_exactly_once_in_row_order(
    row: tuple[ApeSpec, int, list[RowRange]],
) -> None:
    spec, _, chunks = row
    for start, stop in chunks:
        plan = plan_request(spec, start, stop)
        covered = expand(tuple(path.rows for path in plan.paths))
        assert covered == list(range(start, stop))
        assert all(begin < end for begin, end in (path.rows for path in plan.paths))


@fast
@given(row=chunked_rows())
def test_a_path_shows_each_row_exactly_its_causal_past(
    row: tuple[ApeSpec, int, list[RowRange]],
) -> None:
    spec, _, chunks = row
    for start, stop in chunks:
        seen = seen_by_plan(plan_request(spec, start, stop))
        assert seen == {r: visible_in_path(spec, r) for r in range(start, stop)}


@fast
@given(row=chunked_rows())
def test_the_contexts_pass_belongs_to_query_rows_alone_and_reads_every_context(
    row: tuple[ApeSpec, int, list[RowRange]],
) -> None:
    spec, _, chunks = row
    for start, stop in chunks:
        plan = plan_request(spec, start, stop)
        query = [r for r in range(start, stop) if segment_of(spec, r) == "q"]
        assert (expand((plan.query_rows,)) if plan.query_rows else []) == query
        assert (plan.query_rows is None) == (not query)
        assert expand((plan.contexts,)) == context_rows(spec)


@fast
@given(row=chunked_rows())
def test_the_two_passes_of_a_query_row_see_the_whole_past_once(
    row: tuple[ApeSpec, int, list[RowRange]],
) -> None:
    spec, _, chunks = row
    for start, stop in chunks:
        plan = plan_request(spec, start, stop)
        paths = seen_by_plan(plan)
        for r in expand((plan.query_rows,)) if plan.query_rows else ():
            assert sorted(paths[r] + expand((plan.contexts,))) == list(range(r + 1))


@fast
@given(row=chunked_rows())
def test_the_query_path_comes_last(row: tuple[ApeSpec, int, list[RowRange]]) -> None:
    spec, _, chunks = row
    for start, stop in chunks:
        plan = plan_request(spec, start, stop)
        if plan.query_rows is not None:
            assert plan.paths[-1].rows == plan.query_rows


def test_a_decode_step_is_one_path_and_the_contexts() -> None:
    spec = ApeSpec(2, (3, 4), 1.0, 1.0, "")
    plan = plan_request(spec, 12, 13)
    assert [path.rows for path in plan.paths] == [(12, 13)]
    assert seen_by_plan(plan) == {12: [0, 1, 9, 10, 11, 12]}
    assert (plan.query_rows, plan.contexts) == ((12, 13), (2, 9))


@fast
@given(data=st.data(), spec=score_specs)
def test_a_copy_of_the_query_sees_its_own_context_alone(
    data: st.DataObject, spec: ScoreSpec
) -> None:
    order = data.draw(st.permutations(range(len(spec.context_lens))))
    spec = spec.reordered(order)
    rows = spec.context_end + len(order) * spec.copy_len
    cuts = data.draw(st.lists(st.integers(1, rows - 1), max_size=6))
    seen = {}
    for start, stop in pairwise(sorted({0, *cuts, rows})):
        plan = plan_request(spec, start, stop)
        assert plan.query_rows is None
        seen |= seen_by_plan(plan)
    prefix = list(range(spec.prefix_len))
    for k, place in enumerate(spec.places):
        context = range(spec.context_starts[place], spec.context_stops[place] - 1)
        begin = spec.context_end + k * spec.copy_len
        for row in range(begin, begin + spec.copy_len):
            assert seen[row] == [*prefix, *context, *range(begin, row + 1)]
    assert sorted(seen) == list(range(rows))


@fast
@given(
    data=st.data(),
    spec=st.builds(
        ProbeSpec.of,
        prefix_len=st.integers(0, 6),
        context_lens=st.lists(st.integers(1, 6), min_size=1, max_size=5),
        query_len=st.integers(1, 5),
        null_len=st.integers(1, 5),
    ),
)
def test_a_measured_query_sees_p_and_itself_alone(data: st.DataObject, spec: ProbeSpec) -> None:
    cuts = data.draw(st.lists(st.integers(1, spec.row_len - 1), max_size=6))
    seen = {}
    for start, stop in pairwise(sorted({0, *cuts, spec.row_len})):
        plan = plan_request(spec, start, stop)
        assert plan.query_rows is None
        seen |= seen_by_plan(plan)
    middle = spec.context_end + spec.query_len
    for row in range(spec.context_end, spec.row_len):
        begin = middle if row >= middle else spec.context_end
        assert seen[row] == [*range(spec.prefix_len), *range(begin, row + 1)]
    assert sorted(seen) == list(range(spec.row_len))
