"""What the radix tree must hold, as plain dictionaries, and a host that compares the two."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Metric
from sglang.srt.mem_cache.radix_cache import TreeNode

from tests.support.tree import (
    Host,
    Identity,
    Request,
    beginnings,
    path_namespace,
    query_namespace,
    split_row,
)


class Model:
    """The cache as dictionaries: no nodes, no ages, every token by itself.

    A path P + C is named by the identity of its last token.
    """

    def __init__(self) -> None:
        self.cached: dict[Identity, int] = {}  # KV slots
        self.ends: set[Identity] = set()  # where a context is known to end
        self.pins: dict[str, Identity] = {}
        self.locked: set[str] = set()  # pins that have found their path; the others wait

    def run_length(self, row: Sequence[Identity]) -> int:
        """How many identities at the head of a row are cached."""
        missing = (i for i, identity in enumerate(row) if identity not in self.cached)
        return next(missing, len(row))

    def reusable(self, req: Request, limit: int) -> int:
        """How many leading rows a request may take from the cache, in its best order."""
        row = req.identities(len(req.origin_input_ids) + len(req.output_ids))
        spec = req.spec_now()
        if spec is None:
            return min(limit, self.run_length(row))
        prefix, contexts, rest = split_row(row, spec)
        found = self.run_length(prefix)
        if found == len(prefix):
            found += self._reusable_contexts(contexts, rest, may_reorder(req))
        return min(limit, found)

    def _reusable_contexts(
        self, contexts: Sequence[Sequence[Identity]], rest: Sequence[Identity], reorder: bool
    ) -> int:
        hits = [(self.run_length(context), len(context)) for context in contexts]
        whole = [hit == length for hit, length in hits]
        if all(whole):
            return sum(map(len, contexts)) + self.run_length(rest)
        if reorder:
            parts = [hit for hit, length in hits if hit < length]
            return sum(length for hit, length in hits if hit == length) + max(parts)
        first = whole.index(False)
        return sum(length for _, length in hits[:first]) + hits[first][0]

    def store(self, row: Sequence[Identity], slots: Sequence[int]) -> None:
        """Of equal tokens, the copy that came first stays."""
        for identity, slot in zip(row, slots, strict=True):
            self.cached.setdefault(identity, slot)

    def find_waiting(self, path: Identity) -> int:
        """A request has stored this path: lock the pins that wait for a beginning of it.

        Returns how many did.
        """
        before = len(self.locked)
        for name, pinned in self.pins.items():
            own = path.namespace == pinned.namespace
            begins = path.tokens[: len(pinned.tokens)] == pinned.tokens
            if own and begins and pinned in self.cached and name not in self.locked:
                self._lock(name)
        return len(self.locked) - before

    def touch(self, path: Identity) -> None:
        if path in self.cached:
            self.ends.add(path)

    def pin(self, name: str, path: Identity) -> None:
        if self.pins.get(name) == path:
            return
        self.unpin(name)
        self.pins[name] = path
        if path in self.cached:
            self._lock(name)

    def unpin(self, name: str) -> None:
        self.pins.pop(name, None)
        self.locked.discard(name)

    def _lock(self, name: str) -> None:
        self.locked.add(name)
        self.ends.add(self.pins[name])

    def pinned(self) -> set[Identity]:
        """Every token that a pin keeps."""
        return {one for name in self.locked for one in path_row(self.pins[name])}

    def evict(self, lost: set[Identity]) -> None:
        for identity in lost:
            del self.cached[identity]
        self.ends -= lost

    def flush(self) -> None:
        self.cached.clear()
        self.ends.clear()
        self.locked.clear()


class ModelHost(Host):
    """A host that makes each call on the model too and compares.

    Args:
        pool: KV slots.
        events: counts what happens.
    """

    def __init__(self, pool: int, events: Counter[str]) -> None:
        self.metrics = CollectorRegistry()
        evictions = Metric("evicted_contexts", "-", registry=self.metrics)
        super().__init__(pool, requests=5, row=256, evictions=evictions)
        self.model = Model()
        self.events = events

    # ------------------------------------------------------------ requests

    def peek(self, req: Request) -> list[int]:
        expected, ids = self.model.reusable(req, _length(req)), req.origin_input_ids
        found = self._compare(req, super().peek(req), expected)
        self.events["rows reordered"] += ids != req.origin_input_ids
        return found

    def admit(self, req: Request) -> int:
        expected = self.model.reusable(req, req._compute_max_prefix_len(_length(req)))
        ids = req.origin_input_ids
        found = super().admit(req)
        self._compare(req, self.row(req), expected)
        self.events["rows reordered"] += ids != req.origin_input_ids
        self.events["requests begun"] += 1
        self.events["prompt tokens found"] += found
        return found

    def look_and_leave(self, req: Request) -> None:
        """What the scheduler does to a request that it finds no room for after all."""
        expected = self.model.reusable(req, req._compute_max_prefix_len(_length(req)))
        req.init_next_round_input(self.tree)
        self._compare(req, self.matched(req), expected)
        self.tree.inc_lock_ref(req.last_node)
        self.tree.dec_lock_ref(req.last_node)

    def _compare(self, req: Request, found: list[int], expected: int) -> list[int]:
        """A match is as long as it can be and returns the slots of the row's own tokens."""
        assert len(found) == expected, f"{len(found)} tokens found, {expected} can be reused"
        cached = [self.model.cached[one] for one in req.identities(expected)]
        assert found == cached, "slots of other tokens were found"
        return found

    def commit(self, req: Request) -> None:
        self._store(req, req.extend_range.end)
        super().commit(req)
        row = self.row(req)[: _cacheable(req, req.extend_range.end)]
        cached = [self.model.cached[one] for one in req.identities(len(row))]
        assert row == cached, "a row with slots that are not the tree's"

    def release(self, req: Request, insert: bool, grouped: bool = True) -> None:
        end = req.kv_committed_len
        row = req.identities(end)
        if insert:
            self._store(req, end)
        super().release(req, insert, grouped)
        if req.spec_now() is None and row:
            self.events["waiting pins locked"] += self.model.find_waiting(row[-1])

    def finish(self, req: Request, grouped: bool = True) -> None:
        super().finish(req, grouped)
        self.events["requests finished"] += 1

    def abort(self, req: Request) -> None:
        super().abort(req)
        self.events["requests aborted"] += 1

    def retract(self, req: Request) -> None:
        super().retract(req)
        self.events["requests retracted"] += 1

    def _store(self, req: Request, end: int) -> None:
        end = _cacheable(req, end)
        row = req.identities(end)
        self.model.store(row, self.row(req)[:end])
        spec = req.spec_now()
        for stop in () if spec is None else spec.context_stops:
            if stop > end:
                break
            if stop > req.cache_protected_len:
                self.model.ends.add(row[stop - 1])
            self.events["waiting pins locked"] += self.model.find_waiting(row[stop - 1])

    # ------------------------------------------------------------ the cache

    def evict(self, tokens: int) -> int:
        held = self.model.pinned()
        for req in self.active:
            held.update(req.identities(req.cache_protected_len))
        locked = {node for node in self.nodes() if node.lock_ref > 0}
        contexts = self.evicted_contexts()
        count = super().evict(tokens)
        lost = self.model.cached.keys() - self.cached_now().keys()
        assert not lost & held, f"evicted under a lock: {lost & held}"
        assert locked <= set(self.nodes()), "a locked node was evicted"
        assert count == len(lost), f"{count} tokens reported, {len(lost)} gone"
        assert count >= tokens or not self.tree.evictable_leaves, "evictable tokens were left"
        contexts = self.evicted_contexts() - contexts
        ends = len(lost & self.model.ends)
        assert contexts == ends, f"{contexts} contexts counted, {ends} evicted"
        self.model.evict(lost)
        self.events["evictions"] += count > 0
        self.events["tokens evicted"] += count
        self.events["contexts evicted"] += ends
        return count

    def flush(self) -> None:
        self.events["flushes"] += 1
        self.events["flushes under pins"] += bool(self.model.pins)
        super().flush()
        self.model.flush()

    def pin(self, name: str, path: list[int], extra_key: str | None) -> None:
        self.tree.pins.add([(name, array("q", path), extra_key)])
        self.model.pin(name, _path(path, extra_key))
        self.events["pins"] += 1

    def unpin(self, name: str) -> None:
        self.tree.pins.remove(name)
        self.model.unpin(name)

    def touch(self, path: list[int], extra_key: str | None) -> None:
        row = path_row(_path(path, extra_key))
        length, node = self.tree.touch(array("q", path), extra_key)
        assert length == self.model.run_length(row)
        assert (node is not None) == (length == len(path))
        self.model.touch(row[-1])

    def look_up(self, path: list[int], extra_key: str | None) -> None:
        before = self._nodes_and_ages()
        length = self.tree.look_up(array("q", path), extra_key)
        assert length == self.model.run_length(path_row(_path(path, extra_key)))
        assert self._nodes_and_ages() == before, "looking up changed the tree"

    def _nodes_and_ages(self) -> list[tuple[Any, ...]]:
        return [(n.id, n.last_access_time, n.hit_count, n.lock_ref) for n in self.nodes()]

    # ------------------------------------------------------------ what must hold at any time

    def check(self) -> None:
        super().check()
        now, model, pins = self.cached_now(), self.model, self.tree.pins
        wrong = dict(now.items() ^ model.cached.items())
        assert not wrong, f"the tree and the model differ: {wrong}"
        assert pins._paths.keys() == model.pins.keys(), "other paths are pinned"
        assert pins._locked.keys() == model.locked, "other pins wait"
        assert pins.any_waiting == (len(model.locked) < len(model.pins))
        assert model.pinned() <= now.keys(), "a pinned path was evicted"
        assert len(self.tree._context_ends) == len(model.ends), "ends of contexts that are gone"

    def evicted_contexts(self) -> float:
        value = self.metrics.get_sample_value("evicted_contexts_total")
        assert value is not None
        return value

    def cached_now(self) -> dict[Identity, int]:
        """The tree, token by token."""
        found: dict[Identity, int] = {}
        roots = self.tree.root_node.children.values()
        stack: list[tuple[TreeNode, tuple[int, ...]]] = [(node, ()) for node in roots]
        while stack:
            node, before = stack.pop()
            row = beginnings(_namespace(node.key.extra_key), before, tuple(node.key.token_ids))
            found.update(zip(row, node.value.tolist(), strict=True))
            stack.extend((child, row[-1].tokens) for child in node.children.values())
        return found


def may_reorder(req: Request) -> bool:
    """Log-probabilities of context tokens come back in row order, so that must stay."""
    spec = req.spec_now()
    assert spec is not None
    return not (req.return_logprob and 0 <= req.logprob_start_len < spec.context_end)


def path_row(path: Identity) -> list[Identity]:
    return beginnings(path.namespace, (), path.tokens)


def _path(ids: list[int], extra_key: str | None) -> Identity:
    return Identity(path_namespace(extra_key), tuple(ids))


def _namespace(extra_key: Any) -> tuple[str | None, ...]:
    """Of a node: a request's own key, or what the tree puts queries under."""
    if isinstance(extra_key, tuple):
        _, own, group = extra_key
        return query_namespace(own, group)
    return path_namespace(extra_key)


def _cacheable(req: Request, end: int) -> int:
    """Copies of a query that is being scored are nobody else's."""
    return end if req.copies_start is None else min(end, req.copies_start)


def _length(req: Request) -> int:
    return len(req.origin_input_ids) + len(req.output_ids)
