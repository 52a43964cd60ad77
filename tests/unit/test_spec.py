"""Segments and positions of an APE row, against the rule said in words."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.spec import (
    BIAS,
    COPY_LEN,
    CUSTOM_PARAM_KEYS,
    PROBE_LENS,
    ApeSpec,
    ProbeSpec,
    ScoreSpec,
)

specs = st.builds(
    ApeSpec,
    prefix_len=st.integers(0, 12),
    context_lens=st.lists(st.integers(1, 9), min_size=1, max_size=7).map(tuple),
    temperature=st.floats(0.1, 10),
    scale=st.floats(0, 10),
    namespace=st.text(max_size=5),
)
score_specs = st.builds(
    ScoreSpec.of,
    prefix_len=st.integers(0, 12),
    context_lens=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    copy_len=st.integers(2, 6),
)
probe_specs = st.builds(
    ProbeSpec.of,
    prefix_len=st.integers(0, 12),
    context_lens=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    query_len=st.integers(1, 8),
    null_len=st.integers(1, 8),
)
fast = settings(deadline=None, max_examples=60)


def owners(spec: ApeSpec, query_len: int) -> list[int | None]:
    """For each row the index of its context; None in P and Q."""
    contexts = [i for i, length in enumerate(spec.context_lens) for _ in range(length)]
    return [None] * spec.prefix_len + contexts + [None] * query_len


def expected_positions(spec: ApeSpec, query_len: int) -> list[int]:
    p = spec.prefix_len
    out = list(range(p))
    for length in spec.context_lens:
        out += range(p, p + length)
    first = p + max(spec.context_lens)
    return out + list(range(first, first + query_len))


def row_len(spec: ApeSpec, query_len: int) -> int:
    return spec.prefix_len + sum(spec.context_lens) + query_len


def windows(length: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, length), st.integers(0, length)).map(
        lambda ends: (min(ends), max(ends))
    )


@fast
@given(spec=specs, query_len=st.integers(0, 10))
def test_positions_of_the_whole_row_follow_the_rule(spec: ApeSpec, query_len: int) -> None:
    positions = spec.positions(0, row_len(spec, query_len))
    assert positions.dtype == np.int64
    assert positions.tolist() == expected_positions(spec, query_len)


@fast
@given(data=st.data(), spec=specs, query_len=st.integers(0, 10))
def test_positions_of_any_window_are_a_slice_of_the_whole(
    data: st.DataObject, spec: ApeSpec, query_len: int
) -> None:
    start, stop = data.draw(windows(row_len(spec, query_len)))
    whole = expected_positions(spec, query_len)
    assert spec.positions(start, stop).tolist() == whole[start:stop]


@fast
@given(data=st.data(), spec=specs, query_len=st.integers(0, 10))
def test_positions_of_chunks_concatenate_to_the_whole(
    data: st.DataObject, spec: ApeSpec, query_len: int
) -> None:
    total = row_len(spec, query_len)
    cuts = data.draw(st.lists(st.integers(0, total), max_size=8))
    bounds = [0, *sorted(cuts), total]
    pieces = [spec.positions(a, b) for a, b in pairwise(bounds)]
    assert np.concatenate(pieces).tolist() == expected_positions(spec, query_len)


@fast
@given(spec=specs)
def test_every_context_starts_at_the_prefix_length_and_the_query_behind_the_longest(
    spec: ApeSpec,
) -> None:
    for start in spec.context_starts:
        assert spec.positions(start, start + 1).tolist() == [spec.prefix_len]
    first = spec.context_end
    assert spec.positions(first, first + 2).tolist() == [
        spec.prefix_len + max(spec.context_lens),
        spec.prefix_len + max(spec.context_lens) + 1,
    ]


@fast
@given(spec=specs)
def test_hidden_tokens_are_rows_less_positions_in_use(spec: ApeSpec) -> None:
    rows = row_len(spec, query_len=1)
    assert rows - spec.hidden_tokens == max(expected_positions(spec, query_len=1)) + 1


def test_one_context_hides_nothing() -> None:
    assert ApeSpec(3, (5,), 1.0, 1.0, "").hidden_tokens == 0


@fast
@given(spec=specs)
def test_starts_and_stops_bound_the_contexts(spec: ApeSpec) -> None:
    owner = owners(spec, query_len=2)
    assert spec.context_end == spec.prefix_len + sum(spec.context_lens)
    for i, (start, stop) in enumerate(zip(spec.context_starts, spec.context_stops, strict=True)):
        assert [row for row, own in enumerate(owner) if own == i] == list(range(start, stop))


@fast
@given(data=st.data(), spec=specs, query_len=st.integers(0, 6))
def test_context_segments_are_the_context_rows_of_the_window(
    data: st.DataObject, spec: ApeSpec, query_len: int
) -> None:
    start, stop = data.draw(windows(row_len(spec, query_len)))
    owner = owners(spec, query_len)
    covered = [
        (row, index)
        for index, begin, end in spec.context_segments(start, stop)
        for row in range(begin, end)
    ]
    expected = [(row, owner[row]) for row in range(start, stop) if owner[row] is not None]
    assert covered == expected
    assert all(begin < end for _, begin, end in spec.context_segments(start, stop))


@fast
@given(data=st.data(), spec=specs)
def test_reordering_permutes_the_lengths_and_nothing_else(
    data: st.DataObject, spec: ApeSpec
) -> None:
    order = data.draw(st.permutations(range(len(spec.context_lens))))
    reordered = spec.reordered(order)
    assert reordered.context_lens == tuple(spec.context_lens[i] for i in order)
    assert reordered.hidden_tokens == spec.hidden_tokens
    assert reordered.context_end == spec.context_end
    for name in ("prefix_len", "temperature", "scale", "namespace"):
        assert getattr(reordered, name) == getattr(spec, name)


@fast
@given(spec=specs)
def test_custom_params_round_trip(spec: ApeSpec) -> None:
    params = spec.to_custom_params()
    assert ApeSpec.from_custom_params({**params, "of the user": 1}) == spec


@fast
@given(spec=specs)
def test_custom_params_are_flat_scalars_and_lists_under_the_reserved_keys(spec: ApeSpec) -> None:
    params = spec.to_custom_params()
    assert set(params) == CUSTOM_PARAM_KEYS - {BIAS, COPY_LEN, PROBE_LENS}
    for value in params.values():
        items = value if isinstance(value, list) else [value]
        assert all(type(item) in (int, float, str) for item in items)


@pytest.mark.parametrize("params", [None, {}, {"seed": 1}, [], "ape_context_lens"])
def test_a_plain_request_has_no_spec(params: object) -> None:
    assert ApeSpec.from_custom_params(params) is None


@fast
@given(data=st.data(), spec=specs)
def test_a_bias_travels_with_its_context(data: st.DataObject, spec: ApeSpec) -> None:
    count = len(spec.context_lens)
    spec = replace(spec, bias=tuple(-float(i) for i in range(count)))
    assert ApeSpec.from_custom_params(spec.to_custom_params()) == spec
    order = data.draw(st.permutations(range(count)))
    assert spec.reordered(order).bias == tuple(spec.bias[i] for i in order)


@fast
@given(data=st.data(), spec=score_specs)
def test_a_copy_stands_where_it_would_behind_its_context_alone(
    data: st.DataObject, spec: ScoreSpec
) -> None:
    order = data.draw(st.permutations(range(len(spec.context_lens))))
    sent, spec = spec, spec.reordered(order)
    rows = spec.context_end + len(order) * spec.copy_len
    positions = spec.positions(0, rows).tolist()
    for k, length in enumerate(sent.context_lens):  # copies stay in the order they were sent in
        end = spec.prefix_len + length
        begin = spec.context_end + k * spec.copy_len
        expected = list(range(end - 1, end - 1 + spec.copy_len))
        assert positions[begin : begin + spec.copy_len] == expected
        assert spec.context_lens[spec.places[k]] == length
    assert positions[: spec.context_end] == expected_positions(spec, query_len=0)
    assert rows - spec.hidden_tokens == max(positions) + 1
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=8))
    pieces = [spec.positions(a, b) for a, b in pairwise([0, *sorted(cuts), rows])]
    assert np.concatenate(pieces).tolist() == positions


@fast
@given(data=st.data(), spec=probe_specs)
def test_q_and_the_null_query_stand_where_q_stands_behind_the_contexts(
    data: st.DataObject, spec: ProbeSpec
) -> None:
    order = data.draw(st.permutations(range(len(spec.context_lens))))
    sent, spec = spec, spec.reordered(order)
    assert [spec.context_lens[place] for place in spec.places] == list(sent.context_lens)
    positions = spec.positions(0, spec.row_len).tolist()
    first = spec.prefix_len + max(spec.context_lens)
    null = list(range(first, first + spec.null_len))
    assert positions == expected_positions(spec, spec.query_len) + null
    assert spec.row_len - spec.hidden_tokens == max(positions) + 1
    cuts = data.draw(st.lists(st.integers(0, spec.row_len), max_size=8))
    pieces = [spec.positions(a, b) for a, b in pairwise([0, *sorted(cuts), spec.row_len])]
    assert np.concatenate(pieces).tolist() == positions
    assert spec.cacheable(spec.row_len) == spec.context_end


@fast
@given(spec=st.one_of(score_specs, probe_specs))
def test_a_scoring_row_survives_the_way_to_the_scheduler(spec: ApeSpec) -> None:
    assert spec.row_len is not None
    assert ApeSpec.from_custom_params(spec.to_custom_params()) == spec
