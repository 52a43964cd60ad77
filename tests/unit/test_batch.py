"""What the hook on ``ForwardBatch.init_new`` leaves for the attention backend of the same step."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ape.attention import batch as step
from sglang_ape.spec import ApeSpec, ProbeSpec, ScoreSpec

SPEC = ApeSpec(2, (3, 5), 0.9, 0.8, "set")


@pytest.fixture(autouse=True)
def nothing_announced() -> Iterator[None]:
    step.begin_batch([], None)
    yield
    step.begin_batch([], None)


def make_request(rid: str, spec: ApeSpec | None, extra_key: str | None = None) -> SimpleNamespace:
    params = SimpleNamespace(custom_params=spec.to_custom_params() if spec else None)
    ids = range(spec.context_end + 4 if spec else 9)
    return SimpleNamespace(
        rid=rid,
        sampling_params=params,
        custom_logit_processor=None,
        origin_input_ids=ids,
        extra_key=extra_key,
        last_node=None,
        cache_protected_len=0,
    )


def announce(*requests: SimpleNamespace, decoding: bool = False, enabled: bool = True) -> Any:
    """Run the hook over the last two rows of each request; the batch with its positions."""
    n = 1 if decoding else 2
    stops = [len(request.origin_input_ids) for request in requests]
    starts = [stop - n for stop in stops]
    forward_batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decoding),
        positions=torch.cat([torch.arange(a, b) for a, b in zip(starts, stops, strict=True)]),
        extend_prefix_lens_cpu=starts,
        extend_seq_lens_cpu=[n] * len(requests),
    )
    runner = SimpleNamespace(server_args=SimpleNamespace(enable_ape=enabled))
    step.after_init_new(forward_batch, object, SimpleNamespace(reqs=list(requests)), runner)
    return forward_batch


def test_the_backend_gets_the_specs_in_batch_order() -> None:
    announce(make_request("a", None), make_request("b", SPEC))
    found = step.ape_batch(["a", "b"])
    assert found is not None
    assert list(found.specs) == [None, SPEC]
    assert step.ape_batch_of_size(2) is found


@pytest.mark.parametrize("enabled", [True, False])
def test_a_batch_of_plain_requests_clears_the_last_one(enabled: bool) -> None:
    if enabled:
        announce(make_request("a", SPEC))
    announce(make_request("b", None), enabled=enabled)
    assert step.ape_batch(["b"]) is None
    assert step.ape_batch_of_size(7) is None


def test_a_decode_step_reads_nothing_for_a_scoring_request_but_keeps_its_position() -> None:
    """SGLang runs a step for it before it knows that it has ended."""
    scoring = ScoreSpec.of(2, (3, 5), 4)
    requests = [make_request("s", scoring), make_request("a", SPEC)]
    positions = announce(*requests, decoding=True).positions.tolist()
    rows = [len(request.origin_input_ids) - 1 for request in requests]
    hidden = [scoring.hidden_tokens, SPEC.hidden_tokens]
    assert positions == [row - h for row, h in zip(rows, hidden, strict=True)]
    found = step.ape_batch(["s", "a"])
    assert found is not None and list(found.specs) == [None, SPEC]

    alone = announce(requests[0], decoding=True).positions.tolist()
    assert alone == positions[:1]
    assert step.ape_batch(["s"]) is None, "a batch of plain rows"
    announce(requests[0])
    in_prefill = step.ape_batch(["s"])
    assert in_prefill is not None and list(in_prefill.specs) == [scoring]


@pytest.mark.parametrize("scoring", [ScoreSpec.of(2, (3, 5), 4), ProbeSpec.of(2, (3, 5), 4, 3)])
def test_so_does_a_row_behind_a_scoring_request_in_a_prefill_batch(scoring: ApeSpec) -> None:
    """As SGLang mixes decode rows in with chunks."""
    request = make_request("s", scoring)
    assert scoring.row_len is not None
    ends = (scoring.context_end + 2, scoring.row_len, scoring.row_len + 2)
    for rows, expected in zip(ends, (scoring, scoring, None), strict=True):
        request.origin_input_ids = range(rows)
        announce(request, make_request("a", SPEC))
        found = step.ape_batch(["s", "a"])
        assert found is not None and list(found.specs) == [expected, SPEC]


def test_a_batch_that_was_not_announced_is_refused() -> None:
    announce(make_request("a", SPEC))
    with pytest.raises(RuntimeError, match="out of step"):
        step.ape_batch(["b"])
    with pytest.raises(RuntimeError, match="out of step"):
        step.ape_batch_of_size(2)


def test_a_dummy_batch_without_request_ids_is_plain() -> None:
    announce(make_request("a", SPEC))
    assert step.ape_batch(None) is None


def test_only_equal_contexts_of_one_tenant_are_one_set() -> None:
    other = ApeSpec(2, (3, 5), 0.9, 0.8, "another set")
    announce(
        make_request("a", SPEC),
        make_request("b", SPEC),
        make_request("c", other),
        make_request("d", SPEC, extra_key="tenant"),
        make_request("e", None),
    )
    found = step.ape_batch(["a", "b", "c", "d", "e"])
    assert found is not None
    a, b, c, d, e = found.context_sets
    assert a == b
    assert len({a, c, d}) == 3
    assert e is None


@pytest.mark.parametrize("decoding", [True, False])
def test_the_query_follows_the_longest_context_and_plain_rows_stay(decoding: bool) -> None:
    batch = announce(make_request("a", SPEC), make_request("b", None), decoding=decoding)
    # Row 13 of the first is its query's last token: 2 + max(3, 5) + 3.
    expected = [10, 8] if decoding else [9, 10, 7, 8]
    assert batch.positions.tolist() == expected


def readers_of(*requests: SimpleNamespace) -> Any:
    announce(*requests, decoding=True)
    found = step.ape_batch([request.rid for request in requests])
    assert found is not None
    return found.readers


def stored(request: SimpleNamespace, *nodes: object) -> SimpleNamespace:
    """As after its prefill: the tree holds the row."""
    request.last_node = SimpleNamespace(contexts=nodes)  # as of cache.tree.Handle
    request.cache_protected_len = len(request.origin_input_ids)
    return request


def test_contexts_are_known_by_their_nodes_in_the_tree() -> None:
    one, other, third = object(), object(), object()
    a = stored(make_request("a", SPEC), one, other)
    b = stored(make_request("b", SPEC), third, one)
    first, second, plain = readers_of(a, b, make_request("c", None))
    assert plain is None
    assert set(first.keys) & set(second.keys) == {first.keys[0]} == {second.keys[1]}
    assert first.lengths == SPEC.context_lens and first.start == SPEC.prefix_len


def test_a_reader_is_the_same_object_until_the_row_changes() -> None:
    request = stored(make_request("a", SPEC), object(), object())
    (before,) = readers_of(request)
    assert readers_of(request)[0] is before
    (after,) = readers_of(stored(request, object(), object()))
    assert after is not before


@pytest.mark.parametrize("protected", [0, SPEC.context_end - 1])
def test_the_end_of_a_path_that_is_not_whole_names_no_context(protected: int) -> None:
    """The last node of a handle may lie inside of the last context."""
    requests = [stored(make_request(rid, SPEC), "first", "part") for rid in "ab"]
    for request in requests:
        request.cache_protected_len = protected
    for reader in readers_of(*requests):
        assert reader.keys == ((None, SPEC.namespace),)
        assert reader.lengths == (sum(SPEC.context_lens),)


def test_without_a_tree_the_whole_set_is_one_context() -> None:
    requests = make_request("a", SPEC), make_request("b", SPEC, extra_key="tenant")
    first, second = readers_of(*requests)
    assert first.keys == ((None, SPEC.namespace),) != second.keys


def test_a_reader_has_the_bias_of_each_context_where_they_are_known() -> None:
    biased = replace(SPEC, bias=(0.0, -2.5))
    (known,) = readers_of(stored(make_request("a", biased), object(), object()))
    assert known.bias == biased.bias
    assert [known.bias_of(key) for key in known.keys] == [0.0, -2.5]
    (unknown,) = readers_of(make_request("b", biased))
    assert unknown.bias is None
    (plain,) = readers_of(make_request("c", SPEC))
    assert plain.bias == ()


def test_prefill_needs_no_readers() -> None:
    announce(make_request("a", SPEC))
    found = step.ape_batch(["a"])
    assert found is not None and not found.readers


def test_a_prefix_is_known_by_its_tokens_under_one_cache_key() -> None:
    requests = [make_request(rid, SPEC) for rid in "abc"]
    requests[1].origin_input_ids = range(1, 1 + len(requests[1].origin_input_ids))
    requests[2].extra_key = "tenant"
    again = make_request("d", SPEC)
    first, other, tenant, same = (reader.prefix for reader in readers_of(*requests, again))
    assert first == same
    assert len({first, other, tenant}) == 3


def test_an_empty_prefix_is_nothing_to_share() -> None:
    (reader,) = readers_of(make_request("a", ApeSpec(0, (3,), 0.9, 0.9, "set")))
    assert reader.prefix is None
