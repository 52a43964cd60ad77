"""What the hook on ``ForwardBatch.init_new`` leaves for the attention backend of the same step."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ape.attention import batch as step
from sglang_ape.spec import ApeSpec

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
        rid=rid, sampling_params=params, origin_input_ids=ids, extra_key=extra_key
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
