"""Contexts that the radix tree must not evict."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any, NamedTuple

from sglang.srt.mem_cache.radix_cache import TreeNode


class _Path(NamedTuple):
    """The tokens P + C in their namespace; what a pin is matched by when they are stored."""

    extra_key: str | None
    length: int
    digest: bytes


class Pins:
    """Named paths of a tree, each locked from the root to the end of its context.

    A pin is a wish that outlives the KV: one whose path is not in the tree, because it was never
    computed or because the cache was flushed, waits, and is locked when a request stores it.

    Args:
        tree: the ``ApeRadixCache``.
    """

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._paths: dict[str, _Path] = {}
        self._locked: dict[str, TreeNode] = {}
        self._waiting: dict[_Path, set[str]] = {}

    def add(self, name: str, ids: array, extra_key: str | None) -> None:
        """Pin P + C under a name; a name that is pinned already moves to this path."""
        path = _path(ids, extra_key)
        if self._paths.get(name) == path:
            return
        self.remove(name)
        self._paths[name] = path
        node = self._tree.touch(ids, extra_key).node
        if node is None:
            self._waiting.setdefault(path, set()).add(name)
        else:
            self._lock(name, node)

    def remove(self, name: str) -> None:
        """Unpin; a name that is not pinned is left alone."""
        path = self._paths.pop(name, None)
        if path is None:
            return
        node = self._locked.pop(name, None)
        if node is not None:
            self._tree.dec_lock_ref(node)
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

    def stored(self, ids: array, extra_key: str | None) -> None:
        """The tree holds ``ids`` now: lock every beginning of them that a pin waits for."""
        own = {path.length for path in self._waiting if path.extra_key == extra_key}
        digest, done = hashlib.sha256(), 0
        for length in sorted(length for length in own if length <= len(ids)):
            digest.update(ids[done:length])
            done = length
            path = _Path(extra_key, length, digest.digest())
            node = self._tree.touch(ids[:length], extra_key).node if path in self._waiting else None
            if node is not None:
                for name in self._waiting.pop(path):
                    self._lock(name, node)

    def forget_nodes(self) -> None:
        """The tree was emptied: every pin waits."""
        self._locked.clear()
        self._waiting.clear()
        for name, path in self._paths.items():
            self._waiting.setdefault(path, set()).add(name)

    def _lock(self, name: str, node: TreeNode) -> None:
        self._tree.inc_lock_ref(node)
        self._locked[name] = node


def _path(ids: array, extra_key: str | None) -> _Path:
    return _Path(extra_key, len(ids), hashlib.sha256(ids).digest())
