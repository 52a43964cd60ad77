"""The APE radix tree on SGLang's real pools, driven as the scheduler drives it.

Every KV slot is given an identity when it is "computed": the tokens it depends on. Whatever a
match returns must carry the identity that the row asks for.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from sglang_ape.cache.tree import ApeRadixCache, Handle
from sglang_ape.spec import ApeSpec
from tests.support.oracle import one_thread

POOL = 200
P = [1, 2, 3]
A, B, C, D = [10, 11, 12], [20, 21], [30, 31, 32, 33], [40]
Q = [90, 91, 92]
Identity = tuple[Any, ...]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


class SamplingParams(NamedTuple):
    custom_params: dict[str, Any] | None


class Range(NamedTuple):
    start: int
    end: int


class Parts(NamedTuple):
    """What an APE request was made of, in the order it was given."""

    prefix: list[int]
    contexts: list[list[int]]
    query: list[int]
    temperature: float
    scale: float


class Request:
    """The part of ``schedule_batch.Req`` that the tree sees, with the same life cycle."""

    made = 0

    def __init__(self, ids: list[int], custom_params: Any, extra_key: str | None) -> None:
        Request.made += 1
        self.rid = str(Request.made)
        self.origin_input_ids = array("q", ids)
        self.origin_input_ids_unpadded = self.origin_input_ids
        self.output_ids = array("q")
        self.full_untruncated_fill_ids = array("q")
        self.extend_range: Range | None = None
        self.sampling_params = SamplingParams(custom_params)
        self.extra_key = extra_key
        self.priority: int | None = None
        self.req_pool_idx: int | None = None
        self.prefix_indices = torch.empty(0, dtype=torch.int64)
        self.last_node: Any = None
        self.cache_protected_len = 0
        self.kv_committed_len = 0
        self.inflight_middle_chunks = 0
        self.return_logprob = False
        self.logprob_start_len = -1
        self.parts: Parts | None = None  # None: a plain request

    def get_fill_ids(self) -> array:
        assert self.extend_range is not None
        return self.full_untruncated_fill_ids[: self.extend_range.end]

    def refresh_fill_ids(self) -> None:
        self.full_untruncated_fill_ids = self.origin_input_ids + self.output_ids

    def max_prefix_len(self) -> int:
        length = len(self.full_untruncated_fill_ids) - 1
        if self.return_logprob and self.logprob_start_len >= 0:
            length = min(length, self.logprob_start_len)
        return length

    def identity(self, row: int) -> Identity:
        """All that the KV in ``row`` depends on, from the row's own tokens."""
        ids = list(self.origin_input_ids + self.output_ids)
        spec = self.spec_now()
        if spec is None or row < spec.prefix_len:
            return ("path", self.extra_key, *ids[: row + 1])
        start = spec.prefix_len
        contexts = []
        for length in spec.context_lens:
            if row < start + length:
                return ("path", self.extra_key, *ids[: spec.prefix_len], *ids[start : row + 1])
            contexts.append(tuple(ids[start : start + length]))
            start += length
        group = (tuple(ids[: spec.prefix_len]), tuple(sorted(contexts)))
        numbers = (spec.temperature, spec.scale)
        return ("query", self.extra_key, group, numbers, *ids[start : row + 1])

    def spec_now(self) -> ApeSpec | None:
        """The lengths in present row order; the tree keeps them on the request."""
        if self.parts is None:
            return None
        return getattr(self, "ape_spec", None) or ApeSpec.from_custom_params(
            self.sampling_params.custom_params
        )

    def assert_row_is_whole(self) -> None:
        """Reordering keeps P, Q and every context."""
        if self.parts is None:
            return
        spec, ids = self.spec_now(), list(self.origin_input_ids)
        assert spec is not None
        start, now = spec.prefix_len, []
        for length in spec.context_lens:
            now.append(tuple(ids[start : start + length]))
            start += length
        assert ids[: spec.prefix_len] == self.parts.prefix
        assert Counter(now) == Counter(map(tuple, self.parts.contexts))
        assert ids[start:] == self.parts.query


