"""SGLang's radix cache, with requests whose row is made of several tree paths.

The KV of a context depends on P and on itself alone, exactly as if ``P + C_i`` were an ordinary
prompt. So ``[P, C_i]`` is stored as an ordinary path, contexts become sibling subtrees under the
node where P ends, and plain requests share them in both directions. The KV of the query and of
the answer depends on the set of contexts and on how they are read: it lives in a namespace of its
own. The copies of Q of a scoring request are never stored.

Source: ``mem_cache/radix_cache.py`` of SGLang 0.5.17, whose node helpers are used directly.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sglang_ape import metrics
from sglang_ape.cache.order import cached_first
from sglang_ape.cache.pins import Pins
from sglang_ape.request import reorder_contexts, spec_of
from sglang_ape.spec import ApeSpec


class Handle(NamedTuple):
    """The tree paths that one APE row runs through, deepest node of each.

    It stands where SGLang keeps a single node (``req.last_node``) and is only valid for the tree
    that made it. Locking it locks every path.
    """

    prefix: TreeNode  # where P ends, or as far as P is in the tree
    contexts: tuple[TreeNode, ...]  # one for each context the row holds so far, in row order
    query: TreeNode | None

    @property
    def ends(self) -> tuple[TreeNode, ...]:
        query = () if self.query is None else (self.query,)
        return (self.prefix, *self.contexts, *query)


class _Hit(NamedTuple):
    """How much of one context is in the tree."""

    length: int
    values: list[torch.Tensor]  # KV slots, ``length`` in all
    node: TreeNode


class _Found(NamedTuple):
    """The contexts that a row can start with."""

    values: list[torch.Tensor]  # KV slots in row order
    nodes: tuple[TreeNode, ...]  # the deepest one of each
    whole: bool  # all contexts of the row, to their ends


class Touched(NamedTuple):
    """How much of a path P + C is in the tree."""

    length: int  # tokens
    node: TreeNode | None  # where the path ends; None if it is not in the tree whole


class ApeRadixCache(RadixCache):
    """A radix cache that also matches, locks and stores composite rows.

    Args:
        params: as of stock trees.
        evictions: counts the contexts that lost their KV to others
            (``prometheus_client.Counter``).

    Attributes:
        pins: contexts that are not evicted.
    """

    def __init__(self, params: CacheInitParams, evictions: Any = None) -> None:
        self.pins = Pins(self)
        self._evictions = evictions
        self._context_ends: set[TreeNode] = set()
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self._context_ends.clear()
        self.pins.forget_nodes()

    def look_up(self, ids: array, extra_key: str | None) -> int:
        """How many leading tokens of a path are in the tree; changes nothing, not even its age."""
        node, length = self.root_node, 0
        while length < len(ids):
            child = node.children.get(_child_key(extra_key, ids[length]))
            if child is None:
                break
            rest = RadixKey(ids[length:], extra_key)
            matched = child.key.match(rest)
            length += matched
            if matched < len(child.key.token_ids):
                break
            node = child
        return length

    def touch(self, ids: array, extra_key: str | None) -> Touched:
        """Match a path P + C; it counts as used now, and its end as the end of a context."""
        values, node = self._match_path(self.root_node, RadixKey(ids, extra_key))
        length = sum(map(len, values))
        if length < len(ids):
            return Touched(length, None)
        self._context_ends.add(node)
        return Touched(length, node)

    def nodes_above(self, ends: Iterable[TreeNode]) -> set[TreeNode]:
        """The nodes of the paths that end there."""
        found: set[TreeNode] = set()
        for node in ends:
            while node is not self.root_node and node not in found:
                found.add(node)
                node = node.parent
        return found

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        spec = None if params.req is None else spec_of(params.req)
        if spec is None:
            return super().match_prefix(params)
        key = params.key
        return self._match_row(params.req, spec, key.token_ids, key.extra_key, len(key))

    def inc_lock_ref(self, node: Any) -> IncLockRefResult:
        if not isinstance(node, Handle):
            return super().inc_lock_ref(node)
        delta = super().inc_lock_ref(node.prefix).delta
        stop = node.prefix
        for part in node.contexts:
            while part is not stop:
                if part.lock_ref == 0:
                    size = len(part.key.token_ids)
                    self.evictable_size_ -= size
                    self.protected_size_ += size
                    self.evictable_leaves.discard(part)
                    delta -= size
                part.lock_ref += 1
                part = part.parent
        if node.query is not None:
            delta += super().inc_lock_ref(node.query).delta
        return IncLockRefResult(delta=delta)

    def dec_lock_ref(self, node: Any, params: DecLockRefParams | None = None) -> DecLockRefResult:
        if not isinstance(node, Handle):
            return super().dec_lock_ref(node, params)
        delta = 0
        stop = node.prefix
        for part in node.contexts:
            while part is not stop:
                part.lock_ref -= 1
                if part.lock_ref == 0:
                    size = len(part.key.token_ids)
                    self.evictable_size_ += size
                    self.protected_size_ -= size
                    if not part.children:
                        self.evictable_leaves.add(part)
                    delta += size
                part = part.parent
        delta += super().dec_lock_ref(node.prefix).delta
        if node.query is not None:
            delta += super().dec_lock_ref(node.query).delta
        return DecLockRefResult(delta=delta)

    def resolve_node_handle(self, node_handle: Any) -> Any:
        """The node that stands for the row in the dfs-weight policy: where its prefix ends."""
        return node_handle.prefix if isinstance(node_handle, Handle) else node_handle

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        spec = spec_of(req)
        if spec is None or self.disable:
            super().cache_unfinished_req(req, chunked=chunked)
            return
        end = req.extend_range.end
        stored = spec.cacheable(end)
        handle = self._store_row(req, spec, req.full_untruncated_fill_ids, stored, chunked)
        self.inc_lock_ref(handle)
        self.dec_lock_ref(req.last_node)
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :end]
        req.prefix_indices = row.to(torch.int64, copy=True)
        req.cache_protected_len = stored
        req.last_node = handle

    def cache_finished_req(
        self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        spec = spec_of(req)
        if spec is None or self.disable:
            super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
            if self.pins.any_waiting:
                ids = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle]
                self.pins.stored(ids, req.extra_key)
                self.pins.lock_put_off()
            return
        if is_insert and not self.disable_finished_insert:
            ids = req.origin_input_ids + req.output_ids
            end = min(kv_len_to_handle, len(ids))
            stored = spec.cacheable(end)
            handle = self._store_row(req, spec, ids, stored, chunked=False)
            _mark_used(handle, req.priority or 0)
            self._free_rows(req, stored, end)
        else:
            self._free_rows(req, req.cache_protected_len, kv_len_to_handle)
        if req.last_node is not None:
            self.dec_lock_ref(req.last_node)

    def _free_rows(self, req: Any, start: int, stop: int) -> None:
        if start < stop:
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx, start:stop]
            self.token_to_kv_pool_allocator.free_segment(row.to(torch.int64), start_pos=start)

    def _delete_leaf(self, node: TreeNode) -> None:
        if node in self._context_ends:
            self._context_ends.discard(node)
            if self._evictions is not None:
                self._evictions.inc()
        super()._delete_leaf(node)

    def _match_row(
        self, req: Any, spec: ApeSpec, ids: array, extra_key: str | None, limit: int
    ) -> MatchResult:
        """Match P, then the contexts, then the query; ``limit`` caps the matched tokens."""
        prefix = RadixKey(ids[: spec.prefix_len], extra_key)
        values, prefix_node = self._match_path(self.root_node, prefix)
        handle = Handle(prefix_node, (), None)
        if sum(map(len, values)) < spec.prefix_len:
            return self._result(values, handle, limit)

        found = self._match_all(prefix_node, spec, ids, extra_key)
        if found is None:
            found = self._match_some(req, spec, prefix_node, ids, extra_key)
        values = values + found.values
        handle = handle._replace(contexts=found.nodes)
        if found.whole and spec.cacheable(limit) > spec.context_end:
            query = RadixKey(ids[spec.context_end : limit], _query_namespace(extra_key, spec))
            query_values, node = self._match_path(self.root_node, query)
            if query_values:
                values += query_values
                handle = handle._replace(query=node)
        return self._result(values, handle, limit)

    def _match_all(
        self, prefix_node: TreeNode, spec: ApeSpec, ids: array, extra_key: str | None
    ) -> _Found | None:
        """The contexts if every one is in the tree whole, the usual case, else None.

        Nodes are picked by first token and length, and the tokens of all compared at once.
        """
        path, ends = [], []
        row = slice(spec.prefix_len, spec.context_end)
        for start, stop in zip(spec.context_starts, spec.context_stops, strict=True):
            node = prefix_node
            while start < stop:
                node = node.children.get(_child_key(extra_key, ids[start]))
                if node is None:
                    return None
                path.append(node)
                start += len(node.key.token_ids)
            if start > stop:
                return None
            ends.append(node)
        cached = np.frombuffer(b"".join([node.key.token_ids for node in path]), np.int64)
        if not np.array_equal(cached, np.frombuffer(ids, np.int64)[row]):
            return None
        now = time.monotonic()
        for node in path:
            node.last_access_time = now
        return _Found([node.value for node in path], tuple(ends), True)

    def _match_some(
        self,
        req: Any,
        spec: ApeSpec,
        prefix_node: TreeNode,
        ids: array,
        extra_key: str | None,
    ) -> _Found:
        """The longest run of cached contexts at the head of the row, reordered if it may be."""
        hits = self._match_contexts(prefix_node, spec, ids, extra_key)
        order = cached_first([hit.length for hit in hits], spec.context_lens)
        if _may_reorder(req, spec) and order != list(range(len(order))):
            spec = reorder_contexts(req, spec, order)
            hits = [hits[i] for i in order]

        used = []
        for hit, length in zip(hits, spec.context_lens, strict=True):
            if hit.length == 0:
                break
            used.append(hit)
            if hit.length < length:
                break
        whole = len(used) == len(hits) and used[-1].length == spec.context_lens[-1]
        values = [slots for hit in used for slots in hit.values]
        return _Found(values, tuple(hit.node for hit in used), whole)

    def _match_contexts(
        self, prefix_node: TreeNode, spec: ApeSpec, ids: array, extra_key: str | None
    ) -> list[_Hit]:
        now = time.monotonic()
        hits = []
        for start, length in zip(spec.context_starts, spec.context_lens, strict=True):
            context = ids[start : start + length]
            child = prefix_node.children.get(_child_key(extra_key, context[0]))
            if child is not None and child.key.token_ids == context:  # the usual hit, one compare
                child.last_access_time = now
                hits.append(_Hit(length, [child.value], child))
                continue
            values, node = self._match_path(prefix_node, RadixKey(context, extra_key))
            hits.append(_Hit(sum(map(len, values)), values, node))
        return hits

    def _match_path(self, parent: TreeNode, key: RadixKey) -> tuple[list[torch.Tensor], TreeNode]:
        """KV slots of the longest path below ``parent`` that ``key`` starts with, and its end."""
        return self._match_prefix_helper(parent, key) if len(key) else ([], parent)

    def _result(self, values: list[torch.Tensor], handle: Handle, limit: int) -> MatchResult:
        empty = self._empty_match_result.device_indices
        indices = torch.cat(values)[:limit] if values else empty
        return MatchResult(
            device_indices=indices,
            last_device_node=handle,
            last_host_node=handle,
            best_match_node=handle,
        )

    def _store_row(self, req: Any, spec: ApeSpec, ids: array, end: int, chunked: bool) -> Handle:
        """Hand rows [cache_protected_len, end) to the tree, which owns them from then on.

        Slots of tokens that the tree holds already are freed and replaced in the row by the
        tree's. Rows before ``cache_protected_len`` are the tree's, locked through
        ``req.last_node``. The handle returned is not locked.
        """
        done = req.cache_protected_len
        old = req.last_node
        if not isinstance(old, Handle):  # nothing was matched
            old = Handle(self.root_node, (), None)
        extra_key = req.extra_key

        def store(parent: TreeNode, start: int, stop: int, namespace: Any) -> TreeNode:
            key = RadixKey(ids[start:stop], namespace)
            return self._store_path(req, parent, key, start, done, chunked)

        prefix_node = old.prefix
        if done < spec.prefix_len:
            prefix_node = store(self.root_node, 0, min(spec.prefix_len, end), extra_key)
        stored = bisect_right(spec.context_stops, done)
        contexts = list(old.contexts[:stored])
        for start, length in zip(
            spec.context_starts[stored:], spec.context_lens[stored:], strict=True
        ):
            if start >= end:
                break
            node = store(prefix_node, start, min(start + length, end), extra_key)
            contexts.append(node)
            if start + length <= end:
                self._context_ends.add(node)
        if self.pins.any_waiting:
            self._lock_waiting(spec, ids, end, extra_key)
        query_node = old.query
        if end > spec.context_end:
            namespace = _query_namespace(extra_key, spec)
            query_node = store(self.root_node, spec.context_end, end, namespace)
        return Handle(prefix_node, tuple(contexts), query_node)

    def _lock_waiting(self, spec: ApeSpec, ids: array, end: int, extra_key: str | None) -> None:
        for start, stop in zip(spec.context_starts, spec.context_stops, strict=True):
            if stop <= end:
                self.pins.stored(ids[: spec.prefix_len] + ids[start:stop], extra_key)
        self.pins.lock_put_off()

    def _store_path(
        self, req: Any, parent: TreeNode, key: RadixKey, start: int, done: int, chunked: bool
    ) -> TreeNode:
        """Insert the row's slots from ``start`` on below ``parent``; free what was there already.

        Only slots from row ``done`` on belong to the request: the tree may have got the same
        tokens from another request, or from an equal context of this one, since they were matched.
        """
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        slots = row[start : start + len(key)].to(torch.int64, copy=True)
        priority = req.priority or 0
        known, node = self._insert_helper(parent, key, slots, priority, chunked)
        own = max(done, start)
        if start + known > own:
            # The row is overwritten below while the allocator may put the freeing off
            # (free_group_begin), so it gets a copy of the slots and never a view of the row.
            duplicates = slots[own - start : known]
            self.token_to_kv_pool_allocator.free_segment(duplicates, start_pos=own)
            values, _ = self._match_path(parent, key[:known])
            canonical = torch.cat(values)[own - start :]
            self.req_to_token_pool.write(
                (req.req_pool_idx, slice(own, start + known)), canonical.to(torch.int32)
            )
        return node


def _child_key(extra_key: str | None, token: int) -> Any:
    """``RadixKey.child_key`` at page size 1, without making a key."""
    return token if extra_key is None else (extra_key, token)


def _may_reorder(req: Any, spec: ApeSpec) -> bool:
    """Whether contexts may change places: no slots are laid out by their order yet, and no prompt
    log-probabilities of context tokens, which come back in row order, were asked for.
    """
    wants_logprobs = req.return_logprob and 0 <= req.logprob_start_len < spec.context_end
    return req.req_pool_idx is None and not wants_logprobs


def _query_namespace(extra_key: str | None, spec: ApeSpec) -> tuple[str, str | None, str]:
    """A tree namespace that no request's own ``extra_key``, a string, can name."""
    return ("ape", extra_key, spec.namespace)


def _mark_used(handle: Handle, priority: int) -> None:
    """What stock insertion does for reused nodes: they count as used when the request ends."""
    now = time.monotonic()
    for node in (handle.prefix, *handle.contexts):
        node.last_access_time = now
        node.hit_count += 1
        if node.priority < priority:
            node.priority = priority


def build_tree_cache(ctx: Any) -> Any:
    """Factory of ``--radix-cache-backend ape`` (``mem_cache/registry.py``).

    Raises:
        ValueError: the model's KV cache is not one plain page table.
    """
    from sglang.srt.mem_cache.registry import default_radix_cache_factory

    if ctx.is_hybrid_swa or ctx.is_hybrid_ssm:
        raise ValueError(
            "--enable-ape cannot serve models with sliding-window or state-space layers"
        )
    if ctx.disable_radix_cache:
        return default_radix_cache_factory(ctx)
    counted = ctx.params.enable_metrics and ctx.tp_rank == 0  # the ranks' trees are equal
    return ApeRadixCache(ctx.params, metrics.context_evictions(ctx) if counted else None)
