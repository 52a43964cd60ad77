"""What the main process asks the scheduler about contexts, over SGLang's control channel.

Only the scheduler knows what is cached and can keep it from being evicted. The trees of all ranks
are equal, and so, since every rank gets every message, are their pins.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import BaseReq

from sglang_ape.control import Asker, serve

LOOK, TOUCH, PIN, UNPIN = "look", "touch", "pin", "unpin"

# A message holds the scheduler up for as long as it takes to read; 2**19 tokens are 4 MiB.
_MESSAGE_TOKENS = 1 << 19


class CachedPath(NamedTuple):
    """P + C of one context, as the tree stores it."""

    name: str  # its id
    ids: array  # of type "q"
    extra_key: str | None  # with the adapter's id, as ``schedule_batch.py: Req`` puts it together


class ApeContextsReqInput(BaseReq):
    """What to do with each of the paths: LOOK, TOUCH, PIN, or, by name only, UNPIN."""

    action: str
    names: list[str]
    rows: list[array]
    extra_keys: list[str | None]


class ApeContextsReqOutput(BaseReq):
    """The leading tokens of each path that are cached; after PIN, how many of them now."""

    cached: list[int]


def answer_messages(scheduler: Any) -> None:
    """Have a scheduler, on any rank, answer these messages."""
    serve(scheduler, ApeContextsReqInput, ApeContextsReqOutput, partial(answer, scheduler))


def answer(scheduler: Any, request: ApeContextsReqInput) -> ApeContextsReqOutput:
    """Serve one message in the scheduler, whose tree is an ``ApeRadixCache``."""
    tree = scheduler.tree_cache
    if request.action == UNPIN:
        for name in request.names:
            tree.pins.remove(name)
        return ApeContextsReqOutput(cached=[])
    cached = []
    if request.action == PIN:
        tree.pins.add(zip(request.names, request.rows, request.extra_keys, strict=True))
    for ids, extra_key in zip(request.rows, request.extra_keys, strict=True):
        if request.action == LOOK:
            cached.append(tree.look_up(ids, extra_key))
        else:
            cached.append(tree.touch(ids, extra_key).length)
    return ApeContextsReqOutput(cached=cached)


class SchedulerChannel:
    """The main process's end.

    Args:
        manager: the ``TokenizerManager``, whose sockets are used.
    """

    def __init__(self, manager: Any) -> None:
        self._ask = Asker(manager, ApeContextsReqInput, ApeContextsReqOutput)

    async def look(self, paths: Sequence[CachedPath]) -> list[int]:
        """Leading tokens of each path that are cached now, without counting as use."""
        return await self._send(LOOK, paths)

    async def touch(self, paths: Sequence[CachedPath]) -> list[int]:
        """As :meth:`look`, but the paths count as used now."""
        return await self._send(TOUCH, paths)

    async def pin(self, paths: Sequence[CachedPath]) -> None:
        """Keep the paths, or what is missing of them as soon as it is computed."""
        await self._send(PIN, paths)

    async def unpin(self, names: Sequence[str]) -> None:
        if names:
            await self._ask(_message(UNPIN, [CachedPath(name, array("q"), None) for name in names]))

    async def _send(self, action: str, paths: Sequence[CachedPath]) -> list[int]:
        cached: list[int] = []
        for part in _messages(paths):
            cached += (await self._ask(_message(action, part))).cached
        return cached


def _message(action: str, paths: Sequence[CachedPath]) -> ApeContextsReqInput:
    return ApeContextsReqInput(
        action=action,
        names=[path.name for path in paths],
        rows=[path.ids for path in paths],
        extra_keys=[path.extra_key for path in paths],
    )


def _messages(paths: Sequence[CachedPath]) -> Iterator[list[CachedPath]]:
    """The paths in runs of at most ``_MESSAGE_TOKENS``, or of one path."""
    run: list[CachedPath] = []
    tokens = 0
    for path in paths:
        if run and tokens + len(path.ids) > _MESSAGE_TOKENS:
            yield run
            run, tokens = [], 0
        run.append(path)
        tokens += len(path.ids)
    if run:
        yield run