def ape(
    *contexts: list[int],
    prefix: list[int] = P,
    query: list[int] = Q,
    temperature: float = 0.9,
    scale: float = 0.9,
    extra_key: str | None = None,
) -> Request:
    numbers = (temperature, scale)
    namespace = repr((tuple(prefix), tuple(sorted(map(tuple, contexts))), numbers))
    spec = ApeSpec(len(prefix), tuple(map(len, contexts)), *numbers, namespace)
    ids = prefix + [token for context in contexts for token in context] + query
    req = Request(ids, spec.to_custom_params() | {"__req__": None}, extra_key)
    req.parts = Parts(prefix, list(contexts), query, temperature, scale)
    return req


def plain(ids: list[int], extra_key: str | None = None) -> Request:
    return Request(ids, None, extra_key)


class LeastRecentlyUsed:
    """SGLang's default, with ties broken by age: a random run must repeat itself."""

    def get_priority(self, node: TreeNode) -> tuple[float, int]:
        return node.last_access_time, node.id


class Host:
    """The scheduler's calls, in the scheduler's order."""

    def __init__(self, pool: int = POOL, requests: int = 16, row: int = 128) -> None:
        self.size = pool
        self.rows = ReqToTokenPool(requests, row, "cpu", False)
        self.slots = TokenToKVPoolAllocator(pool, torch.float32, "cpu", None, False)
        self.tree = ApeRadixCache(CacheInitParams(False, self.rows, self.slots, page_size=1))
        self.tree.eviction_strategy = LeastRecentlyUsed()
        self.content: dict[int, Identity] = {}
        self.active: list[Request] = []

    def match(self, req: Request, ids: array, limit: int | None = None) -> list[int]:
        """One look into the tree; checks every slot that it returns."""
        key = RadixKey(ids, req.extra_key, limit=limit)
        result = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        req.prefix_indices = result.device_indices
        req.last_node = result.last_device_node
        protected = result.cache_protected_len
        req.cache_protected_len = len(req.prefix_indices) if protected is None else protected
        req.assert_row_is_whole()
        found = req.prefix_indices.tolist()
        assert limit is None or len(found) <= limit
        self.assert_content(req, found)
        return found

    def peek(self, req: Request) -> list[int]:
        """What a scheduling policy does to a waiting request, which then goes on waiting."""
        return self.match(req, req.origin_input_ids + req.output_ids)

    def admit(self, req: Request) -> int:
        """Match, lock, take a row. Returns the cached tokens."""
        req.refresh_fill_ids()
        found = self.match(req, req.full_untruncated_fill_ids, req.max_prefix_len())
        self.tree.inc_lock_ref(req.last_node)
        assert self.rows.alloc([req]) is not None
        self.rows.write((req.req_pool_idx, slice(0, len(found))), req.prefix_indices)
        req.extend_range = Range(len(found), len(found))
        req.kv_committed_len = len(found)
        self.active.append(req)
        return len(found)

    def allocate(self, count: int) -> torch.Tensor | None:
        missing = count - self.slots.available_size()
        if missing > 0:
            self.tree.evict(EvictParams(num_tokens=missing))
        return self.slots.alloc(count)

    def compute(self, req: Request, count: int) -> bool:
        """Run ``count`` further rows; False when the pool has no room for them."""
        assert req.extend_range is not None
        start = req.extend_range.end
        stop = min(start + count, len(req.full_untruncated_fill_ids))
        slots = self.allocate(stop - start)
        if slots is None:
            return False
        self.rows.write((req.req_pool_idx, slice(start, stop)), slots)
        for row, slot in zip(range(start, stop), slots.tolist(), strict=True):
            self.content[slot] = req.identity(row)
        req.extend_range = Range(start, stop)
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
        assert req.extend_range is not None
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
            self.content[slots.item()] = req.identity(row)
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
        """As ``release_req`` and ``Req.reset_for_retract`` do."""
        self.release(req, insert=False, grouped=False)
        req.prefix_indices = torch.empty(0, dtype=torch.int64)
        req.last_node, req.extend_range = None, None
        req.cache_protected_len = req.kv_committed_len = 0

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
        for row, slot in enumerate(slots):
            wanted, held = req.identity(row), self.content.get(slot)
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
        assert {id(node) for node in self.tree.evictable_leaves} == leaves

    def assert_everything_can_be_evicted(self) -> None:
        assert not self.active
        assert self.tree.protected_size() == 0
        assert self.slots.available_size() + self.tree.evictable_size() == self.size
        self.tree.evict(EvictParams(num_tokens=self.size))
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
        yield node
        node = node.parent


