"""Pins that come while requests run: these find the memory that they were promised."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.cache.room import keep_room
from sglang_ape.limits import POOL_MARGIN
from tests.support.oracle import one_thread
from tests.support.tree import A, B, C, Host, P, Q, Request, ape, plain

POOL = 60
PATHS = [P + context for context in (A, B, C)]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


class Engine:
    """A scheduler with one tree, whose contexts are cached, and what runs on it."""

    def __init__(self, pool: int = POOL, **scheduler: Any) -> None:
        self.host = Host(pool)
        self.scheduler = SimpleNamespace(
            tree_cache=self.host.tree,
            token_to_kv_pool_allocator=self.host.slots,
            max_total_num_tokens=pool,
            chunked_req=None,
            running_batch=SimpleNamespace(reqs=[]),
            last_batch=None,
            is_mixed_chunk=False,
            chunked_prefill_size=4,
            **scheduler,
        )
        self.pins = self.host.tree.pins
        keep_room(self.scheduler)
        for path in PATHS:
            self.host.serve(plain(path))

    def pin(self, *paths: list[int]) -> None:
        self.pins.add([(str(path), array("q", path), None) for path in paths])

    def begin(self, req: Request, tokens: int) -> None:
        """Prefill the first tokens of a prompt that is cut in chunks."""
        self.host.admit(req)
        self.scheduler.chunked_req = req
        assert self.host.extend(req, tokens)

    def go_on(self, chunk: int = 4) -> None:
        """Prefill the rest, chunk by chunk, as the scheduler does."""
        req = self.scheduler.chunked_req
        while not self.host.prefilled(req):
            self.pins.lock_put_off()
            assert self.host.extend(req, chunk), "SGLang would end the server here"
        self.scheduler.chunked_req = None
        self.scheduler.running_batch.reqs.append(req)

    def finish(self, req: Request) -> None:
        self.scheduler.running_batch.reqs.remove(req)
        self.host.finish(req)
        self.pins.lock_put_off()
        self.host.check()


def prompt(length: int, new_tokens: int = 1) -> Request:
    req = plain(list(range(100, 100 + length)))
    req.sampling_params.max_new_tokens = new_tokens
    return req


def held(engine: Engine) -> int:
    """Tokens that pins lock."""
    return sum(len(node.key) for node in engine.pins.nodes)


def test_a_pin_is_put_off_while_a_prompt_in_chunks_counts_on_its_memory() -> None:
    engine = Engine()
    engine.begin(prompt(POOL - POOL_MARGIN - 1), 8)
    engine.pin(*PATHS)
    assert engine.pins.any_put_off and not engine.pins.any_held
    engine.go_on()
    engine.finish(engine.scheduler.running_batch.reqs[0])
    assert not engine.pins.any_put_off
    assert engine.pins.any_waiting, "the prompt took the memory of some of them"
    for path in PATHS:
        engine.host.serve(plain(path))
    assert held(engine) == len(P + A + B + C)


def test_a_pin_beside_a_short_prompt_is_locked_at_once() -> None:
    engine = Engine()
    engine.begin(prompt(20), 8)
    engine.pin(*PATHS)
    assert held(engine) == len(P + A + B + C) and not engine.pins.any_put_off
    engine.go_on()


def test_a_pin_is_put_off_while_a_request_counts_on_the_memory_for_its_answer() -> None:
    engine = Engine()
    req = prompt(20, new_tokens=POOL - POOL_MARGIN - 20)
    engine.begin(req, 20)
    engine.go_on()
    engine.pin(*PATHS)
    assert engine.pins.any_put_off and not engine.pins.any_held
    engine.finish(req)
    assert held(engine) == len(P + A + B + C)


def test_a_request_that_was_just_launched_counts_as_running() -> None:
    engine = Engine()
    req = prompt(20, new_tokens=POOL - POOL_MARGIN - 20)
    engine.begin(req, 20)
    engine.scheduler.chunked_req = None
    engine.scheduler.last_batch = SimpleNamespace(reqs=[req])
    engine.pin(*PATHS)
    assert engine.pins.any_put_off and not engine.pins.any_held


def test_what_a_request_reads_of_a_pin_needs_no_room_twice() -> None:
    engine = Engine()
    req = ape(A, B, C, query=Q)
    used = len(P + A + B + C + Q)
    req.sampling_params.max_new_tokens = POOL - POOL_MARGIN - used
    engine.begin(req, used)
    engine.go_on()
    engine.pin(*PATHS)
    assert held(engine) == len(P + A + B + C)


def test_in_mixed_chunks_the_others_decode_meanwhile() -> None:
    pinned = len(P + A + B + C)
    for mixed in (False, True):
        engine = Engine()
        engine.scheduler.is_mixed_chunk = mixed
        other = plain([70, 71])
        other.sampling_params.max_new_tokens = 8
        engine.begin(other, 2)
        engine.go_on()
        engine.begin(prompt(POOL - POOL_MARGIN - pinned - 1), 8)
        engine.pin(*PATHS)
        assert engine.pins.any_put_off == mixed


def test_a_pin_that_is_put_off_can_be_removed_or_flushed() -> None:
    engine = Engine()
    engine.begin(prompt(POOL - POOL_MARGIN - 1), 8)
    engine.pin(*PATHS)
    engine.pins.remove(str(PATHS[0]))
    engine.pins.forget_nodes()
    assert not engine.pins.any_put_off and engine.pins.any_waiting
    for path in PATHS[1:]:
        engine.pins.remove(str(path))
    assert not engine.pins.any_waiting


@settings(deadline=None, max_examples=150)
@given(
    length=st.integers(2, POOL - POOL_MARGIN - 1),
    first=st.integers(1, 20),
    paths=st.permutations(PATHS),
    chunk=st.integers(1, 9),
)
def test_whatever_is_pinned_meanwhile_a_prompt_finds_its_memory(
    length: int, first: int, paths: list[list[int]], chunk: int
) -> None:
    engine = Engine()
    req = prompt(length)
    engine.begin(req, min(first, length))
    engine.pin(paths[0])
    if not engine.host.prefilled(req):
        assert engine.host.extend(req, chunk)
    engine.pin(*paths[1:])
    engine.go_on(chunk)
    engine.host.check()
    engine.finish(req)
    assert not engine.pins.any_put_off
