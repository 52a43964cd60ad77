"""Questions about contexts: on the wire, in the scheduler, and back to the one who asked."""

from __future__ import annotations

import asyncio
import pickle
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Union

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher

from sglang_ape.store import channel
from sglang_ape.store.channel import (
    LOOK,
    PIN,
    TOUCH,
    UNPIN,
    ApeContextsReqInput,
    ApeContextsReqOutput,
    CachedPath,
    SchedulerChannel,
    answer_messages,
)
from tests.support.tree import A, B, Host, P, plain
from tests.unit.test_pins import cached, evict_all, few_threads, host, structure

__all__ = ["few_threads", "host"]  # fixtures

OURS = (ApeContextsReqInput, ApeContextsReqOutput)


class Socket:
    """The part of a ZMQ socket that SGLang's ``sock_send`` and ``sock_recv`` use."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def send(self, data: bytes, flags: int) -> None:
        self.frames.append(data)

    def recv(self, flags: int) -> bytes:
        return self.frames.pop(0)

    def send_pyobj(self, obj: Any, flags: int, protocol: int) -> None:
        self.frames.append(pickle.dumps(obj, protocol))

    def recv_pyobj(self, flags: int) -> Any:
        return pickle.loads(self.frames.pop(0))


def over_the_wire(message: Any) -> Any:
    socket = Socket()
    io_struct.sock_send(socket, message)
    received = io_struct.sock_recv(socket)
    assert received is not message
    return received


class Manager:
    """The part of ``TokenizerManager`` that the channel uses, with a scheduler behind it."""

    def __init__(self, tree: Any) -> None:
        self._result_dispatcher = TypeBasedDispatcher([])
        self._scheduler = SimpleNamespace(
            tree_cache=tree, _request_dispatcher=TypeBasedDispatcher([])
        )
        answer_messages(self._scheduler)
        self.sent: list[ApeContextsReqInput] = []
        self.listening = False

    def auto_create_handle_loop(self) -> None:
        self.listening = True

    def _dispatch_to_scheduler(self, message: Any) -> None:
        assert self.listening, "nobody would receive the answer"
        self.sent.append(message)
        asyncio.get_running_loop().call_soon(self._serve, over_the_wire(message))

    def _serve(self, message: Any) -> None:
        self._receive(over_the_wire(self._scheduler._request_dispatcher(message)))

    def _receive(self, message: Any) -> None:
        self._result_dispatcher(message)


class SlowManager(Manager):
    """One whose answers arrive when they are let through."""

    def __init__(self, tree: Any) -> None:
        super().__init__(tree)
        self._held: list[Any] = []

    def _receive(self, message: Any) -> None:
        self._held.append(message)

    async def answer_one(self) -> None:
        while not self._held:
            await asyncio.sleep(0)
        self._result_dispatcher(self._held.pop(0))


class Lengths:
    """A tree whose answer is the first token of the path, so that answers can be told apart."""

    def look_up(self, ids: array, extra_key: str | None) -> int:
        return ids[0]


def path(*ids: int, name: str = "one", extra_key: str | None = None) -> CachedPath:
    return CachedPath(name, array("q", ids), extra_key)


def question(action: str, *paths: CachedPath) -> ApeContextsReqInput:
    return channel._message(action, paths)


def ask(host: Host, action: str, *paths: CachedPath) -> list[int]:
    return channel.answer(SimpleNamespace(tree_cache=host.tree), question(action, *paths)).cached


# ---------------------------------------------------------------- on the wire


@pytest.fixture(params=["msgpack", "pickle"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SGLANG_USE_PICKLE_IPC off and on."""
    io_struct.hook_custom_types(*OURS)
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", request.param == "pickle")


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("action", [LOOK, TOUCH, PIN])
def test_a_question_arrives_as_it_was_asked(action: str) -> None:
    paths = [path(0, 1, 2**32 - 1), path(7, name="ctx-é", extra_key="salt"), path()]
    received = over_the_wire(question(action, *paths))
    assert type(received) is ApeContextsReqInput
    assert received.action == action
    assert list(map(CachedPath, received.names, received.rows, received.extra_keys)) == paths
    assert [row.typecode for row in received.rows] == ["q"] * 3


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("numbers", [[], [0], [5, 0, 1 << 20]])
def test_an_answer_arrives_as_it_was_given(numbers: list[int]) -> None:
    received = over_the_wire(ApeContextsReqOutput(cached=numbers))
    assert type(received) is ApeContextsReqOutput
    assert received.cached == numbers


