"""Contexts given by id: whose they are, what prefix they bring, and rows beside pins."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ape.entry.call import NATIVE, ContextId, parse_call
from sglang_ape.entry.known import resolve
from sglang_ape.entry.tokenizer_manager import Entry
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import (
    POOL_MARGIN,
    Limits,
    around_validate_one_request,
)
from sglang_ape.store.contexts import ContextStore, Tenant
from tests.unit.test_expand import DEFAULTS, CharTokenizer, apply, make_obj
from tests.unit.test_store import ANYONE, TENANTS, A, B, C, P, add, add_one, ids, make_store

UNKNOWN = "ctx-" + "0" * 32


def by_id(store: ContextStore, context: list[int], **how: Any) -> ContextId:
    return ContextId(add_one(store, context, **how))


def resolved(
    store: ContextStore,
    prefix: list[int] | None,
    *contexts: ContextId | list[int],
    tenant: Tenant = ANYONE,
    at: str = "",
) -> tuple[list[int] | None, list[list[int]]]:
    given = [own if isinstance(own, ContextId) else ids(own) for own in contexts]
    prefix_ids = None if prefix is None else ids(prefix)
    found_prefix, found = resolve(store, tenant, prefix_ids, given, at)
    return None if found_prefix is None else list(found_prefix), list(map(list, found))


def refusal(*args: Any, **how: Any) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        resolved(*args, **how)
    assert caught.value.status_code == 400
    assert caught.value.param in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- resolve


def test_ids_are_replaced_by_tokens_in_their_places() -> None:
    store = make_store()
    a, c = by_id(store, A), by_id(store, C)
    assert resolved(store, P, c, B, a, c) == (P, [C, B, A, C])


def test_contexts_without_ids_stay_as_they_are() -> None:
    store = make_store()
    assert resolved(store, P, A, B) == (P, [A, B])
    assert resolved(store, None, A) == (None, [A])
    assert resolved(store, [], A) == ([], [A])


@pytest.mark.parametrize("prefix", [P, []])
def test_a_request_without_prefix_has_that_of_its_ids(prefix: list[int]) -> None:
    store = make_store()
    a, b = by_id(store, A, prefix=prefix), by_id(store, B, prefix=prefix)
    assert resolved(store, None, C, a, b) == (prefix, [C, A, B])


def test_an_id_is_refused_beside_another_prefix() -> None:
    store = make_store()
    a, other = by_id(store, A), by_id(store, B, prefix=[1])
    assert refusal(store, [1, 2], C, a).param == "contexts[1].id"
    assert refusal(store, [], a).param == "contexts[0].id", "an empty prefix is a prefix"
    error = refusal(store, None, a, C, other)
    assert error.param == "contexts[2].id"
    assert other.id in str(error)


def test_an_unknown_id_is_named_with_its_place() -> None:
    store = make_store()
    a = by_id(store, A)
    error = refusal(store, P, a, ContextId(UNKNOWN), at="[3]")
    assert error.param == "contexts[3][1].id"
    assert UNKNOWN in str(error)
    assert "POST /ape/contexts" in str(error)


def test_an_unknown_id_is_not_shown_in_all_its_length() -> None:
    assert len(str(refusal(make_store(), P, ContextId("x" * 10_000)))) < 300


@pytest.mark.parametrize("owner", TENANTS)
@pytest.mark.parametrize("asking", TENANTS)
def test_an_id_is_known_to_its_tenant_alone(owner: Tenant, asking: Tenant) -> None:
    store = make_store()
    a = by_id(store, A, tenant=owner)
    if owner == asking:
        assert resolved(store, None, a, tenant=asking) == (P, [A])
        return
    error = refusal(store, None, a, tenant=asking)
    assert error.param == "contexts[0].id"
    for name, value in asking._asdict().items():
        assert value is None or f"{name} {value!r}" in str(error)


def test_a_context_that_is_asked_for_is_kept_longest() -> None:
    store = make_store(entries=2)
    a, b = by_id(store, A), by_id(store, B)
    resolved(store, None, a)
    add(store, C)
    assert [store.get(one.id) is not None for one in (a, b)] == [True, False]


# ---------------------------------------------------------------- on the way of a request


def make_entry(store: ContextStore, pool: int = 300, window: int = 64) -> Entry:
    limits = Limits(window=window, context_tokens=200, pool_tokens=pool, vocab_size=1000)
    return Entry(CharTokenizer(), limits, DEFAULTS, None, store)


def row_of(entry: Entry, contexts: Sequence[Any], **fields: Any) -> list[int]:
    ape = {name: fields.pop(name) for name in ("prefix_ids",) if name in fields}
    obj = make_obj(input_ids=[90, 91], **fields)
    return list(apply(obj, {"contexts": contexts, **ape}, entry).input_ids)


def apply_refused(entry: Entry, contexts: Sequence[Any], **fields: Any) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        row_of(entry, contexts, **fields)
    return caught.value


def given_id(context: ContextId) -> dict[str, str]:
    return {"id": context.id}


def test_a_request_by_ids_is_the_request_by_tokens() -> None:
    store = make_store()
    entry = make_entry(store)
    by_ids = [given_id(by_id(store, A)), {"input_ids": B}]
    by_tokens = [{"input_ids": A}, {"input_ids": B}]
    wanted = [*P, *A, *B, 90, 91]
    assert row_of(entry, by_ids) == row_of(entry, by_tokens, prefix_ids=P) == wanted
    assert row_of(entry, by_ids, prefix_ids=P) == wanted


def test_the_tenant_of_a_request_is_its_adapter_and_its_key() -> None:
    store = make_store()
    entry = make_entry(store)
    for tenant in TENANTS:
        own = [given_id(by_id(store, A, tenant=tenant))]
        assert row_of(entry, own, **tenant._asdict()) == [*P, *A, 90, 91]
        others = [other for other in TENANTS if other != tenant]
        for other in others:
            assert apply_refused(entry, own, **other._asdict()).param == "contexts[0].id"


def test_each_request_of_a_batch_has_its_own_tenant() -> None:
    store = make_store()
    a, b = by_id(store, A), by_id(store, B, tenant=Tenant(None, "key"))
    obj = make_obj(input_ids=[[90], [91]], extra_key=[None, "key"])
    fields = {"contexts": [[given_id(a)], [given_id(b)]]}
    assert apply(obj, fields, make_entry(store)).input_ids == [[*P, *A, 90], [*P, *B, 91]]
    obj = make_obj(input_ids=[[90], [91]], extra_key=["key", None])
    with pytest.raises(ApeRequestError) as caught:
        apply(obj, fields, make_entry(store))
    assert caught.value.param == "contexts[0][0].id"


@pytest.mark.parametrize(
    ("context", "param"),
    [
        ({"id": 5}, "contexts[0].id"),
        ({"id": None}, "contexts[0].id"),
        ({"id": "a\ud800"}, "contexts[0].id"),
        ({"id": "x", "text": "y"}, "contexts[0]"),
    ],
)
def test_an_id_must_be_a_string_of_its_own(context: Any, param: str) -> None:
    with pytest.raises(ApeRequestError) as caught:
        parse_call({"contexts": [context]}, NATIVE)
    assert caught.value.param == param


# ---------------------------------------------------------------- beside pins


PINNED = [[200 + i] * 20 for i in range(5)]


def crowded_entry(pinned: int, pool: int = 150, window: int = 64) -> Entry:
    """With so many contexts of 20 tokens pinned, without prefix."""
    store = make_store(tokens=1000)
    if pinned:
        add(store, *PINNED[:pinned], prefix=[], pin=True)
    return make_entry(store, pool, window)


def new_tokens(count: int) -> dict[str, Any]:
    return {"sampling_params": {"max_new_tokens": count}}


def test_a_row_must_fit_beside_the_pins_with_its_answer() -> None:
    room = 150 - POOL_MARGIN - 100
    context = [{"input_ids": [1] * 20}]
    exact = new_tokens(room - 22)
    assert len(row_of(crowded_entry(5), context, prefix_ids=[], **exact)) == 22
    error = apply_refused(crowded_entry(5), context, prefix_ids=[], **new_tokens(room - 21))
    assert error.param == "contexts"
    assert all(str(number) in str(error) for number in (room + 1, 100, room))


def test_without_pins_the_same_row_is_served() -> None:
    row_of(crowded_entry(0), [{"input_ids": [1] * 20}], prefix_ids=[], **new_tokens(40))


def test_what_a_row_has_of_the_pins_needs_no_room() -> None:
    pinned = [{"input_ids": own} for own in PINNED]
    assert len(row_of(crowded_entry(5), pinned, prefix_ids=[], **new_tokens(40))) == 102
    apply_refused(crowded_entry(5), [*pinned, {"input_ids": [1] * 20}], prefix_ids=[])


def validate(entry: Entry | None, tokens: int, params: Any, **marks: Any) -> bool:
    """Whether a plain request passes on to SGLang's own check."""
    passed: list[int] = []
    manager = SimpleNamespace(ape_entry=entry) if entry is not None else SimpleNamespace()
    obj = SimpleNamespace(sampling_params=params, **marks)

    def original(manager: Any, obj: Any, input_ids: Any) -> None:
        passed.append(len(input_ids))

    around_validate_one_request(original, manager, obj, array("q", [1] * tokens))
    return passed == [tokens]