@pytest.fixture
def host() -> Iterator[Host]:
    """A host that must be clean once every request of the test has ended."""
    host = Host()
    yield host
    host.check()
    for req in list(host.active):
        host.abort(req)
        host.check()
    host.assert_everything_can_be_evicted()


def tokens_of(node: TreeNode) -> list[int]:
    return list(node.key.token_ids)


# ---------------------------------------------------------------- shape


def test_contexts_are_siblings_below_the_node_of_the_prefix(host: Host) -> None:
    host.serve(ape(A, B, C), 70)
    below_root = {tuple(tokens_of(n)): n for n in host.tree.root_node.children.values()}
    prefix = below_root.pop(tuple(P))
    assert sorted(map(tokens_of, prefix.children.values())) == [A, B, C]
    assert [list(ids) for ids in below_root] == [Q], "the query has a place of its own"


def test_without_prefix_contexts_stand_below_the_root(host: Host) -> None:
    host.serve(ape(A, B, prefix=[]))
    assert sorted(tokens_of(n) for n in host.tree.root_node.children.values()) == [A, B, Q]
    assert host.serve(ape(B, A, prefix=[], query=[5])) == len(A) + len(B)


# ---------------------------------------------------------------- hits


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_subset_in_any_order_hits_fully(host: Host, count: int) -> None:
    host.serve(ape(A, B, C, D))
    for chosen in permutations([A, B, C, D], count):
        query = [80, *chosen[0]]
        assert host.serve(ape(*chosen, query=query)) >= len(P) + sum(map(len, chosen))


def test_a_repeated_request_computes_its_last_token_alone(host: Host) -> None:
    host.serve(ape(A, B))
    assert host.serve(ape(A, B)) == len(P + A + B + Q) - 1
    assert host.serve(ape(B, A)) == len(P + A + B + Q) - 1


def test_a_follow_up_turn_hits_question_and_answer(host: Host) -> None:
    host.serve(ape(A, B), 70, 71)
    follow_up = ape(B, A, query=[*Q, 70, 71, 72])
    assert host.serve(follow_up) == len(P + A + B + Q) + 2


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"scale": 0.5},
        {"contexts": (A, B, C)},
        {"contexts": (A,)},
        {"contexts": (A, B, B)},
    ],
)
def test_the_query_is_shared_with_nothing_but_the_same_contexts_and_numbers(
    host: Host, other: dict[str, Any]
) -> None:
    host.serve(ape(C))
    host.serve(ape(A, B))
    contexts = other.pop("contexts", (A, B))
    cached = host.serve(ape(*contexts, **other))
    assert cached == len(P) + sum(map(len, contexts))


def test_cached_contexts_are_moved_to_the_head(host: Host) -> None:
    host.serve(ape(B, D))
    req = ape(A, B, C, D)
    assert host.admit(req) == len(P + B + D)
    assert list(req.origin_input_ids) == P + B + D + A + C + Q
    assert req.spec_now().context_lens == (2, 1, 3, 4)
    while not host.prefilled(req):
        assert host.extend(req, 2)
    host.finish(req)


def test_the_longest_part_of_a_context_follows_the_cached_ones(host: Host) -> None:
    host.serve(ape(B))
    host.serve(ape([*C[:1], 99]))
    host.serve(ape([*A[:2], 99]))
    assert host.serve(ape(C, A, B)) == len(P + B) + 2


def test_a_row_in_use_is_never_reordered(host: Host) -> None:
    req = ape(A, B)
    host.admit(req)
    assert host.extend(req, len(P) + 1)
    host.serve(ape(B))
    assert host.extend(req, 100)
    assert list(req.origin_input_ids) == P + A + B + Q
    host.finish(req)


@pytest.mark.parametrize("start", [0, 2, len(P), len(P) + 1, len(P + A)])
def test_prompt_log_probabilities_of_contexts_keep_the_given_order(host: Host, start: int) -> None:
    host.serve(ape(B))
    req = ape(A, B)
    req.return_logprob, req.logprob_start_len = True, start
    host.peek(req)  # a policy's look at the waiting queue carries no limit
    assert list(req.origin_input_ids) == P + A + B + Q
    assert host.serve(req) <= start
    assert list(req.origin_input_ids) == P + A + B + Q


