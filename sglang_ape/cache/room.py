"""Memory that requests count on, which pins that come later must not take.

SGLang takes a request in if the pool has room for it, where whatever can be evicted counts as room.
A prompt that is prefilled in chunks takes it bit by bit, and a request that decodes even later. If
a pin keeps that memory meanwhile, SGLang ends the server in the first case, and in the second the
request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sglang.srt.mem_cache.radix_cache import TreeNode

from sglang_ape.cache.tree import Handle
from sglang_ape.limits import POOL_MARGIN


def keep_room(scheduler: Any) -> None:
    """Have the pins of a scheduler, on any rank, leave room for its requests."""
    pins = getattr(scheduler.tree_cache, "pins", None)  # None with --disable-radix-cache
    if pins is not None:
        pins.room = lambda: Room(scheduler).take


class Room:
    """What pins can take now, so that all that runs comes to its end.

    Args:
        scheduler: SGLang's, whose tree is an ``ApeRadixCache``.
    """

    def __init__(self, scheduler: Any) -> None:
        self._tree = scheduler.tree_cache
        self._pinned: set[TreeNode] = self._tree.pins.nodes
        self._beside = scheduler.max_total_num_tokens - POOL_MARGIN - _tokens(self._pinned)
        self._needs = {req: _most_tokens(req) for req in _running(scheduler)}
        self._largest = max(self._needs.values(), default=0)
        self._free = _free_in_chunks(scheduler)

    def take(self, nodes: set[TreeNode]) -> bool:
        """Take room for a path, if there is any.

        Args:
            nodes: of the path; those that were taken or pinned before cost nothing.
        """
        new = nodes - self._pinned
        unlocked = _tokens(node for node in new if node.lock_ref == 0)
        beside = self._beside - _tokens(new)
        if unlocked > self._free or not self._all_fit(beside, new):
            return False
        self._pinned |= new
        self._beside, self._free = beside, self._free - unlocked
        return True

    def _all_fit(self, beside: int, new: set[TreeNode]) -> bool:
        """Whether each request that runs can be the last one, with this room beside the pins."""
        return self._largest <= beside or all(
            need <= beside or need <= beside + self._own_part(req, new)
            for req, need in self._needs.items()
        )

    def _own_part(self, req: Any, new: set[TreeNode]) -> int:
        """Tokens of pinned nodes that the request itself reads."""
        end = req.last_node
        ends = end.ends if isinstance(end, Handle) else () if end is None else (end,)
        own = self._tree.nodes_above(ends)
        return _tokens(node for node in own if node in self._pinned or node in new)


def _free_in_chunks(scheduler: Any) -> float:
    """Tokens that a prompt which is prefilled in chunks leaves, if there is one."""
    chunked = scheduler.chunked_req
    if chunked is None:
        return math.inf
    left = len(chunked.full_untruncated_fill_ids) - chunked.extend_range.end
    if scheduler.is_mixed_chunk:  # in each step the others decode
        left += -(-left // scheduler.chunked_prefill_size) * len(scheduler.running_batch.reqs)
    available = scheduler.token_to_kv_pool_allocator.available_size()
    return available + scheduler.tree_cache.evictable_size() - left


def _running(scheduler: Any) -> set[Any]:
    found = set() if scheduler.chunked_req is None else {scheduler.chunked_req}
    for batch in (scheduler.running_batch, scheduler.last_batch):
        found.update(() if batch is None else batch.reqs)
    return {req for req in found if not req.finished()}


def _most_tokens(req: Any) -> int:
    return len(req.origin_input_ids) + req.sampling_params.max_new_tokens


def _tokens(nodes: Iterable[TreeNode]) -> int:
    return sum(len(node.key.token_ids) for node in nodes)
