"""The APE side of a scheduler request."""

import gc
import weakref
from array import array
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ape.request import reorder_contexts, spec_of
from sglang_ape.spec import ApeSpec

PREFIX = [1, 2]
CONTEXTS = [[10, 11, 12], [20], [30, 31]]
QUERY = [90, 91]
fast = settings(deadline=None, max_examples=50)


def joined(contexts: list[list[int]]) -> list[int]:
    return [token for context in contexts for token in context]


def make_request(
    prefix: list[int] = PREFIX, contexts: list[list[int]] = CONTEXTS, query: list[int] = QUERY
) -> SimpleNamespace:
    lens = tuple(map(len, contexts))
    ids = array("q", prefix + joined(contexts) + query)
    params = ApeSpec(len(prefix), lens, 0.8, 0.9, "name").to_custom_params()
    return SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params=params),
        custom_logit_processor=None,
        origin_input_ids=ids,
        origin_input_ids_unpadded=ids,
        output_ids=array("q"),
        full_untruncated_fill_ids=array("q"),
        req_pool_idx=None,
    )


def row_in_order(order: list[int]) -> list[int]:
    return PREFIX + joined([CONTEXTS[i] for i in order]) + QUERY


def test_an_ape_request_has_its_spec() -> None:
    assert spec_of(make_request()) == ApeSpec(2, (3, 1, 2), 0.8, 0.9, "name")


def test_a_plain_request_has_none() -> None:
    for custom_params in (None, {}, {"of the user": 1}):
        req = make_request()
        req.sampling_params.custom_params = custom_params
        assert spec_of(req) is None


def test_an_aborted_stub_counts_as_plain() -> None:
    fresh, seen = make_request(), make_request()
    assert spec_of(seen) is not None
    for req in (fresh, seen):
        req.origin_input_ids = array("q", [0])
        assert spec_of(req) is None


def test_custom_params_are_read_once() -> None:
    req = make_request()
    first = spec_of(req)
    req.sampling_params.custom_params = None
    assert spec_of(req) is first


def test_reordering_moves_whole_contexts() -> None:
    req = make_request()
    spec = reorder_contexts(req, spec_of(req), [2, 0, 1])
    assert req.origin_input_ids.tolist() == row_in_order([2, 0, 1])
    assert isinstance(req.origin_input_ids, array)
    assert spec.context_lens == (2, 3, 1)
    assert spec_of(req) == spec


def test_reordering_keeps_unpadded_ids_the_same_array() -> None:
    req = make_request()
    reorder_contexts(req, spec_of(req), [1, 2, 0])
    assert req.origin_input_ids_unpadded is req.origin_input_ids


def test_reordering_leaves_the_given_array_alone() -> None:
    req = make_request()
    given_ids = req.origin_input_ids
    reorder_contexts(req, spec_of(req), [1, 2, 0])
    assert given_ids.tolist() == row_in_order([0, 1, 2])


def test_reordering_takes_fill_ids_and_their_answer_along() -> None:
    req = make_request()
    req.output_ids = array("q", [70, 71])
    req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
    reorder_contexts(req, spec_of(req), [2, 1, 0])
    assert req.full_untruncated_fill_ids.tolist() == [*row_in_order([2, 1, 0]), 70, 71]
    assert req.output_ids.tolist() == [70, 71]


def test_reordering_leaves_fill_ids_that_are_not_there_yet() -> None:
    req = make_request()
    reorder_contexts(req, spec_of(req), [2, 1, 0])
    assert req.full_untruncated_fill_ids.tolist() == []


@fast
@given(
    data=st.data(),
    prefix=st.lists(st.integers(0, 3), max_size=3),
    contexts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_any_chain_of_reorders_keeps_prefix_query_and_the_contexts(
    data: st.DataObject, prefix: list[int], contexts: list[list[int]]
) -> None:
    req = make_request(prefix, contexts, QUERY)
    for _ in range(3):
        order = data.draw(st.permutations(range(len(contexts))))
        reorder_contexts(req, spec_of(req), order)
    spec, ids = spec_of(req), req.origin_input_ids.tolist()
    start, now = len(prefix), []
    for length in spec.context_lens:
        now.append(tuple(ids[start : start + length]))
        start += length
    assert ids[: len(prefix)] == prefix
    assert ids[start:] == QUERY
    assert Counter(now) == Counter(map(tuple, contexts))


@pytest.mark.parametrize(("processor", "is_freed"), [(None, True), ("a processor", False)])
def test_a_request_is_freed_without_the_garbage_collector(
    processor: str | None, is_freed: bool
) -> None:
    """Unless a custom logit processor reads it from its parameters, as SGLang has it."""
    ids = make_request().origin_input_ids
    params = SamplingParams(custom_params=make_request().sampling_params.custom_params)
    gc.disable()
    try:
        req = Req("a", "", ids, params, custom_logit_processor=processor)
        assert spec_of(req) == ApeSpec(2, (3, 1, 2), 0.8, 0.9, "name")
        alive = weakref.ref(req)
        del req
        assert (alive() is None) == is_freed
    finally:
        gc.enable()