def test_log_probabilities_of_the_query_leave_every_context_cached(host: Host) -> None:
    host.serve(ape(A, B))
    req = ape(B, A)
    req.return_logprob, req.logprob_start_len = True, len(P + A + B)
    assert host.serve(req) == len(P + A + B)


# ---------------------------------------------------------------- plain requests


@pytest.mark.parametrize("context", [A, B, C])
def test_plain_requests_hit_what_ape_requests_wrote(host: Host, context: list[int]) -> None:
    host.serve(ape(A, B, C))
    assert host.serve(plain(P + context + [50, 51])) == len(P + context)


def test_ape_requests_hit_what_plain_requests_wrote(host: Host) -> None:
    for context in (A, B):
        host.serve(plain(P + context + [50, 51]))
    assert host.serve(ape(B, C, A)) == len(P + A + B)


def test_a_plain_request_never_reads_the_query_of_an_ape_request(host: Host) -> None:
    host.serve(ape(A))
    assert host.serve(plain(P + A + Q)) == len(P + A)
    assert host.serve(plain([*Q, 1])) == 0
    assert host.serve(plain([*Q, 1])) == len(Q)


def test_plain_requests_behave_as_in_the_stock_tree(host: Host) -> None:
    assert host.serve(plain([1, 2, 3, 4]), 5) == 0
    assert host.serve(plain([1, 2, 3, 4, 5, 6])) == 5
    assert host.serve(plain([1, 2, 9])) == 2


# ---------------------------------------------------------------- duplicates and concurrency


@pytest.mark.parametrize("chunk", [1, 2, 4, 1000])
def test_equal_contexts_of_one_request_leave_one_copy(host: Host, chunk: int) -> None:
    assert host.serve(ape(A, B, A, A), chunk=chunk) == 0
    assert host.tree.total_size() == len(P + A + B + Q)
    cached = host.serve(ape(A, A, B, A, query=[5]), chunk=chunk)
    assert cached == len(P + A + A + B + A)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_contexts_with_a_common_start_share_it(host: Host, chunk: int) -> None:
    long, short, other = [10, 11, 12, 13], [10, 11], [10, 11, 99]
    host.serve(ape(long, short, other, long), chunk=chunk)
    assert host.tree.total_size() == len(P) + 4 + 1 + len(Q)
    assert host.serve(ape(short, other, long), chunk=chunk) == len(P) + 2 + 3 + 4


@pytest.mark.parametrize(("first", "second"), [(1000, 1000), (1, 2), (4, 3), (2, 1000), (5, 1)])
def test_requests_computing_the_same_contexts_at_once_leave_one_copy(
    host: Host, first: int, second: int
) -> None:
    one, two = ape(A, B), ape(B, A)
    host.admit(one)
    host.admit(two)
    pending = [(one, first), (two, second)]
    while pending:
        for req, chunk in pending:
            assert host.compute(req, chunk)
        for req, _ in pending:
            host.commit(req)
            host.check()
        pending = [(req, chunk) for req, chunk in pending if not host.prefilled(req)]
    assert host.tree.total_size() == len(P + A + B + Q)
    host.finish(one)
    host.finish(two)


@pytest.mark.parametrize("grouped", [False, True])
def test_equal_answers_at_once_leave_one_copy(host: Host, grouped: bool) -> None:
    """As ``n > 1`` with greedy sampling gives them."""
    requests = [ape(A, B), ape(A, B), ape(B, A)]
    for req in requests:
        host.prefill(req)
    for req in requests:
        assert host.decode(req, 70, 71)
    for req in requests:
        host.finish(req, grouped=grouped)
        host.check()
    assert host.tree.total_size() == len(P + A + B + Q) + 2


def test_a_batch_that_ends_in_one_step_is_freed_as_one_group(host: Host) -> None:
    requests = [ape(A, B), ape(A, B), plain(P + A + Q), plain(P + A + Q)]
    for req in requests:
        host.prefill(req)
        assert host.decode(req, 70, 71)
    host.slots.free_group_begin()
    for req in requests:
        host.finish(req, grouped=False)
    host.slots.free_group_end()
    host.check()


# ---------------------------------------------------------------- chunks and endings


