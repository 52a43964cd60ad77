"""The APE radix tree on SGLang's real pools and requests, driven as the scheduler drives it.

Random traffic: ``test_campaign_tree.py``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest

from tests.support.oracle import one_thread
from tests.support.tree import (
    POOL,
    A,
    B,
    C,
    D,
    Host,
    P,
    Q,
    ape,
    plain,
    tokens_of,
)


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


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
    host.evict(POOL)
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
        host.evict(POOL)
        host.check()
        assert host.tree.evictable_size() == 0
        assert host.extend(req, 2)
    host.finish(req)


def test_a_lock_on_one_request_does_not_hide_the_locks_of_another(host: Host) -> None:
    one, two = ape(A, B), ape(B, C)
    host.prefill(one)
    host.prefill(two)
    host.finish(one)
    host.evict(POOL)
    host.check()
    assert host.tree.total_size() == len(P + B + C + Q)
    host.finish(two)


def test_evicting_one_context_leaves_the_others(host: Host) -> None:
    host.serve(ape(A))
    host.serve(ape(B, C, query=[5]))
    host.evict(len(Q + A))  # the first query, then its context
    host.check()
    assert host.serve(ape(A, B, C, query=[6])) == len(P + B + C)


def test_the_least_recently_used_context_goes_first(host: Host) -> None:
    host.serve(ape(A, B, C))
    host.serve(ape(C, A, query=[5]))
    host.evict(len(Q + B))  # the first query, then B
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
    host.flush()
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
