"""Which cached contexts a row can start with.

The scheduler reuses one unbroken run at the head of a row. The order of contexts does not matter
to the answer, so the cached ones are moved to the head: then every cached context counts. Among
themselves they stand in the order in which they were cached, whatever order a request gives them
in: requests that run side by side over the same contexts then read the same KV slots in the same
order, and what one fetches the others find in the GPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence


def cached_first(cached: Sequence[int], lens: Sequence[int], ages: Sequence[int]) -> list[int]:
    """Order contexts so that the reusable run is as long as it can be.

    Args:
        cached: leading tokens of each context found in the cache.
        lens: tokens of each context.
        ages: a number that grows with the time at which a context was cached.

    Returns:
        A permutation of indices: fully cached contexts by age, then the one with the longest
        cached part, then the rest; ties keep the given order.
    """
    whole = [i for i, (hit, length) in enumerate(zip(cached, lens, strict=True)) if hit == length]
    whole.sort(key=ages.__getitem__)
    if len(whole) == len(lens):
        return whole
    kept = set(whole)
    rest = [i for i in range(len(lens)) if i not in kept]
    best = max(rest, key=lambda i: cached[i])  # the first of equals
    rest.remove(best)
    return [*whole, best, *rest]