@pytest.mark.parametrize("chunk", range(1, 12))
def test_chunks_may_end_anywhere(host: Host, chunk: int) -> None:
    assert host.serve(ape(A, B, C), 70, chunk=chunk) == 0
    assert host.tree.total_size() == len(P + A + B + C + Q) + 1
    assert host.serve(ape(C, A, B), 70, chunk=chunk) == len(P + A + B + C + Q) - 1


@pytest.mark.parametrize("how", ["finish", "abort", "retract"])
@pytest.mark.parametrize("done", range(0, 15))
def test_a_request_may_end_after_any_number_of_rows(host: Host, done: int, how: str) -> None:
    host.serve(ape(B))
    req = ape(A, B, C)
    host.admit(req)
    if done:
        assert host.extend(req, done)
    host.check()
    getattr(host, how)(req)
    host.check()
    assert host.tree.protected_size() == 0


@pytest.mark.parametrize("how", ["finish", "abort", "retract"])
def test_a_request_may_end_with_rows_that_the_tree_has_not_seen(host: Host, how: str) -> None:
    req = ape(A, B)
    host.admit(req)
    assert host.compute(req, len(P + A) + 1)
    getattr(host, how)(req)
    host.check()


def test_an_aborted_answer_is_not_kept_but_the_prompt_is(host: Host) -> None:
    req = ape(A, B)
    host.prefill(req)
    assert host.decode(req, 70, 71, 72)
    host.abort(req)
    assert host.tree.total_size() == len(P + A + B + Q)


def test_a_retracted_request_goes_on_where_it_was(host: Host) -> None:
    req = ape(A, B)
    host.prefill(req, chunk=4)
    assert host.decode(req, 70, 71)
    host.retract(req)
    host.check()
    host.serve(ape(C, B))
    assert host.prefill(req) == len(P + A + B + Q)
    assert host.decode(req, 72)
    host.finish(req)
    assert host.serve(ape(A, B, query=[*Q, 70, 71, 72, 73])) == len(P + A + B + Q) + 3


def test_a_retracted_request_may_be_reordered_once_more(host: Host) -> None:
    req = ape(A, B, C)
    host.prefill(req)
    assert host.decode(req, 70)
    host.retract(req)
    host.tree.evict(EvictParams(num_tokens=POOL))
    host.serve(ape(C))
    assert host.prefill(req, chunk=3) == len(P + C)
    assert list(req.origin_input_ids) == P + C + A + B + Q
    assert list(req.full_untruncated_fill_ids) == [*P, *C, *A, *B, *Q, 70]
    host.finish(req)


def test_an_aborted_stub_ends_as_a_plain_request(host: Host) -> None:
    """``Req.set_finish_with_abort`` leaves one token of a request that was looked at already."""
    host.serve(ape(A, B))
    req = ape(A, B)
    host.peek(req)
    req.origin_input_ids, req.parts = array("q", [0]), None
    host.prefill(req)
    host.finish(req, grouped=False)


# ---------------------------------------------------------------- eviction


def test_locked_paths_outlive_any_eviction(host: Host) -> None:
    host.serve(ape(D))
    req = ape(A, B)
    host.admit(req)
    for _ in range(6):
        host.tree.evict(EvictParams(num_tokens=POOL))
        host.check()
        assert host.tree.evictable_size() == 0
        assert host.extend(req, 2)
    host.finish(req)


def test_a_lock_on_one_request_does_not_hide_the_locks_of_another(host: Host) -> None:
    one, two = ape(A, B), ape(B, C)
    host.prefill(one)
    host.prefill(two)
    host.finish(one)
    host.tree.evict(EvictParams(num_tokens=POOL))
    host.check()
    assert host.tree.total_size() == len(P + B + C + Q)
    host.finish(two)


def test_evicting_one_context_leaves_the_others(host: Host) -> None:
    host.serve(ape(A))
    host.serve(ape(B, C, query=[5]))
    host.tree.evict(EvictParams(num_tokens=len(Q + A)))  # the first query, then its context
    host.check()
    assert host.serve(ape(A, B, C, query=[6])) == len(P + B + C)


def test_the_least_recently_used_context_goes_first(host: Host) -> None:
    host.serve(ape(A, B, C))
    host.serve(ape(C, A, query=[5]))
    host.tree.evict(EvictParams(num_tokens=len(Q + B)))  # the first query, then B
    host.check()
    assert sorted(map(tokens_of, host.nodes())) == sorted([P, A, C, [5]])


