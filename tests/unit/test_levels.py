"""The two levels of a batch send every row to exactly the columns that the formula names."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.attention.levels import Levels, decode_levels, extend_levels, rectangle_levels
from sglang_ape.attention.rectangles import (
    EMPTY_COVER,
    HOPPER_RATES,
    CostModel,
    Planner,
    Rates,
    Reader,
    prefill_groups,
)
from sglang_ape.spec import ApeSpec

Columns = list[int]


@st.composite
def specs(draw: Any) -> ApeSpec | None:
    if draw(st.booleans()):
        return None
    lens = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    return ApeSpec(
        draw(st.integers(0, 5)),
        lens,
        draw(st.sampled_from([0.5, 0.9, 1.0])),
        draw(st.sampled_from([0.0, 0.9, 1.0])),
        "set",
        draw(st.sampled_from([(), tuple(-float(i) for i in range(len(lens)))])),
    )


@st.composite
def requests(draw: Any, decoding: bool) -> tuple[ApeSpec | None, int, int]:
    spec = draw(specs())
    end = spec.context_end if spec else 0
    if decoding:
        stop = end + draw(st.integers(1, 9))
        return spec, stop - 1, stop
    start = draw(st.integers(0, end + 5))
    return spec, start, start + draw(st.integers(1, end + 8))


def batches(decoding: bool) -> Any:
    return st.lists(requests(decoding), min_size=1, max_size=6)


def _groups(levels: Levels, level: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each group of a level its number of rows, and (request, column) of its KV in order."""
    columns = [
        (int(request), start + i)
        for request, start, length in zip(
            levels.segment_row.tolist(),
            levels.segment_start.tolist(),
            np.diff(levels.segment_indptr).tolist(),
            strict=True,
        )
        for i in range(length)
    ]
    offset = 0 if level == 0 else int(levels.kv_indptr[0][-1])
    indptr = (levels.kv_indptr[level] + offset).tolist()
    rows = np.diff(levels.qo_indptr[level]).tolist()
    assert indptr[-1] == (len(columns) if level == 1 else levels.kv_indptr[0][-1])
    return [(n, columns[a:b]) for n, a, b in zip(rows, indptr[:-1], indptr[1:], strict=True)]


def _visible(levels: Levels) -> list[tuple[int, Columns, Columns, float, float]]:
    """For each new row: its request, the columns of its path and of its contexts, T and S."""
    paths: list[tuple[int, Columns]] = []
    for rows, columns in _groups(levels, 1):
        for i in range(rows):
            seen = columns[: len(columns) - rows + i + 1]  # bottom-right aligned
            assert len({request for request, _ in seen}) == 1
            paths.append((seen[0][0], [column for _, column in seen]))
    contexts: list[tuple[Columns, float, float]] = []
    for (rows, columns), t, s in zip(
        _groups(levels, 0), levels.temperature.tolist(), levels.scale.tolist(), strict=True
    ):
        contexts += [([column for _, column in columns], t, s)] * rows
    assert len(paths) == len(contexts)
    return [(*path, *group) for path, group in zip(paths, contexts, strict=True)]


def _assert_biases_are_those_of_the_columns(
    levels: Levels, specs: list[ApeSpec | None], readers: list[int]
) -> None:
    """``readers``: requests whose contexts are in the contexts level."""
    if levels.bias is None:
        assert not any(spec.bias for i in readers if (spec := specs[i]))
        return
    value, indptr = levels.bias
    assert (value.dtype, indptr.dtype) == (np.float32, np.int32)
    spread = np.repeat(value, np.diff(indptr)).tolist()
    columns = [column for _, group in _groups(levels, 0) for column in group]
    assert len(spread) == len(columns)
    for bias, (request, column) in zip(spread, columns, strict=True):
        spec = specs[request]
        assert spec is not None
        (own,) = spec.context_segments(column, column + 1)
        assert bias == (spec.bias[own.context] if spec.bias else 0)


def _expected(spec: ApeSpec | None, row: int) -> tuple[Columns, Columns]:
    if spec is None or row < spec.prefix_len:
        return list(range(row + 1)), []
    prefix = list(range(spec.prefix_len))
    if row >= spec.context_end:
        return [*prefix, *range(spec.context_end, row + 1)], [
            *range(spec.prefix_len, spec.context_end)
        ]
    start = max(start for start in spec.context_starts if start <= row)
    return [*prefix, *range(start, row + 1)], []


def _assert_as_the_formula_says(
    levels: Levels, batch: list[tuple[ApeSpec | None, int, int]]
) -> None:
    rows = iter(_visible(levels))
    for request, (spec, start, stop) in enumerate(batch):
        for row in range(start, stop):
            owner, path, contexts, t, s = next(rows)
            assert owner == request
            assert (path, contexts) == _expected(spec, row)
            if spec is not None and contexts:
                assert np.float32(spec.temperature) == t
                assert np.float32(spec.scale) == s
    assert next(rows, None) is None


