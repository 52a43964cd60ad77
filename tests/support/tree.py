"""The APE radix tree on SGLang's real pools and requests, driven as the scheduler drives it.

Every KV slot is given an identity when it is "computed": the tokens it depends on. Whatever a
match returns must carry the identity that the row asks for.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import match_prefix_for_req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import TreeNode
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ape.cache.tree import ApeRadixCache, Handle
from sglang_ape.spec import ApeSpec, ProbeSpec, ScoreSpec

POOL = 200
P = [1, 2, 3]
A, B, C, D = [10, 11, 12], [20, 21], [30, 31, 32, 33], [40]
Q = [90, 91, 92]
# Full of common beginnings, between each other too.
PREFIXES: list[list[int]] = [[], [1], [1, 2]]
CONTEXTS = [[1], [1, 2], [1, 2, 3], [2], [3, 3, 3, 3, 3], [1, 2, 4, 4]]


class Identity(NamedTuple):
    """All that the KV of one token depends on."""

    namespace: tuple[str | None, ...]  # who may share it: see ``path_namespace``
    tokens: tuple[int, ...]  # it is the KV of the last of them


Row = TypeVar("Row", tuple[int, ...], list[Identity])


def path_namespace(extra_key: str | None) -> tuple[str | None, ...]:
    """Of prefixes, contexts and plain requests."""
    return ("path", extra_key)


def query_namespace(extra_key: str | None, group: str) -> tuple[str | None, ...]:
    """Of queries over one set of contexts, with T and S."""
    return ("query", extra_key, group)


def group_of(
    prefix: Sequence[int],
    contexts: Sequence[Sequence[int]],
    temperature: float,
    scale: float,
) -> str:
    """Names a set of contexts with T and S, whatever their order."""
    return repr((tuple(prefix), tuple(sorted(map(tuple, contexts))), (temperature, scale)))


def beginnings(
    namespace: tuple[str | None, ...], before: tuple[int, ...], tokens: Sequence[int]
) -> list[Identity]:
    """The identities of ``tokens`` where they stand behind ``before``."""
    path = (*before, *tokens)
    return [Identity(namespace, path[:stop]) for stop in range(len(before) + 1, len(path) + 1)]


class Parts(NamedTuple):
    """What an APE request was made of, in the order it was given."""

    prefix: list[int]
    contexts: list[list[int]]
    query: list[int]
    temperature: float
    scale: float


class Request(Req):
    """SGLang's request, which also knows what its KV must be."""

    made = 0

    def __init__(
        self,
        ids: list[int],
        custom_params: dict[str, Any] | None,
        extra_key: str | None,
        parts: Parts | None = None,
    ) -> None:
        Request.made += 1
        super().__init__(
            str(Request.made),
            "",
            array("q", ids),
            SamplingParams(custom_params=custom_params),
            extra_key=extra_key,
        )
        self.logprob_start_len = -1  # what the scheduler sets where none is asked for
        self.parts = parts  # None: a plain request
        self.copies_start: int | None = None  # row of the first copy of the query, if it scores any

    def identities(self, stop: int) -> list[Identity]:
        """Those of the first ``stop`` rows, from the row's own tokens."""
        ids = tuple(self.origin_input_ids + self.output_ids)
        path = path_namespace(self.extra_key)
        spec = self.spec_now()
        if spec is None:
            return beginnings(path, (), ids[:stop])
        prefix, contexts, rest = split_row(ids, spec)
        found = beginnings(path, (), prefix)
        for context in contexts:
            found += beginnings(path, prefix, context)
        group = group_of(prefix, contexts, spec.temperature, spec.scale)
        if spec.row_len is not None:
            group = f"tail of {self.rid}"  # nobody may read it
        found += beginnings(query_namespace(self.extra_key, group), (), rest)
        return found[:stop]

    def spec_now(self) -> ApeSpec | None:
        """The lengths in present row order; the tree keeps them on the request."""
        if self.parts is None:
            return None
        return getattr(self, "ape_spec", None) or ApeSpec.from_custom_params(
            self.sampling_params.custom_params
        )

    def assert_row_is_whole(self) -> None:
        """Reordering keeps P, Q and every context."""
        spec = self.spec_now()
        if spec is None or self.parts is None:
            return
        prefix, contexts, query = split_row(tuple(self.origin_input_ids), spec)
        assert list(prefix) == self.parts.prefix
        assert Counter(contexts) == Counter(map(tuple, self.parts.contexts))
        assert list(query) == self.parts.query


