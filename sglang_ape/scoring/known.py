"""Scores that were computed before."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from sglang_ape.entry.call import Ids
from sglang_ape.store.contexts import digest_of

MOST_SCORES = 1 << 18
"""About 50 MB."""


class KnownScores:
    """Scores by what they depend on; beyond ``most`` the least recently used are forgotten.

    A score may have been computed with weights that were replaced meanwhile. So whoever computes
    scores remembers :attr:`age` from before, and brings them with it.
    """

    def __init__(self, most: int = MOST_SCORES) -> None:
        self.age = 0
        self._most = most
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: bytes) -> float | None:
        if key in self._scores:
            self._scores.move_to_end(key)
        return self._scores.get(key)

    def add(self, key: bytes, score: float, age: int) -> None:
        if age != self.age:
            return
        self._scores[key] = score
        self._scores.move_to_end(key)
        if len(self._scores) > self._most:
            self._scores.popitem(last=False)

    def forget(self) -> None:
        """Forget everything, and what is being computed now as soon as it comes."""
        self.age += 1
        self._scores.clear()


def score_keys(
    whose: tuple[str | None, ...],
    prefix: Ids,
    contexts: Sequence[Ids],
    query: Ids,
    of_set: bool,
) -> list[bytes]:
    """All that the score of each context depends on, for one set of weights.

    Args:
        whose: adapter and cache key.
        prefix: P.
        contexts: of the request.
        query: Q.
        of_set: whether a score depends on the other contexts too.
    """
    digests = [digest_of(context) for context in contexts]
    shared = hashlib.sha256(repr(whose).encode())
    for digest in (digest_of(prefix), digest_of(query), *(sorted(digests) if of_set else ())):
        shared.update(digest)
    return [hashlib.sha256(shared.digest() + digest).digest() for digest in digests]