@given(batches(decoding=False))
def test_new_rows_read_their_own_past_and_the_query_all_contexts(batch: Any) -> None:
    specs, starts, stops = (list(column) for column in zip(*batch, strict=True))
    levels = extend_levels(specs, starts, stops)
    _assert_as_the_formula_says(levels, batch)
    readers = [i for i, (spec, _, stop) in enumerate(batch) if spec and stop > spec.context_end]
    _assert_biases_are_those_of_the_columns(levels, specs, readers)


@given(batches(decoding=True))
def test_decoding_is_extending_by_one_row(batch: Any) -> None:
    specs, starts, stops = (list(column) for column in zip(*batch, strict=True))
    levels = decode_levels(specs, np.array(stops), list(range(len(batch))))
    _assert_as_the_formula_says(levels, batch)
    _assert_biases_are_those_of_the_columns(levels, specs, list(range(len(specs))))
    assert all(len(indptr) == len(batch) + 1 for indptr in levels.qo_indptr)
    extended = extend_levels(specs, starts, stops)
    for ours, theirs in zip(levels.kv_indptr, extended.kv_indptr, strict=True):
        assert ours.tolist() == theirs.tolist()


@given(batches(decoding=True), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_neighbours_over_one_set_of_contexts_read_it_once(batch: Any, copies: list[int]) -> None:
    repeated = [(i, request) for i, request in enumerate(batch) for _ in range(copies[i])]
    specs, _, stops = (list(column) for column in zip(*(r for _, r in repeated), strict=True))
    sets = [None if request[0] is None else ("set", i) for i, request in repeated]
    levels = decode_levels(specs, np.array(stops), sets)
    rows = iter(_visible(levels))
    for spec, stop in zip(specs, stops, strict=True):
        _, path, contexts, _, _ = next(rows)
        assert (path, contexts) == _expected(spec, stop - 1)
    read = sum(sum(spec.context_lens) for spec, _, _ in batch if spec)
    assert levels.kv_indptr[0][-1] == read
    _assert_biases_are_those_of_the_columns(levels, specs, list(range(len(specs))))
    assert levels.qo_indptr[1].tolist() == list(range(len(specs) + 1))


def test_equal_sets_that_are_no_neighbours_are_read_apart() -> None:
    spec = ApeSpec(2, (3, 4), 0.9, 0.9, "set")
    levels = decode_levels([spec, None, spec], np.array([10, 5, 11]), ["a", None, "a"])
    assert levels.qo_indptr[0].tolist() == [0, 1, 2, 3]
    assert levels.kv_indptr[0].tolist() == [0, 7, 7, 14]


@given(batches(decoding=False))
def test_every_array_is_what_the_kernels_take(batch: Any) -> None:
    specs, starts, stops = (list(column) for column in zip(*batch, strict=True))
    levels = extend_levels(specs, starts, stops)
    for array in (*levels[:3], *levels.qo_indptr, *levels.kv_indptr):
        assert array.dtype == np.int32
    assert levels.temperature.dtype == levels.scale.dtype == np.float32


@st.composite
def overlapping(draw: Any) -> tuple[list[ApeSpec | None], list[list[str]], list[int]]:
    """Decoding requests over some of four documents each, in any order."""
    lens = {"a": 2, "b": 5, "c": 3, "d": 7}
    specs: list[ApeSpec | None] = []
    names: list[list[str]] = []
    for own in draw(st.lists(st.lists(st.sampled_from("abcd"), max_size=5), min_size=1)):
        prefix, scale = draw(st.integers(0, 3)), draw(st.sampled_from([0.5, 1.0]))
        spec = ApeSpec(prefix, tuple(lens[name] for name in own), 0.9, scale, "x")
        specs.append(spec if own else None)
        names.append(own)
    new = st.integers(1, 4)
    stops = [(spec.context_end if spec else 0) + draw(new) for spec in specs]
    return specs, names, stops


@settings(deadline=None)
@given(given=overlapping(), padding=st.integers(0, 2))
def test_rectangles_send_every_row_to_its_contexts_and_its_path(given: Any, padding: int) -> None:
    specs, names, stops = given
    costs = CostModel(1000, 0, 4, 0, 128, Rates(memory=1e12, cache=1e12, launch=0.0))
    readers = [
        Reader.of(spec, own, "", "P" if spec.prefix_len else None) if spec else None
        for spec, own in zip(specs, names, strict=True)
    ]
    cover = Planner(costs, 1000, 1000).follow(readers) or EMPTY_COVER
    padded = specs + [None] * padding
    levels = rectangle_levels(padded, np.array(stops + [1] * padding), cover)
    assert levels.contexts_rows is cover.rows
    assert levels.path_groups is cover.is_prefix
    assert levels.rows_bias is cover.bias and levels.bias is None
    seen: list[list[str]] = [[] for _ in padded]
    prefix_elsewhere = [0] * len(padded)
    places = iter(levels.contexts_rows.tolist())
    for (rows, columns), is_prefix in zip(_groups(levels, 0), cover.is_prefix, strict=True):
        at = [next(places) for _ in range(rows)]
        if is_prefix:
            for row in at:
                assert prefix_elsewhere[row] == 0
                prefix_elsewhere[row] = padded[row].prefix_len
                assert [c for _, c in columns] == list(range(prefix_elsewhere[row]))
            continue
        read = [_document(specs[owner], names[owner], column) for owner, column in columns]
        for row in at:
            seen[row] += read
    for spec, own, got in zip(specs, names, seen, strict=False):
        if spec is not None and cover is not EMPTY_COVER:
            lens = dict(zip(own, spec.context_lens, strict=True))
            assert sorted(got) == sorted(name for name in own for _ in range(lens[name]))
    paths = _groups(levels, 1)
    for row, (spec, stop) in enumerate(zip(padded, stops + [1] * padding, strict=True)):
        own_path = _expected(spec, stop - 1)[0][prefix_elsewhere[row] :]
        assert paths[row] == (1, [(row, column) for column in own_path])
    for given_out, name in ((levels.temperature, "temperature"), (levels.scale, "scale")):
        wanted = [getattr(spec, name) if spec else 1 for spec in padded]
        assert given_out.tolist() == np.array(wanted, np.float32).tolist()
    for array in (*levels[:3], *levels.qo_indptr, *levels.kv_indptr, levels.contexts_rows):
        assert array.dtype == np.int32


@settings(deadline=None)
@given(batch=batches(decoding=False), one_set=st.booleans())
def test_queries_over_equal_contexts_read_those_of_the_first(batch: Any, one_set: bool) -> None:
    specs, starts, stops = (list(column) for column in zip(*batch, strict=True))
    if one_set:
        specs = [spec and next(s for s in specs if s) for spec in specs]
        starts = [start if spec else 0 for spec, start in zip(specs, starts, strict=True)]
        stops = [max(start + 1, stop) for start, stop in zip(starts, stops, strict=True)]
    rows = [
        max(stop - max(start, spec.context_end), 0) if spec else 0
        for spec, start, stop in zip(specs, starts, stops, strict=True)
    ]
    tokens = [sum(spec.context_lens) if spec else 0 for spec in specs]
    sets = [("set" if one_set else i) if spec else None for i, spec in enumerate(specs)]
    costs = CostModel.of(32, 8, 128, 2, 128, Rates()).with_free_sharing()
    groups = prefill_groups(rows, tokens, sets, costs)
    if groups is None:
        assert not any(rows)
        return
    readers = [i for i, count in enumerate(rows) if count]
    assert sorted(i for group in groups for i in group) == readers
    assert len(groups) == (1 if one_set else len(readers))
    levels = extend_levels(specs, starts, stops, groups)
    apart = extend_levels(specs, starts, stops)
    assert _groups(levels, 1) == _groups(apart, 1)
    assert levels.contexts_rows is not None
    places = iter(levels.contexts_rows.tolist())
    at = [(request, row) for request, row in _rows(starts, stops)]
    read: dict[tuple[int, int], list[int]] = {}
    for (count, columns), group in zip(_groups(levels, 0), groups, strict=True):
        assert {owner for owner, _ in columns} == {group[0]}
        for _ in range(count):
            read[at[next(places)]] = [column for _, column in columns]
    for i, (request, row) in enumerate(at):
        spec = specs[request]
        assert read.get((request, row), []) == _expected(spec, row)[1]
        assert levels.temperature[i] == np.float32(spec.temperature if spec else 1)
        assert levels.scale[i] == np.float32(spec.scale if spec else 1)


def _rows(starts: list[int], stops: list[int]) -> list[tuple[int, int]]:
    """The request and the row of each new row of a batch."""
    bounds = enumerate(zip(starts, stops, strict=True))
    return [(request, row) for request, (start, stop) in bounds for row in range(start, stop)]


def test_only_large_prefills_leave_the_launch_for_each_request() -> None:
    costs = CostModel.of(32, 8, 128, 2, 128, HOPPER_RATES)
    assert prefill_groups([256], [8192], ["a"], costs) is None
    assert prefill_groups([256], [32768], ["a"], costs) == [[0]]
    assert prefill_groups([0, 256, 256], [32768] * 3, ["a", "b", "b"], costs) == [[1, 2]]
    # On FA2 the kernel is the same, and only the reading is saved.
    older = CostModel.of(32, 8, 128, 2, 128, Rates())
    assert prefill_groups([256], [32768], ["a"], older) is None
    assert prefill_groups([4] * 8, [32768] * 8, ["a"] * 8, older) == [list(range(8))]


def _document(spec: ApeSpec | None, names: list[str], column: int) -> str:
    """The name of the context that a column of a row lies in."""
    assert spec is not None
    starts = [*spec.context_starts, spec.context_end]
    return next(n for n, a, b in zip(names, starts, starts[1:], strict=False) if a <= column < b)
