"""What an ideal cache would find: LRU over whole documents, one request at a time.

A check from outside on what servers report. A server differs from it by requests that run side by
side, which hold memory and compute what the other is computing, and by nodes of its radix tree that
hold several documents and are evicted whole.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable, Sequence

from benchmarks.common.traces import Request

Path = tuple[Hashable, ...]


class LruTree:
    """A tree of named nodes that holds so many tokens; leaves unused for longest go first.

    Args:
        capacity: tokens.
    """

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._clock = 0
        self._sizes: dict[Path, int] = {}
        self._used: dict[Path, int] = {}  # when
        self._children: Counter[Path] = Counter()
        # A heap of (when used, order of entry, node); entries may be out of date.
        self._leaves: list[tuple[int, int, Path]] = []
        self._entries = itertools.count()

    def find(self, path: Path) -> int:
        """How many nodes at the head of the path are there."""
        found = 0
        while found < len(path) and path[: found + 1] in self._sizes:
            found += 1
        return found

    def insert(self, paths: Sequence[tuple[Path, Sequence[int]]]) -> None:
        """Use the paths of one request now, and add what is missing of them.

        Args:
            paths: each with the tokens of its nodes.

        Raises:
            ValueError: they do not fit by themselves.
        """
        self._clock += 1
        for path, _ in paths:
            for length in range(1, self.find(path) + 1):
                self._use(path[:length])
        for path, sizes in paths:
            for length in range(self.find(path) + 1, len(path) + 1):
                self._add(path[:length], sizes[length - 1])

    def _add(self, node: Path, size: int) -> None:
        while self._free < size:
            self._evict()
        self._free -= size
        self._sizes[node] = size
        self._children[node[:-1]] += 1
        self._use(node)

    def _use(self, node: Path) -> None:
        self._used[node] = self._clock
        self._enter(node)

    def _enter(self, node: Path) -> None:
        heapq.heappush(self._leaves, (self._used[node], next(self._entries), node))

    def _evict(self) -> None:
        while self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if used == self._clock:
                break
            if self._used.get(node) == used and not self._children[node]:
                self._remove(node)
                return
        raise ValueError("one request alone does not fit")

    def _remove(self, node: Path) -> None:
        self._free += self._sizes.pop(node)
        del self._used[node]
        parent = node[:-1]
        self._children[parent] -= 1
        if parent in self._used:
            self._enter(parent)


def prefix_cache_finds(
    requests: Sequence[Request], document_tokens: int, tail_tokens: int, capacity: int
) -> list[int]:
    """Documents that each request finds in a prefix cache: those at its head that came so before.

    Args:
        requests: in the order in which they are served.
        document_tokens: of every document.
        tail_tokens: of a question and its answer, which stay in the cache too.
        capacity: tokens, without the prefix that all requests share.
    """
    tree = LruTree(capacity)
    found = []
    for i, request in enumerate(requests):
        found.append(tree.find(request))
        path = (*request, ("tail", i))
        tree.insert([(path, [document_tokens] * len(request) + [tail_tokens])])
    return found


def context_cache_finds(
    requests: Sequence[Request], document_tokens: int, tail_tokens: int, capacity: int
) -> list[int]:
    """Documents that each request finds in a cache of contexts: all that came before in any way.

    Arguments as of :func:`prefix_cache_finds`.
    """
    tree = LruTree(capacity)
    found = []
    for i, request in enumerate(requests):
        found.append(sum(tree.find((document,)) for document in request))
        paths: list[tuple[Path, list[int]]] = [((one,), [document_tokens]) for one in request]
        tree.insert([*paths, ((("tail", i),), [tail_tokens])])
    return found