def split_row(row: Row, spec: ApeSpec) -> tuple[Row, list[Row], Row]:
    """P, the contexts in row order, and what follows them."""
    start, contexts = spec.prefix_len, []
    for length in spec.context_lens:
        contexts.append(row[start : start + length])
        start += length
    return row[: spec.prefix_len], contexts, row[start:]


def ape(
    *contexts: list[int],
    prefix: list[int] = P,
    query: list[int] = Q,
    temperature: float = 0.9,
    scale: float = 0.9,
    extra_key: str | None = None,
) -> Request:
    group = group_of(prefix, contexts, temperature, scale)
    spec = ApeSpec(len(prefix), tuple(map(len, contexts)), temperature, scale, group)
    ids = prefix + [token for context in contexts for token in context] + query
    parts = Parts(prefix, list(contexts), query, temperature, scale)
    return Request(ids, spec.to_custom_params(), extra_key, parts)


def scoring(
    *contexts: list[int],
    prefix: list[int] = P,
    query: list[int] = Q,
    extra_key: str | None = None,
) -> Request:
    """Asks for the likelihood of a query after each context alone."""
    spec = ScoreSpec.of(len(prefix), [len(context) for context in contexts], 1 + len(query))
    copies = [token for context in contexts for token in [context[-1], *query]]
    ids = prefix + [token for context in contexts for token in context] + copies
    parts = Parts(prefix, list(contexts), copies, 1.0, 1.0)
    req = Request(ids, spec.to_custom_params(), extra_key, parts)
    req.return_logprob, req.logprob_start_len = True, spec.context_end
    req.copies_start = spec.context_end
    return req


def measuring(
    *contexts: list[int],
    prefix: list[int] = P,
    query: list[int] = Q,
    extra_key: str | None = None,
) -> Request:
    """Asks how much a query attends to each context."""
    tail = [*query, 3, *query[-1:]]
    spec = ProbeSpec.of(len(prefix), list(map(len, contexts)), len(query), len(tail) - len(query))
    ids = prefix + [token for context in contexts for token in context] + tail
    req = Request(
        ids, spec.to_custom_params(), extra_key, Parts(prefix, list(contexts), tail, 1.0, 1.0)
    )
    req.copies_start = spec.context_end
    return req


def plain(ids: list[int], extra_key: str | None = None) -> Request:
    return Request(ids, None, extra_key)


class LeastRecentlyUsed:
    """SGLang's default, with ties broken by age: a random run must repeat itself."""

    def get_priority(self, node: TreeNode) -> tuple[float, int]:
        return node.last_access_time, node.id


