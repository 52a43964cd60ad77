"""Scoring requests on the APE radix tree: contexts are stored, what stands behind them never."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.oracle import one_thread
from tests.support.tree import (
    A,
    B,
    C,
    D,
    Host,
    P,
    Q,
    Request,
    ape,
    measuring,
    scoring,
    tokens_of,
)

Asks = Callable[..., Request]
by_both = pytest.mark.parametrize("asks", [scoring, measuring])


@pytest.fixture
def host() -> Iterator[Host]:
    """A host that must be clean once every request of the test has ended."""
    host = Host()
    with one_thread():
        yield host
        host.check()
        for req in list(host.active):
            host.abort(req)
            host.check()
        host.assert_everything_can_be_evicted()


@by_both
@pytest.mark.parametrize("chunk", [*range(1, 12), 1000])
def test_no_query_is_left_in_the_tree(host: Host, asks: Asks, chunk: int) -> None:
    assert host.serve(asks(A, B, C), chunk=chunk) == 0
    assert host.tree.total_size() == len(P + A + B + C)
    (below_root,) = host.tree.root_node.children.values()
    assert tokens_of(below_root) == P[:chunk]
    assert host.serve(asks(C, A, B), chunk=chunk) == len(P + A + B + C)


@by_both
def test_the_request_that_was_scored_for_finds_its_contexts(host: Host, asks: Asks) -> None:
    host.serve(asks(A, B))
    host.serve(asks(C, D))
    assert host.serve(ape(A, B, C, D)) == len(P + A + B + C + D)


@by_both
def test_scoring_finds_what_others_wrote_and_never_reads_a_query(host: Host, asks: Asks) -> None:
    host.serve(ape(A, B), 70)
    host.serve(ape(B, A, query=[B[-1], *Q]), 70)
    assert host.serve(asks(B, A, query=Q)) == len(P + A + B)


@by_both
@pytest.mark.parametrize("copied", [1, 4, 5])
def test_what_is_asked_stays_with_its_context_when_contexts_change_places(
    host: Host, asks: Asks, copied: int
) -> None:
    host.serve(ape(C))
    req = asks(A, B, C)
    host.admit(req)
    spec = req.spec_now()
    assert spec is not None and spec.context_lens == tuple(map(len, (C, A, B)))
    assert spec.places == (1, 2, 0)  # type: ignore[attr-defined]
    assert host.extend(req, len(A + B) + copied)
    host.check()


@by_both
@pytest.mark.parametrize("how", ["finish", "abort"])
@pytest.mark.parametrize("done", range(0, 20))
def test_scoring_may_end_after_any_number_of_rows(
    host: Host, asks: Asks, done: int, how: str
) -> None:
    host.serve(ape(B))
    req = asks(A, B, C)
    host.admit(req)
    if done:
        assert host.extend(req, done)
    host.check()
    getattr(host, how)(req)
    host.check()
    assert host.tree.protected_size() == 0


@by_both
def test_requests_that_score_the_same_contexts_at_once_leave_one_copy(
    host: Host, asks: Asks
) -> None:
    first, second = asks(A, B), asks(B, A)
    host.admit(first)
    host.admit(second)
    for _ in range(12):
        for req in (first, second):
            if not host.prefilled(req):
                assert host.extend(req, 2)
                host.check()
    host.finish(first)
    host.finish(second)
    assert host.tree.total_size() == len(P + A + B)