def test_ranks_hand_a_question_on_by_pickle() -> None:
    """``broadcast_pyobj``, from rank 0 to the others."""
    received = pickle.loads(pickle.dumps(question(PIN, path(1, 2, extra_key="key"))))
    assert (received.action, received.extra_keys) == (PIN, ["key"])
    assert received.rows == [array("q", [1, 2])]


@pytest.mark.parametrize("end", [lambda: answer_messages(fresh_scheduler()), lambda: Manager(None)])
def test_a_process_reads_the_messages_once_its_end_is_made(
    monkeypatch: pytest.MonkeyPatch, end: Any
) -> None:
    stock = tuple(kind for kind in io_struct._all_types if kind not in OURS)
    monkeypatch.setattr(io_struct, "_all_types", stock)
    decoder = msgspec.msgpack.Decoder(Union[stock], dec_hook=io_struct.dec_hook)  # noqa: UP007
    monkeypatch.setattr(io_struct, "_msgpack_decoder", decoder)
    data = io_struct.msgpack_encode(question(LOOK, path(1)))
    with pytest.raises(msgspec.ValidationError):
        io_struct.msgpack_decode(data)
    end()
    assert io_struct.msgpack_decode(data).names == ["one"]


def fresh_scheduler() -> SimpleNamespace:
    return SimpleNamespace(_request_dispatcher=TypeBasedDispatcher([]))


def test_sglangs_own_messages_still_go_their_way() -> None:
    scheduler = fresh_scheduler()
    seen: list[Any] = []
    handlers = [(io_struct.FlushCacheReqInput, seen.append)]
    scheduler._request_dispatcher += TypeBasedDispatcher(handlers)
    answer_messages(scheduler)
    flush = over_the_wire(io_struct.FlushCacheReqInput())
    scheduler._request_dispatcher(flush)
    assert seen == [flush]


# ---------------------------------------------------------------- in the scheduler


def test_looking_tells_what_is_cached_and_changes_nothing(host: Host) -> None:
    host.serve(plain(P + A))
    before = structure(host)
    assert ask(host, LOOK, path(*P, *A, 5), path(*P, *B), path(9)) == [len(P + A), len(P), 0]
    assert ask(host, LOOK, path(*P, *A, extra_key="another")) == [0]
    assert structure(host) == before


def test_touching_makes_a_path_the_last_to_go(host: Host) -> None:
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    assert ask(host, TOUCH, path(*P, *A)) == [len(P + A)]
    ends = {id(node): list(node.key.token_ids) for node in host.tree._context_ends}
    assert list(ends.values()) == [A]
    oldest = min(host.tree.evictable_leaves)
    assert list(oldest.key.token_ids) == B


def test_pinning_keeps_what_is_cached_and_tells_how_much(host: Host) -> None:
    host.serve(plain(P + A))
    paths = path(*P, *A, name="one"), path(*P, *B, name="two")
    assert ask(host, PIN, *paths) == [len(P + A), len(P)]
    evict_all(host)
    assert ask(host, LOOK, *paths) == [len(P + A), len(P)]
    host.serve(plain(P + B))
    evict_all(host)
    assert ask(host, LOOK, *paths) == [len(P + A), len(P + B)]


