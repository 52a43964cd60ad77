"""Which cached contexts a row can start with.

The scheduler reuses one unbroken run at the head of a row. The order of contexts does not matter
to the answer, so the cached ones are moved to the head: then every cached context counts.
"""

from __future__ import annotations

from collections.abc import Sequence


def cached_first(cached: Sequence[int], lens: Sequence[int]) -> list[int]:
    """Order contexts so that the reusable run is as long as it can be.

    Args:
        cached: leading tokens of each context found in the cache.
        lens: tokens of each context.

    Returns:
        A permutation of indices: fully cached contexts, then the one with the longest cached
        part, then the rest; ties keep the given order.
    """
    whole = [i for i, (hit, length) in enumerate(zip(cached, lens, strict=True)) if hit == length]
    if len(whole) == len(lens):
        return whole
    kept = set(whole)
    rest = [i for i in range(len(lens)) if i not in kept]
    best = max(rest, key=lambda i: cached[i])  # the first of equals
    rest.remove(best)
    return [*whole, best, *rest]