def test_a_plain_request_must_fit_beside_the_pins_with_its_answer() -> None:
    room = 150 - POOL_MARGIN - 100
    entry = crowded_entry(5)
    assert validate(entry, 20, {"max_new_tokens": room - 20})
    with pytest.raises(ValueError, match=rf"{room + 1} tokens.*100 tokens of pinned.*{room}"):
        validate(entry, 20, {"max_new_tokens": room - 19})


def test_an_answer_without_a_bound_may_fill_the_window() -> None:
    assert validate(crowded_entry(3), 20, {"max_new_tokens": None})
    with pytest.raises(ValueError, match="64 tokens"):
        validate(crowded_entry(5), 20, {"max_new_tokens": None})


@pytest.mark.parametrize(
    ("params", "asked"),
    [
        ({}, SamplingParams().max_new_tokens),
        ({"max_new_tokens": None}, None),
        ({"max_new_tokens": 0}, 0),
        ({"max_new_tokens": 500, "temperature": 0}, 500),
    ],
)
def test_the_asked_length_is_what_sglang_reads(params: dict[str, Any], asked: int | None) -> None:
    assert Limits(64, 64, 64, 8).asked_new_tokens(params) == asked


@pytest.mark.parametrize("spare", [0, -1])
def test_a_request_without_a_length_needs_room_for_sglangs_default(spare: int) -> None:
    room = 22 + SamplingParams().max_new_tokens + spare
    entry = crowded_entry(5, pool=room + 100 + POOL_MARGIN, window=1000)
    row = [{"input_ids": [1] * 20}]
    if spare == 0:
        assert validate(entry, 22, {}) and validate(entry, 22, None)
        assert len(row_of(entry, row, prefix_ids=[])) == 22
        return
    for params in ({}, None):
        with pytest.raises(ValueError, match=f"{room + 1} tokens"):
            validate(entry, 22, params)
    assert apply_refused(entry, row, prefix_ids=[]).param == "contexts"


def test_without_pins_plain_requests_pass() -> None:
    assert validate(crowded_entry(0), 63, {"max_new_tokens": 500})
    assert validate(None, 63, None)


def test_what_encodes_a_context_may_hold_its_own_pin() -> None:
    assert validate(crowded_entry(5), 60, {"max_new_tokens": 0}, ape_encodes=True)
