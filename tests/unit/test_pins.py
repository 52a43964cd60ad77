"""Pinned contexts in the real tree on SGLang's real pools, driven as ``test_tree.py`` does."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from tests.support.oracle import one_thread
from tests.support.tree import CONTEXTS, PREFIXES, A, B, C, Host, P, Q, ape, plain, tokens_of

Store = Callable[[Host], object]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def host() -> Iterator[Host]:
    """A host that must be clean once every pin of the test is gone."""
    host = Host()
    yield host
    host.check()
    for name in list(host.tree.pins._paths):
        unpin(host, name)
        host.check()
    assert not host.tree.pins.any_waiting
    host.assert_everything_can_be_evicted()


def pin(host: Host, path: list[int], name: str = "one", extra_key: str | None = None) -> None:
    host.tree.pins.add([(name, array("q", path), extra_key)])


def unpin(host: Host, name: str = "one") -> None:
    host.tree.pins.remove(name)


def evict_all(host: Host) -> None:
    host.tree.evict(EvictParams(num_tokens=host.size))
    host.check()


def flush(host: Host) -> None:
    host.tree.reset()
    host.slots.clear()


def cached(host: Host, path: list[int], extra_key: str | None = None) -> int:
    return host.tree.look_up(array("q", path), extra_key)


def touch(host: Host, path: list[int], extra_key: str | None = None) -> int:
    return host.tree.touch(array("q", path), extra_key).length


def assert_kept(host: Host, *paths: list[int]) -> None:
    """Of all that is cached, eviction leaves these paths alone."""
    evict_all(host)
    wanted = {tuple(path[: i + 1]) for path in paths for i in range(len(path))}
    assert [cached(host, path) for path in paths] == [len(path) for path in paths]
    assert host.tree.total_size() == host.tree.protected_size() == len(wanted)


# ---------------------------------------------------------------- pinned paths stay


def test_pinned_paths_outlive_any_eviction(host: Host) -> None:
    host.serve(plain(P + A))
    host.serve(ape(B, C))
    pin(host, P + A, "one")
    pin(host, P + B, "two")
    assert_kept(host, P + A, P + B)
    assert host.serve(ape(A, B, C)) == len(P + A + B)


def test_without_prefix_the_context_alone_is_pinned(host: Host) -> None:
    host.serve(ape(A, B, prefix=[]))
    pin(host, A)
    assert_kept(host, A)


def test_a_pin_of_one_tenant_keeps_nothing_of_another(host: Host) -> None:
    for key in ("mine", "yours", None):
        host.serve(plain(P + A, extra_key=key))
    pin(host, P + A, extra_key="mine")
    evict_all(host)
    assert [cached(host, P + A, key) for key in ("mine", "yours", None)] == [len(P + A), 0, 0]


def test_an_unpinned_path_can_be_evicted(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A)
    unpin(host)
    assert cached(host, P + A) == len(P + A), "it stays until there is need"
    assert_kept(host)


def test_unpinning_what_is_not_pinned_changes_nothing(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A)
    unpin(host, "another")
    unpin(host, "another")
    assert_kept(host, P + A)


def test_pinning_twice_is_undone_by_unpinning_once(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A)
    pin(host, P + A)
    unpin(host)
    assert_kept(host)


def test_a_path_with_two_names_is_kept_until_both_are_gone(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A, "one")
    pin(host, P + A, "two")
    unpin(host, "one")
    assert_kept(host, P + A)
    unpin(host, "two")
    assert_kept(host)


def test_a_name_that_moves_gives_its_old_path_up(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A)
    pin(host, P + B)
    assert_kept(host, P + B)


def test_pins_and_requests_lock_beside_each_other(host: Host) -> None:
    host.serve(plain(P + A))
    req = ape(A, B)
    host.prefill(req)
    pin(host, P + A, "one")
    pin(host, P + B, "two")
    host.check()
    host.finish(req)
    assert_kept(host, P + A, P + B)


# ---------------------------------------------------------------- pins that wait


STORES: dict[str, Store] = {
    "the context as a prompt": lambda host: host.serve(plain(P + A)),
    "the same in chunks": lambda host: host.serve(plain(P + A), chunk=2),
    "an APE row": lambda host: host.serve(ape(A, B)),
    "an APE row, not as the first": lambda host: host.serve(ape(B, A), 70),
    "an APE row in chunks": lambda host: host.serve(ape(B, A), chunk=1),
    "an APE row that is aborted": lambda host: (
        host.admit(req := ape(A, B)),
        host.extend(req, len(P + A)),
        host.abort(req),
    ),
    "a longer prompt": lambda host: host.serve(plain(P + A + Q), 70),
    "a longer prompt in chunks": lambda host: host.serve(plain(P + A + Q), chunk=2),
    "a prompt and its answer": lambda host: host.serve(plain(P + A[:1]), *A[1:], 70),
    "an APE row with a longer context": lambda host: host.serve(ape(B, [*A, 55])),
}


@pytest.mark.parametrize("how", STORES)
@pytest.mark.parametrize("flushed", [False, True])
def test_a_waiting_pin_is_locked_once_its_path_is_stored(
    host: Host, how: str, flushed: bool
) -> None:
    if flushed:
        host.serve(plain(P + A))
    pin(host, P + A)
    if flushed:
        flush(host)
    host.serve(ape(C))
    assert_kept(host)
    assert host.tree.pins.any_waiting
    STORES[how](host)
    assert_kept(host, P + A)
    assert not host.tree.pins.any_waiting


def test_a_waiting_pin_is_locked_by_a_row_that_finds_its_path_cached(host: Host) -> None:
    pin(host, P + A)
    running = plain(P + A + Q)
    host.prefill(running)
    assert host.tree.pins.any_waiting
    assert host.serve(ape(A, C)) == len(P + A)
    assert not host.tree.pins.any_waiting
    host.abort(running)
    assert_kept(host, P + A)


def test_a_longer_prompt_locks_every_beginning_that_a_pin_waits_for(host: Host) -> None:
    whole = P + C
    for length in (1, 2, 5, 7):
        pin(host, whole[:length], str(length))
    pin(host, [*whole[:4], 99], "another path")
    pin(host, whole[:6], "another tenant", "key")
    pin(host, [*whole, 50, 51], "more")
    host.serve(plain([*whole, 50]))
    assert host.tree.pins._locked.keys() == {"1", "2", "5", "7"}
    assert_kept(host, whole)
    host.serve(plain(whole, "key"))
    assert "another tenant" in host.tree.pins._locked
    unpin(host, "another tenant")
    for length in (7, 5):
        unpin(host, str(length))
    assert_kept(host, whole[:2])


def test_a_waiting_pin_is_locked_before_its_request_ends(host: Host) -> None:
    pin(host, P + A)
    req = ape(A, B, C)
    host.admit(req)
    host.extend(req, len(P + A))
    assert not host.tree.pins.any_waiting
    host.check()
    host.abort(req)
    assert_kept(host, P + A)


@pytest.mark.parametrize("stored", [P, P + A[:-1], P + B, A, [*P, 99, *A]])
def test_a_waiting_pin_does_not_take_another_path_for_its_own(
    host: Host, stored: list[int]
) -> None:
    pin(host, P + A)
    host.serve(plain(stored))
    host.serve(plain(P + A, extra_key="another"))
    assert_kept(host)
    assert host.tree.pins.any_waiting


def test_part_of_a_path_is_not_pinned(host: Host) -> None:
    host.serve(plain(P + A[:1]))
    pin(host, P + A)
    assert_kept(host)


def test_several_names_wait_for_one_path(host: Host) -> None:
    for name in ("one", "two", "three"):
        pin(host, P + A, name)
    unpin(host, "two")
    host.serve(ape(A))
    unpin(host, "one")
    assert_kept(host, P + A)
    unpin(host, "three")
    assert_kept(host)


def test_a_removed_pin_waits_no_more(host: Host) -> None:
    pin(host, P + A)
    unpin(host)
    assert not host.tree.pins.any_waiting
    host.serve(ape(A))
    assert_kept(host)


# ---------------------------------------------------------------- flushes


def test_pins_outlive_a_flush(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A, "one")
    pin(host, P + B, "two")
    for _ in range(2):
        flush(host)
        host.check()
        assert_kept(host)
        host.serve(ape(B, A, C))
        assert_kept(host, P + A, P + B)


def test_a_pin_may_be_removed_after_a_flush(host: Host) -> None:
    host.serve(ape(A, B))
    pin(host, P + A)
    flush(host)
    unpin(host)
    host.serve(ape(A, B))
    assert_kept(host)


def test_pinning_again_after_a_flush_goes_on_waiting(host: Host) -> None:
    host.serve(ape(A))
    pin(host, P + A)
    flush(host)
    pin(host, P + A)
    host.serve(ape(A))
    unpin(host)
    assert_kept(host)


# ---------------------------------------------------------------- nodes that split


@pytest.mark.parametrize("at", range(1, len(P + C)))
def test_a_pinned_path_may_split_anywhere(host: Host, at: int) -> None:
    path = P + C
    host.serve(plain(path))
    pin(host, path)
    host.serve(plain([*path[:at], 99]))
    host.serve(ape([*C[:1], 98], C))
    assert_kept(host, path)
    unpin(host)
    assert_kept(host)


def test_pins_of_nested_paths_keep_what_is_common_once(host: Host) -> None:
    whole = P + C
    host.serve(plain([*whole, 50]))
    for length in (2, 5, 7):
        pin(host, whole[:length], str(length))
    assert_kept(host, whole)
    unpin(host, "7")
    assert_kept(host, whole[:5])
    unpin(host, "2")
    assert_kept(host, whole[:5])


# ---------------------------------------------------------------- look_up


def structure(host: Host) -> list[tuple[object, ...]]:
    nodes = [*host.nodes(), host.tree.root_node]
    return [
        (
            n.id,
            n.last_access_time,
            n.hit_count,
            n.lock_ref,
            tokens_of(n),
            sorted(map(repr, n.children)),
        )
        for n in nodes
    ]


def test_looking_up_changes_neither_ages_nor_nodes(host: Host) -> None:
    host.serve(plain(P + A + Q))
    host.serve(ape(B, C))
    before = structure(host)
    for path in (
        [],
        [99],
        P[:2],
        P + A[:1],
        P + A,
        P + A + Q + [1],
        P + B + [99],
        P + C[:3] + [99],
    ):
        cached(host, path)
        cached(host, path, "another")
    assert structure(host) == before


def test_looking_up_tells_how_much_of_a_path_is_cached(host: Host) -> None:
    whole = P + A + Q
    host.serve(plain(whole))
    host.serve(plain(P + C, extra_key="key"))
    for length in range(len(whole) + 1):
        assert cached(host, whole[:length]) == length
        assert cached(host, [*whole[:length], 99, 98]) == length
    assert cached(host, P + C) == len(P)
    assert cached(host, P + C, "key") == len(P + C)
    assert cached(host, P + C, "other") == 0


def test_looking_up_agrees_with_matching() -> None:
    host = Host(pool=120)
    for context in CONTEXTS:
        host.serve(plain([1, 2, *context]))
    for prefix in PREFIXES:
        for context in CONTEXTS:
            path = prefix + context
            assert cached(host, path) == touch(host, path)


def test_a_path_that_was_looked_up_is_as_old_as_before(host: Host) -> None:
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    cached(host, P + A)
    host.tree.evict(EvictParams(num_tokens=1))
    assert [cached(host, P + A), cached(host, P + B)] == [len(P), len(P + B)]


def test_a_path_that_was_touched_is_the_last_to_go(host: Host) -> None:
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    assert touch(host, P + A) == len(P + A)
    host.tree.evict(EvictParams(num_tokens=1))
    assert [cached(host, P + A), cached(host, P + B)] == [len(P + A), len(P)]


# ---------------------------------------------------------------- counting evictions


class Evictions:
    """Stands for the Prometheus counter."""

    def __init__(self) -> None:
        self.count = 0

    def inc(self) -> None:
        self.count += 1


@pytest.fixture
def evictions(host: Host) -> Evictions:
    host.tree._evictions = Evictions()
    return host.tree._evictions


def test_each_evicted_context_of_a_row_is_counted_once(host: Host, evictions: Evictions) -> None:
    host.serve(ape(A, B, A), 70, 71)
    evict_all(host)
    assert evictions.count == 2, "neither the prefix nor the query is a context"
    assert not host.tree._context_ends, "it would keep nodes that are gone"


def test_plain_requests_are_no_contexts_unless_touched(host: Host, evictions: Evictions) -> None:
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    for _ in range(3):
        touch(host, P + B)
    evict_all(host)
    assert evictions.count == 1


def test_only_whole_contexts_are_counted(host: Host, evictions: Evictions) -> None:
    host.serve(plain(P + C[:2]))
    assert touch(host, P + C) == len(P) + 2
    req = ape(C, B)
    host.admit(req)
    host.extend(req, 1)
    host.abort(req)
    evict_all(host)
    assert evictions.count == 0


@pytest.mark.parametrize("other", [[*C[:1], 99], C[:2], [*C, 99]])
def test_a_context_whose_node_splits_is_counted_once(
    host: Host, evictions: Evictions, other: list[int]
) -> None:
    host.serve(plain(P + C))
    touch(host, P + C)
    host.serve(plain(P + other))
    host.serve(plain([*P, *C[:3], 98]))
    evict_all(host)
    assert evictions.count == 1


def test_a_context_that_comes_back_can_be_counted_again(host: Host, evictions: Evictions) -> None:
    for times in (1, 2):
        host.serve(ape(A, query=[80 + times]))
        evict_all(host)
        assert evictions.count == times


def test_a_flush_is_no_eviction(host: Host, evictions: Evictions) -> None:
    host.serve(ape(A, B))
    flush(host)
    host.serve(plain(P + A))
    host.serve(plain(P + B))
    evict_all(host)
    assert evictions.count == 0
    assert not host.tree._context_ends


def test_a_pinned_context_is_counted_when_it_goes_at_last(host: Host, evictions: Evictions) -> None:
    host.serve(plain(P + A))
    pin(host, P + A)
    evict_all(host)
    assert evictions.count == 0
    unpin(host)
    evict_all(host)
    assert evictions.count == 1


# ---------------------------------------------------------------- everything at random


class RandomPins:
    """Requests, pins, evictions and flushes in a small pool."""

    NAMES = ("one", "two", "three")
    KEYS = (None, None, "tenant")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.host = Host(pool=72, requests=4, row=64)
        self.kept: dict[str, tuple[tuple[int, ...], str | None]] = {}  # since the last flush

    def step(self) -> None:
        pick = self.random.choice
        pick(
            [self.serve, self.serve_row, self.serve_row, self.pin, self.pin, self.unpin, self.evict]
        )()
        if self.random.random() < 0.03:
            flush(self.host)
            self.kept.clear()
        self.check()

    def path(self) -> tuple[list[int], str | None]:
        pick = self.random.choice
        return pick(PREFIXES) + pick(CONTEXTS), pick(self.KEYS)

    def serve(self) -> None:
        path, key = self.path()
        self.host.serve(plain(path + self.random.choice([[], [], [7]]), key), *self.answer())

    def serve_row(self) -> None:
        contexts = self.random.sample(CONTEXTS, self.random.randint(1, 3))
        prefix, key = self.random.choice(PREFIXES), self.random.choice(self.KEYS)
        req = ape(*contexts, prefix=prefix, query=[9], extra_key=key)
        self.host.serve(req, *self.answer(), chunk=self.random.choice([1, 3, 100]))

    def answer(self) -> list[int]:
        return self.random.choice([[], [70]])

    def pin(self) -> None:
        path, key = self.path()
        name = self.random.choice(self.NAMES)
        self.kept.pop(name, None)
        pin(self.host, path, name, key)

    def unpin(self) -> None:
        name = self.random.choice(self.NAMES)
        self.kept.pop(name, None)
        unpin(self.host, name)

    def evict(self) -> None:
        self.host.tree.evict(EvictParams(num_tokens=self.random.choice([1, 5, 100])))

    def check(self) -> None:
        tree, slots = self.host.tree, self.host.slots
        self.host.check()
        total = slots.available_size() + tree.evictable_size() + tree.protected_size()
        assert total == self.host.size
        for name in tree.pins._locked:
            path = tree.pins._paths[name]
            assert name in tree.pins._paths
            self.kept.setdefault(name, self.known(name, path.extra_key))
        for path, key in self.kept.values():
            assert cached(self.host, list(path), key) == len(path), "a pinned path was evicted"
        tokens = {
            (key, path[: i + 1]) for path, key in self.kept.values() for i in range(len(path))
        }
        assert tree.protected_size() == len(tokens)

    def known(self, name: str, key: str | None) -> tuple[tuple[int, ...], str | None]:
        node, parts = self.host.tree.pins._locked[name], []
        while node is not self.host.tree.root_node:
            parts.append(tokens_of(node))
            node = node.parent
        return tuple(token for part in reversed(parts) for token in part), key


@pytest.mark.parametrize("seed", range(20))
def test_random_pins_keep_their_paths_and_the_books(seed: int) -> None:
    run = RandomPins(seed)
    for _ in range(200):
        run.step()
    for name in run.NAMES:
        unpin(run.host, name)
    run.host.assert_everything_can_be_evicted()