def test_contexts_evicted_under_a_cached_query_are_computed_again(host: Host) -> None:
    host.serve(ape(A, B))
    victims = [n for n in host.nodes() if tokens_of(n) == A]
    assert len(victims) == 1
    host.slots.free(victims[0].value)
    host.tree._delete_leaf(victims[0])
    host.check()
    assert host.serve(ape(A, B)) == len(P + B)
    assert host.serve(ape(A, B)) == len(P + A + B + Q) - 1


def test_a_pool_without_room_evicts_as_it_goes() -> None:
    host = Host(pool=24)
    for contexts in ([A, B], [C, D], [B, C], [A, D], [A, B, C]):
        host.serve(ape(*contexts), 70, chunk=3)
    host.assert_everything_can_be_evicted()


def test_flushing_forgets_everything(host: Host) -> None:
    host.serve(ape(A, B))
    host.tree.reset()
    host.slots.clear()
    assert host.serve(ape(A, B)) == 0


# ---------------------------------------------------------------- tenants


def test_tenants_share_nothing(host: Host) -> None:
    host.serve(ape(A, B, extra_key="one"))
    assert host.serve(ape(A, B, extra_key="two")) == 0
    assert host.serve(ape(A, B)) == 0
    for key in ("one", "two", None):
        assert host.serve(ape(B, A, extra_key=key)) == len(P + A + B + Q) - 1
    assert host.serve(plain(P + A + [5], extra_key="one")) == len(P + A)
    assert host.serve(plain(P + A + [5], extra_key="three")) == 0


def test_no_extra_key_names_the_place_of_a_query(host: Host) -> None:
    req = ape(A, B)
    host.serve(req)
    namespace = req.spec_now().namespace
    for key in (namespace, "ape", f"ape{namespace}", repr(("ape", None, namespace)), ""):
        assert host.serve(plain([*Q, 5], extra_key=key)) == 0
        assert host.serve(ape(A, B, prefix=[], query=Q, extra_key=key)) == 0


# ---------------------------------------------------------------- everything at random


PREFIXES: list[list[int]] = [[], [1], [1, 2]]
CONTEXTS = [[1], [1, 2], [1, 2, 3], [2], [3, 3, 3, 3, 3], [1, 2, 4, 4]]
QUERIES = [[1], [1, 2], [1, 2, 3, 1]]
KEYS = [None, None, None, "tenant"]
CHUNKS = [0, 1, 2, 3, 5, 8, 100, 100, 100]
picks = st.randoms(use_true_random=False)


