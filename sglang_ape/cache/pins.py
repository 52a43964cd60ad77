"""Contexts that the radix tree must not evict."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sglang.srt.mem_cache.radix_cache import TreeNode

Takes = Callable[[set[TreeNode]], bool]
"""Whether some nodes can be locked beside those that it said so of before."""


class _Path(NamedTuple):
    """The tokens P + C in their namespace; what a pin is matched by when they are stored."""

    extra_key: str | None
    length: int
    digest: bytes


class Pins:
    """Named paths of a tree, each locked from the root to the end of its context.

    A pin is a wish that outlives the KV: one whose path is not in the tree, because it was never
    computed or because the cache was flushed, waits, and is locked when a request stores it. One
    whose lock would take memory that running requests need is put off until they no longer do.

    Args:
        tree: the ``ApeRadixCache``.

    Attributes:
        room: how much can be locked now, asked once for some paths; the scheduler's ``room.Room``.
    """

    def __init__(self, tree: Any) -> None:
        self.room: Callable[[], Takes] = lambda: _always
        self._tree = tree
        self._paths: dict[str, _Path] = {}
        self._locked: dict[str, TreeNode] = {}
        self._waiting: dict[_Path, set[str]] = {}
        self._put_off: dict[str, tuple[array, str | None]] = {}

    def add(self, paths: Iterable[tuple[str, array, str | None]]) -> None:
        """Pin each P + C, with its ``extra_key``, under a name; one that is pinned moves there."""
        for name, ids, extra_key in paths:
            path = _path(ids, extra_key)
            if self._paths.get(name) != path:
                self.remove(name)
                self._paths[name] = path
                self._put_off[name] = (ids, extra_key)
        self.lock_put_off()

    def remove(self, name: str) -> None:
        """Unpin; a name that is not pinned is left alone."""
        path = self._paths.pop(name, None)
        if path is None:
            return
        node = self._locked.pop(name, None)
        if node is not None:
            self._tree.dec_lock_ref(node)
            return
        if self._put_off.pop(name, None) is not None:
            return
        self._waiting[path].discard(name)
        if not self._waiting[path]:
            del self._waiting[path]

    @property
    def any_held(self) -> bool:
        return bool(self._locked)

    @property
    def any_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def any_put_off(self) -> bool:
        return bool(self._put_off)

    @property
    def nodes(self) -> set[TreeNode]:
        """All that are kept."""
        return self._tree.nodes_above(self._locked.values())

    def lock_put_off(self) -> None:
        """Lock what was put off, as far as there is room now."""
        put_off, self._put_off = self._put_off, {}
        takes = self.room() if put_off else _always
        for name, (ids, extra_key) in put_off.items():
            node = self._tree.touch(ids, extra_key).node
            if node is None:
                self._waiting.setdefault(self._paths[name], set()).add(name)
            elif takes(self._tree.nodes_above([node])):
                self._tree.inc_lock_ref(node)
                self._locked[name] = node
            else:
                self._put_off[name] = (ids, extra_key)

    def stored(self, ids: array, extra_key: str | None) -> None:
        """The tree holds ``ids`` now: no pin of a beginning of them waits for it any more."""
        own = {path.length for path in self._waiting if path.extra_key == extra_key}
        digest, done = hashlib.sha256(), 0
        for length in sorted(length for length in own if length <= len(ids)):
            digest.update(ids[done:length])
            done = length
            for name in self._waiting.pop(_Path(extra_key, length, digest.digest()), ()):
                self._put_off[name] = (ids[:length], extra_key)

    def forget_nodes(self) -> None:
        """The tree was emptied: every pin waits."""
        self._locked.clear()
        self._waiting.clear()
        self._put_off.clear()
        for name, path in self._paths.items():
            self._waiting.setdefault(path, set()).add(name)


def _always(nodes: set[TreeNode]) -> bool:
    return True


def _path(ids: array, extra_key: str | None) -> _Path:
    return _Path(extra_key, len(ids), hashlib.sha256(ids).digest())