def test_pins_are_those_of_their_tenant(host: Host) -> None:
    host.serve(plain(P + A, extra_key="key"))
    host.serve(plain(P + A))
    ask(host, PIN, path(*P, *A, extra_key="key"))
    evict_all(host)
    assert [cached(host, P + A, key) for key in ("key", None)] == [len(P + A), 0]


def test_unpinning_goes_by_name_alone(host: Host) -> None:
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    ask(host, PIN, path(*P, *A, name="one"), path(*P, *B, name="two"))
    assert ask(host, UNPIN, path(name="one"), path(name="unknown")) == []
    evict_all(host)
    assert [cached(host, P + A), cached(host, P + B)] == [len(P), len(P + B)]


# ---------------------------------------------------------------- the main process's end


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_each_question_reaches_the_tree_and_comes_back(host: Host) -> None:
    host.serve(plain(P + A))
    manager = Manager(host.tree)
    asked = SchedulerChannel(manager)
    paths = [path(*P, *A, name="one"), path(*P, *B, name="two")]

    async def all_of_them() -> None:
        assert await asked.look(paths) == await asked.touch(paths) == [len(P + A), len(P)]
        await asked.pin(paths)
        evict_all(host)
        assert await asked.look(paths) == [len(P + A), len(P)]
        await asked.unpin(["one", "two"])
        evict_all(host)
        assert await asked.look(paths) == [0, 0]

    run(all_of_them())
    assert [m.action for m in manager.sent] == [LOOK, TOUCH, PIN, LOOK, UNPIN, LOOK]


def test_nothing_is_sent_for_no_path(host: Host) -> None:
    manager = Manager(host.tree)
    asked = SchedulerChannel(manager)
    assert run(asked.look([])) == []
    run(asked.pin([]))
    assert manager.sent == []


@given(lens=st.lists(st.integers(0, 25), max_size=12))
def test_long_lists_are_asked_in_parts_that_are_not_too_long(lens: list[int]) -> None:
    paths = [path(*range(length), name=str(i)) for i, length in enumerate(lens)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "_MESSAGE_TOKENS", 20)
        parts = list(channel._messages(paths))
    assert [one for part in parts for one in part] == paths
    sizes = [sum(len(one.ids) for one in part) for part in parts]
    assert all(size <= 20 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    firsts = [len(part[0].ids) for part in parts]
    assert all(size + nxt > 20 for size, nxt in zip(sizes, firsts[1:], strict=False)), "too short"


@pytest.fixture
def short_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(channel, "_MESSAGE_TOKENS", 2)
    yield


@pytest.mark.usefixtures("short_messages")
def test_the_answers_of_all_parts_come_back_in_order() -> None:
    manager = Manager(Lengths())
    paths = [path(first, name=str(first)) for first in (5, 3, 9, 1, 7)]
    assert run(SchedulerChannel(manager).look(paths)) == [5, 3, 9, 1, 7]
    assert [message.names for message in manager.sent] == [["5", "3"], ["9", "1"], ["7"]]


def test_questions_asked_at_once_get_their_own_answers() -> None:
    asked = SchedulerChannel(Manager(Lengths()))

    async def many() -> list[list[int]]:
        return await asyncio.gather(*(asked.look([path(i)]) for i in range(20)))

    assert run(many()) == [[i] for i in range(20)]


@pytest.mark.parametrize("steps", range(4))
def test_the_answer_to_a_question_given_up_is_not_taken_for_the_next_ones(steps: int) -> None:
    manager = SlowManager(Lengths())
    asked = SchedulerChannel(manager)

    async def give_up() -> tuple[list[int], list[int]]:
        first = asyncio.create_task(asked.look([path(1)]))
        while not manager.sent:
            await asyncio.sleep(0)
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        second = asyncio.create_task(asked.look([path(2)]))
        third = asyncio.create_task(asked.look([path(3)]))
        for _ in range(3):
            await manager.answer_one()
        assert first.cancelled()
        return await second, await third

    assert run(give_up()) == ([2], [3])