class Host:
    """The scheduler's calls, in the scheduler's order.

    Args:
        pool: KV slots.
        requests: rows of the page table.
        row: tokens that one of them holds.
        evictions: the tree's counter of evicted contexts.
    """

    def __init__(
        self, pool: int = POOL, requests: int = 16, row: int = 128, evictions: Any = None
    ) -> None:
        self.size = pool
        self.rows = ReqToTokenPool(requests, row, "cpu", False)
        self.slots = TokenToKVPoolAllocator(pool, torch.float32, "cpu", None, False)
        params = CacheInitParams(False, self.rows, self.slots, page_size=1)
        self.tree = ApeRadixCache(params, evictions)
        self.tree.eviction_strategy = LeastRecentlyUsed()
        self.content: dict[int, Identity] = {}
        self.active: list[Request] = []

    def peek(self, req: Request) -> list[int]:
        """What a scheduling policy does to a waiting request, which then goes on waiting."""
        match_prefix_for_req(self.tree, req, include_req=True)
        return self.matched(req)

    def admit(self, req: Request) -> int:
        """Match, lock, take a row. Returns the cached tokens."""
        req.init_next_round_input(self.tree)
        found = self.matched(req)
        most = req._compute_max_prefix_len(len(req.full_untruncated_fill_ids))
        assert len(found) <= most, f"{len(found)} tokens found, {most} asked for"
        self.tree.inc_lock_ref(req.last_node)
        assert self.rows.alloc([req]) is not None
        self.rows.write((req.req_pool_idx, slice(0, len(found))), req.prefix_indices)
        req.set_extend_range(len(found), len(found))
        req.kv_committed_len = len(found)
        self.active.append(req)
        return len(found)

    def matched(self, req: Request) -> list[int]:
        """The slots that a look into the tree has found, each of them checked."""
        found = req.prefix_indices.tolist()
        req.assert_row_is_whole()
        self.assert_content(req, found)
        return found

    def evict(self, tokens: int) -> int:
        """Returns the tokens that were evicted, which may be more or, for locks, fewer."""
        return self.tree.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted

    def allocate(self, count: int) -> torch.Tensor | None:
        missing = count - self.slots.available_size()
        if missing > 0:
            self.evict(missing)
        return self.slots.alloc(count)

    def compute(self, req: Request, count: int) -> bool:
        """Run ``count`` further rows; False when the pool has no room for them."""
        start = req.extend_range.end
        stop = min(start + count, len(req.full_untruncated_fill_ids))
        slots = self.allocate(stop - start)
        if slots is None:
            return False
        self.rows.write((req.req_pool_idx, slice(start, stop)), slots)
        self.content.update(zip(slots.tolist(), req.identities(stop)[start:], strict=True))
        req.set_extend_range(start, stop)
        req.kv_committed_len = stop
        return True

    def commit(self, req: Request) -> None:
        self.tree.cache_unfinished_req(req, chunked=not self.prefilled(req))
        self.assert_content(req, self.row(req))
        assert req.prefix_indices.tolist() == self.row(req)

    def extend(self, req: Request, count: int) -> bool:
        done = self.compute(req, count)
        if done:
            self.commit(req)
        return done

    def prefill(self, req: Request, chunk: int = 10_000) -> int:
        """Admit and run the whole prompt in chunks. Returns the cached tokens."""
        cached = self.admit(req)
        while not self.prefilled(req):
            assert self.extend(req, chunk)
        return cached

    def prefilled(self, req: Request) -> bool:
        return req.extend_range.end == len(req.full_untruncated_fill_ids)

    def decode(self, req: Request, *tokens: int) -> bool:
        """Feed each token back: its KV gets a slot, but the tree learns of it at the end only."""
        for token in tokens:
            slots = self.allocate(1)
            if slots is None:
                return False
            row = len(req.origin_input_ids) + len(req.output_ids)
            req.output_ids.append(token)
            self.rows.write((req.req_pool_idx, slice(row, row + 1)), slots)
            self.content[slots.item()] = req.identities(row + 1)[row]
            req.kv_committed_len = row + 1
        return True

    def release(self, req: Request, insert: bool, grouped: bool = True) -> None:
        """SGLang releases requests of a decode batch between free_group_begin and _end."""
        if grouped:
            self.slots.free_group_begin()
        self.tree.cache_finished_req(req, insert, kv_len_to_handle=req.kv_committed_len)
        self.rows.free(req)
        if grouped:
            self.slots.free_group_end()
        self.active.remove(req)

    def finish(self, req: Request, grouped: bool = True) -> None:
        self.release(req, insert=True, grouped=grouped)

    def abort(self, req: Request) -> None:
        self.release(req, insert=False)

    def retract(self, req: Request) -> None:
        """As ``schedule_batch.release_req`` does, but for the eviction that follows there."""
        self.release(req, insert=False, grouped=False)
        req.reset_for_retract()

    def flush(self) -> None:
        """What an idle scheduler does on ``/flush_cache``."""
        assert not self.active
        self.tree.reset()
        self.rows.clear()
        self.slots.clear()

    def serve(self, req: Request, *answer: int, chunk: int = 10_000) -> int:
        """A whole request. Returns the cached tokens of its prompt."""
        cached = self.prefill(req, chunk)
        assert self.decode(req, *answer)
        self.finish(req)
        self.check()
        return cached

    def row(self, req: Request) -> list[int]:
        return self.rows.req_to_token[req.req_pool_idx, : req.kv_committed_len].tolist()

    def nodes(self) -> list[TreeNode]:
        found, stack = [], [self.tree.root_node]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found[1:]

    def cached_slots(self) -> list[int]:
        return [slot for node in self.nodes() for slot in node.value.tolist()]

    # ------------------------------------------------------------ what must hold at any time

    def check(self) -> None:
        self.assert_every_slot_has_one_owner()
        self.assert_locks_add_up()
        for req in self.active:
            self.assert_content(req, self.row(req))

    def assert_content(self, req: Request, slots: Sequence[int]) -> None:
        for row, (slot, wanted) in enumerate(zip(slots, req.identities(len(slots)), strict=True)):
            held = self.content.get(slot)
            assert held == wanted, f"row {row}, slot {slot}: wanted {wanted}, holds {held}"

    def assert_every_slot_has_one_owner(self) -> None:
        free = self.slots.free_pages.tolist() + self.slots.release_pages.tolist()
        owned = [s for req in self.active for s in self.row(req)[req.cache_protected_len :]]
        cached = self.cached_slots()
        shared = Counter(free + owned + cached)
        twice = {slot: count for slot, count in shared.items() if count > 1}
        assert not twice, f"slots with more than one owner: {twice}"
        lost = set(range(1, self.size + 1)) - set(shared)
        assert not lost, f"slots without an owner: {sorted(lost)}"
        for req in self.active:
            borrowed = set(self.row(req)[: req.cache_protected_len])
            assert borrowed <= set(cached), f"evicted under a lock: {borrowed - set(cached)}"

    def assert_locks_add_up(self) -> None:
        nodes = self.nodes()
        locked = [node for node in nodes if node.lock_ref > 0]
        assert all(node.lock_ref >= 0 for node in nodes)
        assert self.tree.protected_size() == sum(len(node.key) for node in locked)
        assert self.tree.evictable_size() == sum(len(n.key) for n in nodes if n.lock_ref == 0)
        assert all(len(node.key) == len(node.value) > 0 for node in nodes)
        wanted = Counter(id(node) for req in self.active for node in path_nodes(req, self.tree))
        for end in self.tree.pins._locked.values():
            wanted.update(id(node) for node in nodes_above(end, self.tree))
        held = {id(node): node.lock_ref for node in locked}
        assert held == dict(wanted), "locks are not those of the active requests and the pins"
        leaves = {id(n) for n in nodes if not n.children and n.lock_ref == 0}
        evictable = {id(node) for node in self.tree.evictable_leaves}
        assert evictable == leaves, "leaves that may be evicted are not those without a lock"

    def assert_everything_can_be_evicted(self) -> None:
        assert not self.active
        assert self.tree.protected_size() == 0
        assert self.slots.available_size() + self.tree.evictable_size() == self.size
        self.evict(self.size)
        assert self.slots.available_size() == self.size
        assert sorted(self.slots.free_pages.tolist()) == list(range(1, self.size + 1))


def path_nodes(req: Request, tree: ApeRadixCache) -> Iterator[TreeNode]:
    """The nodes a request holds locked, once for each time that it locks them."""
    handle = req.last_node
    ends = (handle.prefix, handle.query) if isinstance(handle, Handle) else (handle,)
    for node in ends:
        if node is not None:
            yield from nodes_above(node, tree)
    for node in handle.contexts if isinstance(handle, Handle) else ():
        while node is not handle.prefix:
            yield node
            node = node.parent


def nodes_above(node: TreeNode, tree: ApeRadixCache) -> Iterator[TreeNode]:
    """A node and all above it, without the root."""
    while node is not tree.root_node:
        assert node is not None, "a lock on a node that is not in the tree"
        yield node
        node = node.parent


def tokens_of(node: TreeNode) -> list[int]:
    return list(node.key.token_ids)