class TreeMachine(RuleBasedStateMachine):
    """Requests of every kind against the dictionary of slots, in a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(pool=48, requests=5, row=96)
        self.waiting: list[Request] = []
        self.past: list[tuple[Parts, str | None]] = []

    def submit(self, req: Request, chunk: int) -> None:
        """Start a request with its first chunk; it waits at chunk 0 or where no row is free."""
        if chunk == 0 or not self.host.rows.available_size():
            self.waiting.append(req)
            return
        self.host.admit(req)
        self.host.extend(req, chunk)

    def running(self) -> list[Request]:
        return [req for req in self.host.active if self.host.prefilled(req)]

    def unfinished(self) -> list[Request]:
        return [req for req in self.host.active if not self.host.prefilled(req)]

    @rule(
        prefix=st.sampled_from(PREFIXES),
        contexts=st.lists(st.sampled_from(CONTEXTS), min_size=1, max_size=4),
        query=st.sampled_from(QUERIES),
        scale=st.sampled_from([0.9, 0.9, 0.5]),
        extra_key=st.sampled_from(KEYS),
        chunk=st.sampled_from(CHUNKS),
    )
    def arrive(
        self,
        prefix: list[int],
        contexts: list[list[int]],
        query: list[int],
        scale: float,
        extra_key: str | None,
        chunk: int,
    ) -> None:
        req = ape(*contexts, prefix=prefix, query=query, scale=scale, extra_key=extra_key)
        self.past.append((req.parts, extra_key))
        self.submit(req, chunk)

    @precondition(lambda self: self.past)
    @rule(
        pick=picks,
        copies=st.integers(1, 3),
        chunk=st.sampled_from(CHUNKS),
        logprob_start=st.one_of(st.just(-1), st.integers(0, 14)),
    )
    def arrive_again(
        self, pick: random.Random, copies: int, chunk: int, logprob_start: int
    ) -> None:
        """An earlier request with its contexts in another order, also several times at once."""
        parts, extra_key = pick.choice(self.past)
        for _ in range(copies):
            contexts = pick.sample(parts.contexts, len(parts.contexts))
            req = ape(
                *contexts,
                prefix=parts.prefix,
                query=parts.query,
                temperature=parts.temperature,
                scale=parts.scale,
                extra_key=extra_key,
            )
            req.return_logprob, req.logprob_start_len = logprob_start >= 0, logprob_start
            self.submit(req, chunk)

    @rule(
        prefix=st.sampled_from(PREFIXES),
        context=st.sampled_from(CONTEXTS),
        query=st.sampled_from(QUERIES),
        extra_key=st.sampled_from(KEYS),
        chunk=st.sampled_from(CHUNKS),
    )
    def arrive_plain(
        self,
        prefix: list[int],
        context: list[int],
        query: list[int],
        extra_key: str | None,
        chunk: int,
    ) -> None:
        self.submit(plain(prefix + context + query, extra_key), chunk)

    @precondition(lambda self: self.waiting)
    @rule(pick=picks, chunk=st.sampled_from(CHUNKS))
    def look_at_the_queue(self, pick: random.Random, chunk: int) -> None:
        """A policy looks at all that wait; one of them may start."""
        for req in self.waiting:
            self.host.peek(req)
        chosen = pick.choice(self.waiting)
        self.waiting.remove(chosen)
        self.submit(chosen, chunk)

    @precondition(lambda self: self.unfinished())
    @rule(chunk=st.sampled_from(CHUNKS[1:]), batch=st.integers(1, 4))
    def extend(self, chunk: int, batch: int) -> None:
        """One batch: all are computed before the first is committed."""
        chosen = self.unfinished()[:batch]
        computed = [req for req in chosen if self.host.compute(req, chunk)]
        for req in computed:
            self.host.commit(req)

    @precondition(lambda self: self.running())
    @rule(token=st.sampled_from([1, 1, 2]))
    def decode(self, token: int) -> None:
        for req in self.running():
            self.host.decode(req, token)

    @precondition(lambda self: self.running())
    @rule(answer=st.integers(0, 2), grouped=st.sampled_from([True, True, False]))
    def finish(self, answer: int, grouped: bool) -> None:
        """A few greedy steps of the whole batch, then it ends."""
        done = [req for req in self.running() if self.host.decode(req, *[1] * answer)]
        if grouped:
            self.host.slots.free_group_begin()
        for req in done:
            self.host.finish(req, grouped=False)
        if grouped:
            self.host.slots.free_group_end()

    @precondition(lambda self: self.host.active)
    @rule(pick=picks, retract=st.booleans())
    def interrupt(self, pick: random.Random, retract: bool) -> None:
        req = pick.choice(self.host.active)
        if retract:
            self.host.retract(req)
            self.waiting.append(req)
        else:
            self.host.abort(req)

    @rule(tokens=st.integers(1, 12))
    def evict(self, tokens: int) -> None:
        self.host.tree.evict(EvictParams(num_tokens=tokens))

    @precondition(lambda self: not self.host.active)
    @rule()
    def flush(self) -> None:
        self.host.tree.reset()
        self.host.slots.clear()

    @rule(
        name=st.sampled_from(["one", "two"]),
        prefix=st.sampled_from(PREFIXES),
        context=st.sampled_from(CONTEXTS),
        extra_key=st.sampled_from(KEYS),
    )
    def pin(self, name: str, prefix: list[int], context: list[int], extra_key: str | None) -> None:
        self.host.tree.pins.add(name, array("q", prefix + context), extra_key)

    @rule(name=st.sampled_from(["one", "two"]))
    def unpin(self, name: str) -> None:
        self.host.tree.pins.remove(name)

    @invariant()
    def everything_adds_up(self) -> None:
        self.host.check()

    def teardown(self) -> None:
        for name in ("one", "two"):
            self.host.tree.pins.remove(name)
        for req in list(self.host.active):
            self.host.abort(req)
        self.host.check()
        self.host.assert_everything_can_be_evicted()


TreeMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, database=None
)
test_random_traffic_keeps_the_tree_whole = TreeMachine.TestCase
