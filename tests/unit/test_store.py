"""What the server knows of registered contexts, against a model that counts everything anew."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang_ape.errors import ApeRequestError
from sglang_ape.store.contexts import (
    ENTRY_TOKENS,
    ContextStore,
    StoredContext,
    Tenant,
    context_id,
)

ANYONE = Tenant(None, None)
TENANTS = [ANYONE, Tenant("adapter", None), Tenant(None, "adapter"), Tenant(None, "key")]
P = [1, 2, 3]
A, B, C = [10, 11], [20], [30, 31, 32]


def ids(tokens: Sequence[int]) -> array:
    return array("I", tokens)


def make_store(entries: int = 100, tokens: int = 20, pinned: int = 1000) -> ContextStore:
    """A store with room for so many contexts of so many tokens in all."""
    return ContextStore("model", entries * ENTRY_TOKENS + tokens, pinned)


def add(
    store: ContextStore,
    *contexts: Sequence[int],
    prefix: Sequence[int] = P,
    tenant: Tenant = ANYONE,
    pin: bool = False,
) -> list[StoredContext]:
    return store.add(tenant, ids(prefix), list(map(ids, contexts)), pin)


def add_one(store: ContextStore, context: Sequence[int], **how: object) -> str:
    return add(store, context, **how)[0].id


def refusal(store: ContextStore, *contexts: Sequence[int], **how: object) -> ApeRequestError:
    """A registration must be refused and change nothing."""
    before = everything_in(store)
    with pytest.raises(ApeRequestError) as caught:
        add(store, *contexts, **how)
    assert caught.value.status_code == 507
    assert everything_in(store) == before
    return caught.value


def everything_in(store: ContextStore) -> tuple[object, ...]:
    numbers = (store.tokens, store.pinned_tokens, store._cost, store._pinned_cost)
    known = [(one.id, one.number, one.pinned) for one in store]
    shared = {key: (p.contexts, p.pinned_contexts) for key, p in store._prefixes.items()}
    return (*numbers, known, list(store._recent), shared)


# ---------------------------------------------------------------- ids


def test_the_same_content_has_the_same_id_in_every_store() -> None:
    one, two = make_store(), make_store(5)
    add(two, C)
    assert add_one(one, A) == add_one(two, A)


def test_the_id_of_a_context_never_changes() -> None:
    """Ids are kept by clients: another form would make every one of them unknown."""
    store = ContextStore("m", 1000, 0)
    assert add_one(store, [4, 5], prefix=[1]) == "ctx-fe19d407e2c1a48cc560e28f10ccdc5e"


def test_all_that_the_kv_depends_on_is_in_the_id() -> None:
    store, other = make_store(), ContextStore("another model", 10_000, 0)
    found = [
        add_one(store, A),
        add_one(store, B),
        add_one(store, A, prefix=[]),
        add_one(store, A, prefix=[1, 2]),
        add_one(store, P + A, prefix=[]),
        *(add_one(store, A, tenant=tenant) for tenant in TENANTS[1:]),
        add_one(other, A),
    ]
    assert len(set(found)) == len(found)


# ---------------------------------------------------------------- what is known


def test_registering_again_finds_the_same_contexts() -> None:
    store = make_store()
    first = add(store, A, B)
    again = add(store, B, A, B)
    assert again == [first[1], first[0], first[1]]
    assert [len(store), store.tokens] == [2, len(P + A + B)]


def test_a_prefix_counts_once_for_each_tenant() -> None:
    store = make_store()
    add(store, A, B)
    add(store, C)
    assert store.tokens == len(P + A + B + C)
    add(store, A, tenant=TENANTS[1])
    assert store.tokens == len(P + A + B + C) + len(P + A)


def test_a_prefix_goes_with_its_last_context() -> None:
    store = make_store()
    one, two = (context.id for context in add(store, A, B))
    store.remove(one)
    assert store.tokens == len(P + B)
    store.remove(two)
    assert (store.tokens, store._cost, store._prefixes) == (0, 0, {})


def test_contexts_after_one_prefix_share_its_memory() -> None:
    store = make_store()
    (one,) = add(store, A)
    (two,) = add(store, B)
    assert one.prefix is two.prefix


def test_a_context_is_found_by_its_own_tenant_alone() -> None:
    store = make_store()
    for tenant in TENANTS:
        id = add_one(store, A, tenant=tenant)
        assert [store.use(id, other) is not None for other in TENANTS] == [
            other == tenant for other in TENANTS
        ]


def test_a_removed_context_is_unknown() -> None:
    store = make_store()
    id = add_one(store, A, pin=True)
    assert store.remove(id) is not None
    assert store.remove(id) is None
    assert (store.get(id), store.use(id, ANYONE), store.is_pinned(id)) == (None, None, False)
    assert (len(store), store.tokens, store.pinned_tokens) == (0, 0, 0)


# ---------------------------------------------------------------- the bound


def test_the_least_recently_used_are_forgotten() -> None:
    store = make_store(entries=3)
    a, b, c = (add_one(store, context) for context in (A, B, C))
    store.use(a, ANYONE)
    add(store, B)
    add(store, [40])
    assert [store.get(id) is not None for id in (a, b, c)] == [True, True, False]


def test_looking_does_not_count_as_use() -> None:
    store = make_store(entries=2)
    a, b = add_one(store, A), add_one(store, B)
    store.get(a), store.is_pinned(a), store.page(-1, 10, None), list(store)
    store.use(a, TENANTS[1])  # it is another's
    add(store, C)
    assert [store.get(id) is not None for id in (a, b)] == [False, True]


def test_pinned_contexts_are_never_forgotten() -> None:
    store = make_store(entries=2)
    pinned = add_one(store, A, pin=True)
    for token in range(40, 50):
        add(store, [token])
        assert store.is_pinned(pinned)
        assert len(store) == 2


def test_a_store_full_of_pins_refuses_and_keeps_them() -> None:
    store = make_store(entries=2)
    add(store, A, B, pin=True)
    error = refusal(store, C)
    assert error.param == "contexts"
    assert "--ape-store-max-tokens" in str(error)


def test_a_registration_that_cannot_fit_changes_nothing() -> None:
    store = make_store(entries=3)
    add(store, A, B)
    assert refusal(store, [50], [51], [52], [53]).param == "contexts"
    assert refusal(store, A, [51], [52], [53]).param == "contexts", "known ones are kept"


def test_a_registration_may_take_the_room_of_all_others() -> None:
    store = make_store(entries=2)
    add(store, A, B)
    last = add(store, [50], [51])
    assert list(store) == last


def test_a_known_prefix_needs_room_beside_what_is_new() -> None:
    store = make_store(entries=2, tokens=len(P) + 4)
    add(store, A)
    assert refusal(store, [50, 50], [51, 51, 51]).param == "contexts"
    add(store, [50, 50], [51, 51])


def test_the_bound_counts_the_bookkeeping() -> None:
    exact = len(P + A) + ENTRY_TOKENS
    add(ContextStore("model", exact, 0), A)
    refusal(ContextStore("model", exact - 1, 0), A)


# ---------------------------------------------------------------- pins


def test_what_is_pinned_counts_once() -> None:
    store = make_store()
    add(store, A, pin=True)
    for _ in range(2):
        add(store, B, A, B, pin=True)
        assert store.pinned_tokens == len(P + A + B)


def test_pins_beyond_the_cap_are_refused_and_change_nothing() -> None:
    store = make_store(pinned=len(P + A))
    add(store, B)
    error = refusal(store, A, B, pin=True)
    assert error.param == "pin"
    assert "--ape-max-pinned-tokens" in str(error)
    add(store, A, pin=True)
    assert refusal(store, B, pin=True).param == "pin"
    add(store, A, pin=True)  # what is pinned needs no further room


def test_registering_without_pin_does_not_unpin() -> None:
    store = make_store()
    id = add_one(store, A, pin=True)
    add(store, A)
    assert store.is_pinned(id)


def test_a_pin_goes_with_its_context() -> None:
    store = make_store(pinned=len(P + A + B))
    a, b = (context.id for context in add(store, A, B, pin=True))
    store.remove(a)
    assert (store.pinned_tokens, store.is_pinned(b)) == (len(P + B), True)
    add(store, [50, 50], pin=True)
    store.remove(b)
    assert store.pinned_tokens == len(P) + 2


def test_the_pinned_part_of_a_row_is_its_prefix_and_its_pinned_contexts() -> None:
    store = make_store()
    add(store, A, B, pin=True)
    add(store, C)

    def part(*contexts: list[int], prefix: list[int] = P, tenant: Tenant = ANYONE) -> int:
        return store.pinned_part(tenant, ids(prefix), list(map(ids, contexts)))

    assert part(A) == part(A, C) == part(A, A) == len(P + A)
    assert part(A, B, [99]) == len(P + A + B)
    assert part(C) == len(P)
    assert part(A, prefix=[1]) == part(A, tenant=TENANTS[1]) == 0


# ---------------------------------------------------------------- listings


def test_pages_list_every_context_once_in_order_of_registration() -> None:
    store = make_store()
    wanted = [add_one(store, [token], pin=token % 3 == 0) for token in range(50, 57)]
    store.use(wanted[0], ANYONE)
    add(store, [50])
    listed, after = [], -1
    for size in (3, 3, 1):
        page = store.page(after, 3, None)
        assert len(page) == size
        listed += [context.id for context in page]
        after = page[-1].number
    assert listed == wanted
    assert store.page(after, 3, None) == []


def test_a_page_goes_on_where_the_last_one_ended_whatever_was_forgotten() -> None:
    store = make_store()
    known = [add_one(store, [token]) for token in range(50, 56)]
    after = store.page(-1, 3, None)[-1].number
    for id in (known[0], known[2], known[3]):
        store.remove(id)
    again = add_one(store, [50])
    assert [one.id for one in store.page(after, 10, None)] == [*known[4:], again]


def test_a_page_of_one_tenant_has_no_contexts_of_others() -> None:
    store = make_store()
    for context in (A, B):
        for tenant in TENANTS:
            add(store, context, tenant=tenant)
    for tenant in TENANTS:
        found = store.page(-1, 10, tenant)
        assert [(one.tenant, list(one.ids)) for one in found] == [(tenant, A), (tenant, B)]
    assert len(store.page(-1, 100, None)) == 2 * len(TENANTS)


# ---------------------------------------------------------------- everything at random


class Entry(NamedTuple):
    tenant: Tenant
    prefix: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def id(self) -> str:
        digest = sha256(ids(self.prefix)).digest()
        return context_id("model", self.tenant, digest, ids(self.ids))


def tokens_of(entries: Iterable[Entry]) -> int:
    """Of contexts, and of each prefix once."""
    entries = list(entries)
    prefixes = {(entry.tenant, entry.prefix) for entry in entries}
    return sum(len(e.ids) for e in entries) + sum(len(prefix) for _, prefix in prefixes)


class StoreMachine(RuleBasedStateMachine):
    MAX_TOKENS = 4 * ENTRY_TOKENS + 10
    MAX_PINNED = 9

    def __init__(self) -> None:
        super().__init__()
        self.store = ContextStore("model", self.MAX_TOKENS, self.MAX_PINNED)
        self.known: list[Entry] = []  # in order of registration
        self.pinned: set[Entry] = set()
        self.recent: list[Entry] = []  # not pinned, the oldest use first

    def cost(self, entries: Iterable[Entry]) -> int:
        return tokens_of(entries) + ENTRY_TOKENS * len(set(entries))

    def refused_for(self, wanted: set[Entry], pin: bool) -> str | None:
        if self.cost(self.pinned | wanted) > self.MAX_TOKENS:
            return "contexts"
        if pin and tokens_of(self.pinned | wanted) > self.MAX_PINNED:
            return "pin"
        return None

    @rule(
        tenant=st.sampled_from(TENANTS[:2]),
        prefix=st.sampled_from([(), (1,), (1, 2, 3, 4)]),
        contexts=st.lists(st.sampled_from([(5,), (6, 6), (7, 7, 7), (8,), (9, 9)]), min_size=1),
        pin=st.booleans(),
    )
    def add(
        self,
        tenant: Tenant,
        prefix: tuple[int, ...],
        contexts: list[tuple[int, ...]],
        pin: bool,
    ) -> None:
        entries = [Entry(tenant, prefix, own) for own in contexts]
        refused = self.refused_for(set(entries), pin)
        if refused is not None:
            error = refusal(self.store, *contexts, prefix=prefix, tenant=tenant, pin=pin)
            assert error.param == refused
            return
        added = add(self.store, *contexts, prefix=prefix, tenant=tenant, pin=pin)
        assert [tuple(one.ids) for one in added] == contexts
        unique = list(dict.fromkeys(entries))
        new = [entry for entry in unique if entry not in self.known]
        for entry in [entry for entry in unique if entry in self.known] + new:
            self.mark_used(entry)
        self.known += new
        while self.cost(self.known) > self.MAX_TOKENS:
            self.known.remove(self.recent.pop(0))
        if pin:
            self.pinned.update(unique)
            self.recent = [entry for entry in self.recent if entry not in self.pinned]

    def mark_used(self, entry: Entry) -> None:
        if entry not in self.pinned:
            self.recent = [other for other in self.recent if other != entry] + [entry]

    @rule(pick=st.integers(0, 20), tenant=st.sampled_from(TENANTS[:2]))
    def use(self, pick: int, tenant: Tenant) -> None:
        if not self.known:
            return
        entry = self.known[pick % len(self.known)]
        used = self.store.use(entry.id, tenant)
        assert (used is not None) == (tenant == entry.tenant)
        if used is not None:
            self.mark_used(entry)

    @rule(pick=st.integers(0, 20))
    def remove(self, pick: int) -> None:
        if not self.known:
            return
        entry = self.known.pop(pick % len(self.known))
        assert self.store.remove(entry.id) is not None
        self.pinned.discard(entry)
        self.recent = [other for other in self.recent if other != entry]

    @invariant()
    def the_store_knows_what_the_model_knows(self) -> None:
        assert [one.id for one in self.store] == [entry.id for entry in self.known]
        assert {one.id for one in self.store if one.pinned} == {e.id for e in self.pinned}
        assert list(self.store._recent) == [entry.id for entry in self.recent]

    @invariant()
    def the_numbers_are_those_of_the_model(self) -> None:
        assert self.store.tokens == tokens_of(self.known)
        assert self.store.pinned_tokens == tokens_of(self.pinned) <= self.MAX_PINNED
        assert self.store._cost == self.cost(self.known) <= self.MAX_TOKENS
        assert self.store._pinned_cost == self.cost(self.pinned)


StoreMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, database=None
)
test_random_use_keeps_the_books_of_a_naive_model = StoreMachine.TestCase
