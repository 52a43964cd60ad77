"""Registering contexts: the store, the channel and the tree together, and what users see of them.

Behind a stand-in for ``TokenizerManager`` is the real tree on SGLang's real pools. Time passes in
steps of the event loop, so that calls can be interrupted at each of them.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sglang_ape.entry.call import NATIVE, ApeCall, current_call
from sglang_ape.entry.tokenizer_manager import Entry
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.metrics import Usage
from sglang_ape.store import channel
from sglang_ape.store.channel import LOOK, PIN
from sglang_ape.store.contexts import ContextStore, Tenant
from sglang_ape.store.register import Registered, Registry
from sglang_ape.store.routes import add_routes, chat_renderer
from sglang_ape.store.service import ContextService
from tests.support.tree import A, B, C, Host, P, ape, plain
from tests.unit.test_channel import Manager, few_threads, run
from tests.unit.test_expand import DEFAULTS, CharTokenizer
from tests.unit.test_pins import Evictions, cached, evict_all, flush
from tests.unit.test_store import ANYONE, TENANTS, ids, make_store

__all__ = ["few_threads"]  # a fixture

LONG = list(range(50, 70))
ADAPTER = Tenant("adapter", None)


class Adapters(dict[str, str]):
    """``LoRARegistry``: ids of the loaded adapters by name."""

    def get_all_adapters(self) -> dict[str, SimpleNamespace]:
        return {name: SimpleNamespace(lora_id=own) for name, own in self.items()}


class Engine(Manager):
    """A ``TokenizerManager`` whose scheduler serves each request in one go, some steps later."""

    def __init__(self, host: Host, **args: Any) -> None:
        super().__init__(host.tree)
        self.host = host
        self.server_args = SimpleNamespace(
            **{"disable_radix_cache": False, "log_requests": False, **args}
        )
        self.lora_registry = Adapters()
        self.lora_ref_cache: dict[str, str] = {}  # also those that were unloaded for others
        self.requests: list[Any] = []
        self.events: list[tuple[str, list[int]]] = []
        self.running = self.most_at_once = self.computed = 0
        self.refused: list[list[int]] = []
        self.steps: Callable[[list[int]], int] = lambda path: 3
        self.before_message: Callable[[str], None] = lambda action: None

    def _serve(self, message: Any) -> None:
        self.before_message(message.action)
        super()._serve(message)

    async def generate_request(self, obj: Any) -> AsyncIterator[Any]:
        path, key = list(obj.input_ids), obj.extra_key
        assert current_call.get() is None, "it would be taken for an APE request"
        if obj.lora_path is not None:
            own_id = self.lora_ref_cache[obj.lora_path]
            self.lora_registry[obj.lora_path] = own_id
            key = (key or "") + own_id
        self.requests.append(obj)
        self.events.append(("start", path))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        for _ in range(self.steps(path)):
            await asyncio.sleep(0)
        self.running -= 1
        if path in self.refused:
            raise ValueError("refused by the engine")
        self.computed += len(path) - cached(self.host, path, key)
        self.host.serve(plain(path, key))
        self.events.append(("end", path))
        yield {"meta_info": {"finish_reason": {"type": "length"}}}

    def encoded(self) -> list[list[int]]:
        return [list(obj.input_ids) for obj in self.requests]


class Counted:
    """Stands for ``EntryMetrics``."""

    def __init__(self) -> None:
        self.registrations: list[Usage] = []
        self.store: tuple[int, int, int] | None = None

    def observe_registration(self, usage: Usage) -> None:
        self.registrations.append(usage)

    def observe_store(self, *numbers: int) -> None:
        self.store = numbers


class Server:
    """A registry over a fresh engine."""

    def __init__(self, pool: int = 400, store: ContextStore | None = None, **args: Any) -> None:
        self.host = Host(pool=pool)
        self.engine = Engine(self.host, **args)
        self.store = make_store() if store is None else store
        self.counted = Counted()
        self.registry = Registry(self.engine, self.store, self.counted)

    async def register(
        self,
        *contexts: list[int],
        pin: bool = False,
        prefix: list[int] = P,
        tenant: Tenant = ANYONE,
    ) -> list[Registered]:
        return await self.registry.register(tenant, ids(prefix), list(map(ids, contexts)), pin)

    async def settle(self) -> None:
        """Let everything that goes on in the background end."""
        for _ in range(400):
            await asyncio.sleep(0)
        assert not self.registry._encoding

    def assert_no_pin_is_left(self) -> None:
        assert self.store.pinned_tokens == 0
        assert not self.host.tree.pins._paths
        evict_all(self.host)
        assert self.host.tree.total_size() == 0

    def assert_pinned(self, *contexts: list[int], prefix: list[int] = P) -> None:
        """These in the store and in the tree alike, whatever else is evicted."""
        found = [list(one.ids) for one in self.store if one.pinned]
        assert sorted(found) == sorted(contexts)
        evict_all(self.host)
        assert self.host.tree.protected_size() == len(prefix) + sum(map(len, contexts))
        assert all(cached(self.host, prefix + own) == len(prefix + own) for own in contexts)


@pytest.fixture
def server() -> Server:
    return Server()


def reused(found: Sequence[Registered]) -> list[int]:
    return [one.cached_tokens for one in found]


def computed(*calls: Sequence[Registered]) -> int:
    """What these calls say that they computed."""
    return sum(len(one.context.ids) - one.cached_tokens for call in calls for one in call)


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- encoding


def test_each_context_is_encoded_once_after_its_prefix(server: Server) -> None:
    found = run(server.register(A, B, A))
    assert sorted(server.engine.encoded()) == sorted([P + A, P + B])
    assert [list(one.context.ids) for one in found] == [A, B, A]
    assert [cached(server.host, P + own) for own in (A, B)] == [len(P + A), len(P + B)]
    assert server.engine.computed == len(P + A + B)
    assert reused(found) == [0, 0, len(A)], "given twice, it is computed once"


def test_a_context_is_encoded_as_a_prompt_that_wants_no_answer(server: Server) -> None:
    async def during_another_call() -> None:
        current_call.set(ApeCall([], False, NATIVE))
        await server.register(A)

    run(during_another_call())
    (request,) = server.engine.requests
    assert request.sampling_params == {"max_new_tokens": 0}
    assert (request.lora_path, request.extra_key, request.ape_encodes) == (None, None, True)
    assert request.input_ids == array("q", P + A)


def test_where_requests_are_logged_ids_are_a_list() -> None:
    server = Server(log_requests=True)
    run(server.register(A))
    assert server.engine.requests[0].input_ids == P + A


def test_the_first_brings_the_prefix_before_the_others_start(server: Server) -> None:
    run(server.register(A, B, C))
    assert server.engine.events[:2] == [("start", P + A), ("end", P + A)]
    assert server.engine.most_at_once == 2
    assert server.engine.computed == len(P + A + B + C)


def test_where_the_prefix_is_cached_all_start_at_once(server: Server) -> None:
    server.host.serve(plain(P))
    run(server.register(A, B, C))
    assert server.engine.most_at_once == 3


def test_no_more_than_16_are_encoded_at_once() -> None:
    server = Server(pool=400)
    both = [[token] for token in range(100, 130)]

    async def two_calls() -> None:
        await asyncio.gather(server.register(*both[:15]), server.register(*both[15:]))

    run(two_calls())
    assert server.engine.most_at_once == 16
    assert len(server.engine.requests) == 30


def test_registering_again_computes_nothing(server: Server) -> None:
    run(server.register(A, B))
    server.engine.requests.clear()
    found = run(server.register(B, A, pin=True))
    assert server.engine.requests == []
    assert reused(found) == [len(B), len(A)]


def test_what_requests_left_in_the_cache_is_not_computed(server: Server) -> None:
    server.host.serve(ape(A, C[:2]))
    found = run(server.register(A, C, B))
    assert sorted(server.engine.encoded()) == sorted([P + B, P + C])
    assert reused(found) == [len(A), 2, 0]
    assert server.engine.computed == computed(found)


def test_contexts_that_were_evicted_are_encoded_again(server: Server) -> None:
    run(server.register(A, B))
    evict_all(server.host)
    assert reused(run(server.register(A))) == [0]
    assert server.engine.encoded()[2:] == [P + A]


def test_registered_contexts_are_the_last_to_be_evicted(server: Server) -> None:
    run(server.register(A, B))
    server.host.serve(plain([7, 7, 7]))
    run(server.register(A))
    oldest = min(server.host.tree.evictable_leaves)
    assert list(oldest.key.token_ids) == B


# ---------------------------------------------------------------- several calls at once


def run_at_once(server: Server, *calls: list[list[int]], pin: bool = False) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(server.register(*own, pin=pin) for own in calls))

    return run(all_of_them())


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize(
    "calls",
    [
        [[A], [A], [A]],
        [[A, B, C], [A, B, C]],
        [[A, B], [B, A]],
        [[A, B], [B, C], [C, A]],
        [[A, B, C], [LONG, B]],
    ],
)
@pytest.mark.parametrize("prefix_cached", [False, True])
def test_calls_at_once_encode_each_context_once_and_say_so(
    server: Server, calls: list[list[list[int]]], prefix_cached: bool, pin: bool
) -> None:
    if prefix_cached:
        server.host.serve(plain(P))
    server.engine.steps = len  # a long context takes long
    found = run_at_once(server, *calls, pin=pin)
    unique = {tuple(own) for call in calls for own in call}
    assert Counter(map(tuple, server.engine.encoded())) == {(*P, *own): 1 for own in unique}
    assert computed(*found) == sum(map(len, unique))


def test_a_call_that_is_given_up_leaves_the_other_its_encoding(server: Server) -> None:
    server.engine.steps = lambda path: 30

    async def give_up() -> list[Registered]:
        first = asyncio.create_task(server.register(A))
        await steps(20)
        second = asyncio.create_task(server.register(A))
        await steps(15)
        first.cancel()
        return await second

    assert reused(run(give_up())) == [len(A)]
    assert server.engine.encoded() == [P + A]


# ---------------------------------------------------------------- pins


def test_pinned_contexts_outlive_any_eviction(server: Server) -> None:
    found = run(server.register(A, B, pin=True))
    run(server.register(C))
    assert [one.context.pinned for one in found] == [True, True]
    server.assert_pinned(A, B)
    assert server.store.pinned_tokens == len(P + A + B)


def test_what_is_known_can_be_pinned_later(server: Server) -> None:
    run(server.register(A, B))
    run(server.register(B, pin=True))
    run(server.register(A, B))
    server.assert_pinned(B)


def test_the_scheduler_is_told_of_pins_before_anything_is_encoded(server: Server) -> None:
    told = []

    def before_message(action: str) -> None:
        told.append((action, len(server.engine.requests)))
        evict_all(server.host)

    server.engine.before_message = before_message
    run(server.register(A, B, pin=True))
    assert told[0] == (PIN, 0)
    assert server.engine.computed == len(P + A + B), "evicted before it was kept"
    server.assert_pinned(A, B)


def test_requests_that_use_a_context_before_it_is_encoded_pin_it(server: Server) -> None:
    server.engine.refused = [P + A]
    with pytest.raises(ValueError, match="refused"):
        run(server.register(A, pin=True))
    server.host.serve(ape(B, A))
    server.assert_pinned(A)


def test_registering_after_a_flush_brings_pins_back(server: Server) -> None:
    run(server.register(A, pin=True))
    flush(server.host)
    assert server.host.tree.pins.any_waiting
    run(server.register(A))
    server.assert_pinned(A)


def fail(server: Server, *contexts: list[int], pin: bool) -> None:
    server.engine.refused = [P + B]
    with pytest.raises(ValueError, match="refused by the engine"):
        run(server.register(*contexts, pin=pin))
    server.engine.refused = []


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("contexts", [[A, B, C], [B, A, C], [A, C, B]])
def test_a_failed_call_can_be_repeated_and_goes_on(
    server: Server, contexts: list[list[int]], pin: bool
) -> None:
    fail(server, *contexts, pin=pin)
    assert [list(one.ids) for one in server.store] == contexts, "they stay known"
    before = server.engine.encoded()
    found = run(server.register(*contexts, pin=pin))
    assert all(server.engine.encoded().count(P + own) == 1 for own in (A, C))
    assert server.engine.computed == len(P + A + B + C)
    assert computed(found) == sum(len(own) for own in contexts if P + own not in before or own == B)
    if pin:
        server.assert_pinned(*contexts)


@pytest.mark.parametrize("pin", [False, True])
def test_a_failed_call_leaves_what_was_registered_before(server: Server, pin: bool) -> None:
    run(server.register(A, pin=True))
    run(server.register(C))
    fail(server, A, B, C, pin=pin)
    assert [list(one.ids) for one in server.store] == [A, C, B]
    assert [one.pinned for one in server.store] == [True, pin, pin]
    evict_all(server.host)
    kept = [A, C] if pin else [A]
    assert server.host.tree.protected_size() == len(P) + sum(map(len, kept))


def test_what_a_failed_call_left_can_be_deleted(server: Server) -> None:
    fail(server, A, B, pin=True)
    for context in list(server.store):
        assert run(server.registry.forget(context.id))
    run(server.register(A, B))
    server.assert_no_pin_is_left()


def test_pins_beyond_the_cap_are_refused_before_anything_is_encoded() -> None:
    server = Server(store=make_store(pinned=len(P + A)))
    with pytest.raises(ApeRequestError) as caught:
        run(server.register(A, B, pin=True))
    assert (caught.value.param, caught.value.status_code) == ("pin", 507)
    assert (server.engine.requests, server.engine.sent, len(server.store)) == ([], [], 0)


@pytest.mark.parametrize("message_tokens", [1, 1000])  # a message each, or one for both
def test_a_call_that_is_given_up_can_be_repeated_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, message_tokens: int
) -> None:
    monkeypatch.setattr(channel, "_MESSAGE_TOKENS", message_tokens)

    async def give_up(server: Server, count: int) -> bool:
        task = asyncio.create_task(server.register(A, B, pin=True))
        await steps(count)
        given_up = task.cancel()
        await server.settle()
        await server.register(A, B, pin=True)
        return given_up

    given_up = []
    for count in range(80):
        server = Server()
        given_up.append(run(give_up(server, count)))
        assert server.engine.computed == len(P + A + B), count
        server.assert_pinned(A, B)
    assert given_up[0] and not given_up[-1]


@pytest.mark.parametrize("message_tokens", [1, 1000])
def test_a_call_that_is_given_up_leaves_no_pin_of_what_was_deleted(
    monkeypatch: pytest.MonkeyPatch, message_tokens: int
) -> None:
    monkeypatch.setattr(channel, "_MESSAGE_TOKENS", message_tokens)

    async def give_up(server: Server, count: int) -> None:
        task = asyncio.create_task(server.register(A, B, pin=True))
        await steps(count)
        known = list(server.store)
        deleted = asyncio.gather(*(server.registry.forget(context.id) for context in known))
        await steps(7)
        task.cancel()
        await deleted
        await server.settle()

    for count in range(1, 60):
        server = Server()
        run(give_up(server, count))
        assert len(server.store) == 0
        assert not server.host.tree.pins._paths, count


@pytest.mark.parametrize("message_tokens", [1, 1000])
def test_a_context_forgotten_while_it_is_registered_leaves_no_pin(
    monkeypatch: pytest.MonkeyPatch, message_tokens: int
) -> None:
    monkeypatch.setattr(channel, "_MESSAGE_TOKENS", message_tokens)

    async def forget(server: Server, count: int) -> None:
        task = asyncio.create_task(server.register(A, B, pin=True))
        await steps(count)
        known = list(server.store)
        await asyncio.gather(*(server.registry.forget(context.id) for context in known))
        await task
        await server.settle()

    for count in range(1, 80):
        server = Server()
        run(forget(server, count))
        assert len(server.store) == 0, count
        server.assert_no_pin_is_left()


def test_a_context_forgotten_and_registered_again_has_the_last_ones_pin() -> None:
    async def forget(server: Server, count: int) -> None:
        first = asyncio.create_task(server.register(A, B, pin=True))
        await steps(count)
        for context in list(server.store):
            await server.registry.forget(context.id)
        await asyncio.gather(first, server.register(A, pin=True))
        await server.settle()

    for count in range(1, 60, 2):
        server = Server()
        run(forget(server, count))
        server.assert_pinned(A)


async def one_fails_later(server: Server, started: int, pin: bool) -> None:
    """Of two calls for A the first one fails, for another context, after the second succeeded."""
    server.engine.refused = [P + B]
    server.engine.steps = lambda path: 200 if path == P + B else 1
    failing = asyncio.create_task(server.register(A, B, pin=pin))
    await steps(started)
    await server.register(A, pin=pin)
    assert not failing.done()
    with pytest.raises(ValueError, match="refused"):
        await failing


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("started", [1, 10, 40])
def test_a_failed_call_leaves_what_another_one_registered_too(
    server: Server, started: int, pin: bool
) -> None:
    run(one_fails_later(server, started, pin))
    assert [(list(one.ids), one.pinned) for one in server.store] == [(A, pin), (B, pin)]
    evict_all(server.host)
    assert server.host.tree.protected_size() == (len(P + A) if pin else 0)


def test_a_failed_call_leaves_what_came_after_a_deletion(server: Server) -> None:
    server.engine.refused = [P + B]
    server.engine.steps = lambda path: 60 if path == P + B else 1

    async def both() -> None:
        failing = asyncio.create_task(server.register(A, B, pin=True))
        await steps(30)
        (a, _) = list(server.store)
        await server.registry.forget(a.id)
        await server.register(A, pin=True)
        with pytest.raises(ValueError, match="refused"):
            await failing

    run(both())
    assert [(list(one.ids), one.pinned) for one in server.store] == [(B, True), (A, True)]
    evict_all(server.host)
    assert server.host.tree.protected_size() == len(P + A)


# ---------------------------------------------------------------- forgetting and looking


def test_a_forgotten_context_is_unknown_and_its_kv_stays_until_it_is_evicted(
    server: Server,
) -> None:
    (one,) = run(server.register(A, pin=True))
    assert run(server.registry.forget(one.context.id))
    assert not run(server.registry.forget(one.context.id))
    assert cached(server.host, P + A) == len(P + A)
    server.assert_no_pin_is_left()


def test_forgetting_what_is_not_pinned_asks_the_scheduler_nothing(server: Server) -> None:
    (one,) = run(server.register(A))
    server.engine.sent.clear()
    run(server.registry.forget(one.context.id))
    assert server.engine.sent == []


def test_what_is_cached_is_told_without_the_prefix(server: Server) -> None:
    contexts = [one.context for one in run(server.register(A, B, C))]
    assert run(server.registry.cached_tokens(contexts)) == [len(A), len(B), len(C)]
    evict_all(server.host)
    server.host.serve(plain(P + C[:2]))
    assert run(server.registry.cached_tokens(contexts)) == [0, 0, 2]
    flush(server.host)
    server.host.serve(plain(P[:1]))
    assert run(server.registry.cached_tokens(contexts)) == [0, 0, 0]


def test_what_is_counted_is_what_was_computed(server: Server) -> None:
    server.host.serve(plain(P + A))
    run(server.register(A, B, pin=True))
    assert server.counted.registrations == [Usage(2, len(A + B), len(A))]
    assert server.counted.store == (2, len(P + A + B), len(P + A + B))
    for context in list(server.store):
        run(server.registry.forget(context.id))
    assert server.counted.store == (0, 0, 0)


@pytest.mark.parametrize("pin", [False, True])
def test_a_failed_call_is_seen_in_the_store_alone(server: Server, pin: bool) -> None:
    fail(server, A, B, pin=pin)
    tokens = len(P + A + B)
    assert server.counted.store == (2, tokens, tokens if pin else 0)
    assert server.counted.registrations == []


@pytest.mark.parametrize("pin", [False, True])
def test_registered_contexts_are_counted_when_they_are_evicted(server: Server, pin: bool) -> None:
    server.host.tree._evictions = Evictions()
    for one in run(server.register(A, B, C, pin=pin)):
        if pin:
            run(server.registry.forget(one.context.id))
    evict_all(server.host)
    assert server.host.tree._evictions.count == 3


# ---------------------------------------------------------------- no cache, adapters, tenants


def test_without_radix_cache_contexts_are_known_and_nothing_is_encoded() -> None:
    server = Server(disable_radix_cache=True)
    found = run(server.register(A, B))
    assert reused(found) == run(server.registry.cached_tokens([one.context for one in found]))
    assert reused(found) == [0, 0]
    assert (server.engine.requests, server.engine.sent) == ([], [])
    assert run(server.registry.forget(found[0].context.id))


def test_without_radix_cache_nothing_can_be_pinned() -> None:
    server = Server(disable_radix_cache=True)
    with pytest.raises(ApeRequestError) as caught:
        run(server.register(A, pin=True))
    assert (caught.value.param, caught.value.status_code) == ("pin", 400)
    assert "--disable-radix-cache" in str(caught.value)
    assert len(server.store) == 0


@pytest.mark.parametrize("key", [None, "salt"])
def test_the_cache_of_an_adapter_is_named_by_its_id_behind_the_key(
    server: Server, key: str | None
) -> None:
    server.engine.lora_ref_cache["adapter"] = "uuid"
    tenant = Tenant("adapter", key)
    run(server.register(A, pin=True, tenant=tenant))
    (request,) = server.engine.requests
    assert (request.lora_path, request.extra_key) == ("adapter", key)
    evict_all(server.host)
    assert cached(server.host, P + A, (key or "") + "uuid") == len(P + A)
    assert [cached(server.host, P + A, other) for other in (key, None)] == [0, 0]


def test_of_an_adapter_that_is_not_loaded_nothing_is_cached(server: Server) -> None:
    server.engine.lora_ref_cache["adapter"] = "uuid"
    own = [one.context for one in run(server.register(A, tenant=ADAPTER))]
    mixed = own + [one.context for one in run(server.register(A, B))]
    assert run(server.registry.cached_tokens(mixed)) == [len(A), len(A), len(B)]
    server.engine.lora_registry.clear()
    assert run(server.registry.cached_tokens(mixed)) == [0, len(A), len(B)]
    assert server.engine.sent[-1].names == [context.id for context in mixed[1:]], "nothing to ask"


def test_an_unknown_adapter_is_refused_before_anything_is_known(server: Server) -> None:
    with pytest.raises(ApeRequestError) as caught:
        run(server.register(A, pin=True, tenant=ADAPTER))
    assert (caught.value.param, caught.value.status_code) == ("lora_path", 400)
    assert (len(server.store), server.engine.requests, server.engine.sent) == (0, [], [])


@pytest.mark.parametrize("evicted_before_the_pin", [False, True])
def test_an_adapter_that_comes_back_for_the_encoding_is_pinned(
    server: Server, evicted_before_the_pin: bool
) -> None:
    """Before it is loaded, the scheduler cannot be told of the pin."""

    def before_message(action: str) -> None:
        if action == PIN and evicted_before_the_pin:
            server.engine.before_message = lambda action: None
            evict_all(server.host)
            assert server.host.tree.total_size() == 0

    server.engine.before_message = before_message
    server.engine.lora_ref_cache["adapter"] = "uuid"
    assert server.engine.lora_registry == {}
    run(server.register(A, pin=True, tenant=ADAPTER))
    assert server.engine.lora_registry == {"adapter": "uuid"}
    assert len(server.engine.requests) == (2 if evicted_before_the_pin else 1)
    evict_all(server.host)
    assert cached(server.host, P + A, "uuid") == len(P + A)


def test_tenants_encode_and_pin_for_themselves(server: Server) -> None:
    run(server.register(A, pin=True, tenant=Tenant(None, "one")))
    found = run(server.register(A, tenant=Tenant(None, "two")))
    assert reused(found) == [0]
    evict_all(server.host)
    assert [cached(server.host, P + A, key) for key in ("one", "two")] == [len(P + A), 0]


# ---------------------------------------------------------------- as users see it


LIMITS = Limits(window=64, context_tokens=60, pool_tokens=400, vocab_size=1000)


def make_service(server: Server, render: Any = None, tokenizer: Any = "chars") -> ContextService:
    tokenizer = CharTokenizer() if tokenizer == "chars" else tokenizer
    return ContextService(
        Entry(tokenizer, LIMITS, DEFAULTS, None, server.store, server.registry), render
    )


def body(*contexts: list[int], **fields: Any) -> dict[str, Any]:
    return {"contexts": [{"input_ids": own} for own in contexts], "prefix_ids": P, **fields}


def refusal(service: ContextService, fields: dict[str, Any]) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        run(service.register(fields))
    return caught.value


def test_a_registration_is_answered_context_by_context(server: Server) -> None:
    server.host.serve(plain(P + A))
    answer = run(make_service(server).register(body(A, B, pin=True)))
    numbers = [(len(A), len(A), True), (len(B), 0, True)]
    wanted = [
        {"id": one.id, "tokens": tokens, "cached_tokens": hit, "pinned": pinned}
        for one, (tokens, hit, pinned) in zip(server.store, numbers, strict=True)
    ]
    assert answer == {"contexts": wanted}


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, [1, 10, 10]),
        ({"prefix": ""}, [2]),
        ({"prefix": "x"}, [2, ord("x")]),
        ({"prefix_ids": []}, []),
        ({"prefix": None, "prefix_ids": [4, 5]}, [4, 5]),
        ({"messages": [{"role": "user", "content": "hi"}]}, [7, 8]),
        ({"messages": [], "tools": [1], "chat_template_kwargs": {"a": 1}}, [7, 8]),
    ],
)
def test_the_prefix_is_the_given_one_or_the_default(
    server: Server, fields: dict[str, Any], prefix: list[int]
) -> None:
    service = make_service(server, render=lambda fields: [7, 8])
    run(service.register({"contexts": ["ab"], **fields}))
    (one,) = server.store
    assert (list(one.prefix.ids), list(one.ids)) == (prefix, [ord("a"), ord("b")])


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, [1, 10, 10, 50, 51, 52]),
        ({"prefix": "x"}, [2, ord("x")]),
        ({"prefix_ids": []}, []),
        ({"messages": [{"role": "user", "content": "hi"}]}, [7, 8, 50, 51, 52]),
    ],
)
def test_warm_items_end_the_prefix_that_the_registration_does_not_give(
    server: Server, fields: dict[str, Any], prefix: list[int]
) -> None:
    service = make_service(server, render=lambda fields: [7, 8])
    warm = (array("I", [50, 51]), array("I", [52]))
    service._entry = service._entry._replace(defaults=DEFAULTS._replace(warm=warm))
    run(service.register({"contexts": ["ab"], **fields}))
    (one,) = server.store
    assert (list(one.prefix.ids), list(one.ids)) == (prefix, [ord("a"), ord("b")])


def test_known_contexts_can_be_registered_by_id_to_pin_them(server: Server) -> None:
    service = make_service(server)
    (one,) = run(service.register(body(A)))["contexts"]
    again = run(service.register({"contexts": [{"id": one["id"]}, "x"], "pin": True}))
    assert again["contexts"][0]["id"] == one["id"]
    server.assert_pinned(A, [ord("x")])


LONE = "a\ud800"
TEXT = ["text"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"contexts": TEXT, "lora_path": 5}, "lora_path"),
        ({"contexts": TEXT, "lora_path": ["a"]}, "lora_path"),
        ({"contexts": TEXT, "lora_path": LONE}, "lora_path"),
        ({"contexts": TEXT, "extra_key": {}}, "extra_key"),
        ({"contexts": TEXT, "extra_key": LONE}, "extra_key"),
        ({"contexts": TEXT, "pin": "yes"}, "pin"),
        ({"contexts": TEXT, "pin": 1}, "pin"),
        ({"contexts": TEXT, "pin": None}, "pin"),
        ({}, "contexts"),
        ({"contexts": None}, "contexts"),
        ({"contexts": []}, "contexts"),
        ({"contexts": "text"}, "contexts"),
        ({"contexts": {"text": "a"}}, "contexts"),
        ({"contexts": 5}, "contexts"),
        ({"contexts": ["a", ""]}, "contexts[1]"),
        ({"contexts": ["a", "\0"]}, "contexts[1]"),
        ({"contexts": ["a", 5]}, "contexts[1]"),
        ({"contexts": [["a"]]}, "contexts[0]"),
        ({"contexts": [{"text": 5}]}, "contexts[0].text"),
        ({"contexts": [{"input_ids": [-1]}]}, "contexts[0].input_ids"),
        ({"contexts": [{"input_ids": [1000]}]}, "contexts[0]"),
        ({"contexts": ["a", {"id": "ctx-none"}]}, "contexts[1].id"),
        ({"contexts": ["a", "b" * 60]}, "contexts[1]"),
        ({"contexts": TEXT, "prefix": 5}, "prefix"),
        ({"contexts": TEXT, "prefix": LONE}, "prefix"),
        ({"contexts": TEXT, "prefix_ids": "text"}, "prefix_ids"),
        ({"contexts": TEXT, "prefix_ids": [[1]]}, "prefix_ids"),
        ({"contexts": TEXT, "prefix_ids": [1, 1000]}, "prefix"),
        ({"contexts": TEXT, "prefix": "a", "prefix_ids": [1]}, "prefix_ids"),
        ({"contexts": TEXT, "prefix": "a", "messages": []}, "messages"),
        ({"contexts": TEXT, "messages": []}, "messages"),
        ({"contexts": TEXT, "tools": []}, "tools"),
        ({"contexts": TEXT, "prefix": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(make_service(server), fields)
    assert (error.param, error.status_code) == (param, 400), str(error)
    assert param.split("[")[0] in str(error)
    assert (len(server.store), server.engine.requests) == (0, [])


def test_an_unknown_field_is_named_in_the_message(server: Server) -> None:
    error = refusal(make_service(server), {"contexts": TEXT, "pinned": True})
    assert (error.param, error.status_code) == (None, 400)
    assert "'pinned'" in str(error)


def test_an_id_of_another_tenant_or_prefix_is_refused(server: Server) -> None:
    service = make_service(server)
    (one,) = run(service.register(body(A)))["contexts"]
    by_id = [{"id": one["id"]}]
    assert refusal(service, {"contexts": by_id, "extra_key": "key"}).param == "contexts[0].id"
    assert refusal(service, {"contexts": by_id, "prefix": "a"}).param == "contexts[0].id"


def test_what_has_no_room_gets_507() -> None:
    server = Server(store=make_store(entries=2, pinned=len(P + A)))
    service = make_service(server)
    wide = refusal(service, body([1], [2], [3]))
    assert (wide.param, wide.status_code) == ("contexts", 507)
    pins = refusal(service, body(A, B, pin=True))
    assert (pins.param, pins.status_code) == ("pin", 507)
    assert len(server.store) == 0


def test_an_engine_without_tokenizer_wants_ids(server: Server) -> None:
    service = make_service(server, tokenizer=None)
    assert refusal(service, {"contexts": TEXT, "prefix_ids": P}).param == "contexts"
    assert refusal(service, {"contexts": [{"input_ids": A}]}).param == "prefix"
    run(service.register(body(A)))


@pytest.mark.parametrize("size", [57, 58])
def test_a_context_must_leave_room_for_a_query(server: Server, size: int) -> None:
    """60 tokens of contexts and a window of 64: the smaller of both, less a prefix of 3."""
    service = make_service(server)
    fields = body([1] * size)
    if size == 57:
        run(service.register(fields))
    else:
        assert refusal(service, fields).param == "contexts[0]"


# ---------------------------------------------------------------- lists


def test_a_context_is_described_with_its_tenant_and_what_is_cached(server: Server) -> None:
    service = make_service(server)
    (one,) = run(service.register(body(A, pin=True, extra_key="key")))["contexts"]
    wanted = {
        "id": one["id"],
        "tokens": len(A),
        "cached_tokens": len(A),
        "pinned": True,
        "prefix_tokens": len(P),
        "lora_path": None,
        "extra_key": "key",
    }
    assert run(service.get(one["id"])) == wanted
    page = run(service.page())
    assert page.pop("contexts") == [wanted]
    assert page == {
        "next": None,
        "total": 1,
        "tokens": len(P + A),
        "max_tokens": server.store.max_tokens,
        "pinned_tokens": len(P + A),
        "max_pinned_tokens": server.store.max_pinned_tokens,
    }


def test_looking_is_no_use(server: Server) -> None:
    service = make_service(server)
    (one,) = run(service.register(body(A)))["contexts"]
    run(service.page())
    run(service.get(one["id"]))
    actions = [message.action for message in server.engine.sent]
    assert actions[-2:] == [LOOK, LOOK]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
def test_pages_list_every_context_once_and_the_last_has_no_next(server: Server, limit: int) -> None:
    service = make_service(server)
    known = run(service.register(body(*([token] for token in range(100, 106)))))["contexts"]
    listed, after = [], -1
    for _ in range(-(-6 // limit)):
        page = run(service.page(after, limit))
        listed += [one["id"] for one in page["contexts"]]
        after = page["next"]
    assert listed == [one["id"] for one in known]
    assert after is None, "no page is empty"


def test_an_empty_store_has_one_empty_page(server: Server) -> None:
    page = run(make_service(server).page())
    assert (page["contexts"], page["next"], page["total"]) == ([], None, 0)


def test_an_unknown_id_gets_404(server: Server) -> None:
    service = make_service(server)
    for ask in (service.get, service.forget):
        with pytest.raises(ApeRequestError) as caught:
            run(ask("ctx-none"))
        assert (caught.value.param, caught.value.status_code) == ("id", 404)


def test_what_is_forgotten_is_unknown(server: Server) -> None:
    service = make_service(server)
    (one,) = run(service.register(body(A, pin=True)))["contexts"]
    assert run(service.forget(one["id"])) == {"id": one["id"], "deleted": True}
    with pytest.raises(ApeRequestError):
        run(service.get(one["id"]))
    server.assert_no_pin_is_left()


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def client(server: Server) -> TestClient:
    app = FastAPI()
    add_routes(app, make_service(server))
    return TestClient(app)


def assert_error(response: Any, status: int, param: str | None) -> None:
    error = response.json()["error"]
    assert response.status_code == error["code"] == status, error
    assert error["param"] == param, error


def test_contexts_are_registered_listed_and_deleted_over_http(client: TestClient) -> None:
    made = client.post("/ape/contexts", json=body(A, B)).json()["contexts"]
    found = client.get("/ape/contexts").json()
    assert [one["id"] for one in found["contexts"]] == [one["id"] for one in made]
    one = f"/ape/contexts/{made[0]['id']}"
    assert client.get(one).json()["tokens"] == len(A)
    assert client.delete(one).json()["deleted"] is True
    assert_error(client.get(one), 404, "id")
    assert_error(client.delete(one), 404, "id")


def test_a_list_goes_by_pages_and_tenants(client: TestClient) -> None:
    for tenant in (ANYONE, TENANTS[3]):
        client.post("/ape/contexts", json=body(A, B, C, **tenant._asdict()))
    first = client.get("/ape/contexts", params={"limit": 4}).json()
    last = client.get("/ape/contexts", params={"limit": 4, "after": first["next"]}).json()
    assert [len(page["contexts"]) for page in (first, last)] == [4, 2]
    assert last["next"] is None
    mine = client.get("/ape/contexts", params={"extra_key": "key"}).json()
    assert [one["extra_key"] for one in mine["contexts"]] == ["key"] * 3
    other = client.get("/ape/contexts", params={"lora_path": "none"}).json()
    assert (other["contexts"], other["total"]) == ([], 6)


@pytest.mark.parametrize("name", ["after", "limit"])
@pytest.mark.parametrize("given", ["", "-1", "1.5", "x", "²", "+1", "9" * 5000])
def test_what_is_no_number_of_a_page_is_refused(client: TestClient, name: str, given: str) -> None:
    if name == "after" and given.startswith("9"):
        return
    assert_error(client.get("/ape/contexts", params={name: given}), 400, name)


@pytest.mark.parametrize(("limit", "status"), [(0, 400), (1, 200), (1000, 200), (1001, 400)])
def test_a_page_has_from_1_to_1000_contexts(client: TestClient, limit: int, status: int) -> None:
    assert client.get("/ape/contexts", params={"limit": limit}).status_code == status


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"text"', b"null", b"5"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, data: bytes) -> None:
    assert_error(client.post("/ape/contexts", content=data), 400, None)


def test_a_wrong_field_over_http_is_named(client: TestClient) -> None:
    assert_error(client.post("/ape/contexts", json=body(A, pin="yes")), 400, "pin")


def test_what_is_beyond_a_limit_is_refused(server: Server, client: TestClient) -> None:
    cases = (({"body_bytes": 20}, 413, None), ({"contexts": 1}, 400, "contexts"))
    for limits, status, field in cases:
        service = make_service(server)
        service._entry = service._entry._replace(limits=LIMITS._replace(**limits))
        app = FastAPI()
        add_routes(app, service)
        assert_error(TestClient(app).post("/ape/contexts", json=body(A, A)), status, field)
    assert client.post("/ape/contexts", json=body(A, A)).status_code == 200


def test_what_the_engine_refuses_gets_its_message(server: Server, client: TestClient) -> None:
    server.engine.refused = [P + A]
    response = client.post("/ape/contexts", json=body(A, pin=True))
    assert_error(response, 400, None)
    assert "refused by the engine" in response.json()["error"]["message"]
    (one,) = client.get("/ape/contexts").json()["contexts"]
    assert (one["pinned"], one["cached_tokens"]) == (True, 0), "it stays known"


# ---------------------------------------------------------------- the prefix of a chat


class Marker:
    """Stands for ``ContextMarker``: the contexts go before the last message."""

    def mark(self, messages: Any) -> list[Any]:
        if not isinstance(messages, list):
            raise ApeRequestError("messages must be a list", "messages")
        return messages

    def split(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        return prompt[:-1], prompt[-1:]


def render(**fields: Any) -> list[int]:
    """Each message has its length for a token."""
    chat = SimpleNamespace(
        _process_messages=lambda request, is_multimodal: SimpleNamespace(
            prompt_ids=[len(message.content) for message in request.messages]
            + [len(request.tools or [])]
        )
    )
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_chat=chat))
    return chat_renderer(app, Marker())(fields)


USER = {"role": "user", "content": "hi there"}
SYSTEM = {"role": "system", "content": "sys"}


def test_a_chat_without_user_message_gets_one() -> None:
    assert render(messages=[SYSTEM]) == [3, 1]
    assert render(messages=[SYSTEM, USER]) == [3, 8]


@pytest.mark.parametrize("messages", ["text", [5], [{"role": "user"}], [{"role": "x"}, USER]])
def test_wrong_messages_are_refused(messages: Any) -> None:
    with pytest.raises(ApeRequestError) as caught:
        render(messages=messages)
    assert caught.value.param == "messages"
