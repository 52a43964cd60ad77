"""Scoring requests on the APE radix tree: contexts are stored, copies of the query never."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.oracle import one_thread
from tests.support.tree import A, B, C, D, Host, P, Q, ape, scoring, tokens_of


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


@pytest.mark.parametrize("chunk", [*range(1, 12), 1000])
def test_no_copy_of_a_query_is_left_in_the_tree(host: Host, chunk: int) -> None:
    assert host.serve(scoring(A, B, C), chunk=chunk) == 0
    assert host.tree.total_size() == len(P + A + B + C)
    (below_root,) = host.tree.root_node.children.values()
    assert tokens_of(below_root) == P[:chunk]
    assert host.serve(scoring(C, A, B), chunk=chunk) == len(P + A + B + C)


def test_the_request_that_was_scored_for_finds_its_contexts(host: Host) -> None:
    host.serve(scoring(A, B))
    host.serve(scoring(C, D))
    assert host.serve(ape(A, B, C, D)) == len(P + A + B + C + D)


def test_scoring_finds_what_others_wrote_and_never_reads_a_query(host: Host) -> None:
    host.serve(ape(A, B), 70)
    host.serve(ape(B, A, query=[B[-1], *Q]), 70)
    assert host.serve(scoring(B, A, query=Q)) == len(P + A + B)


@pytest.mark.parametrize("copied", [1, 4, 5])
def test_copies_stay_with_their_contexts_when_these_change_places(host: Host, copied: int) -> None:
    host.serve(ape(C))
    req = scoring(A, B, C)
    host.admit(req)
    spec = req.spec_now()
    assert spec is not None and spec.context_lens == tuple(map(len, (C, A, B)))
    assert spec.places == (1, 2, 0)  # type: ignore[attr-defined]
    assert host.extend(req, len(A + B) + copied)
    host.check()


@pytest.mark.parametrize("how", ["finish", "abort"])
@pytest.mark.parametrize("done", range(0, 20))
def test_scoring_may_end_after_any_number_of_rows(host: Host, done: int, how: str) -> None:
    host.serve(ape(B))
    req = scoring(A, B, C)
    host.admit(req)
    if done:
        assert host.extend(req, done)
    host.check()
    getattr(host, how)(req)
    host.check()
    assert host.tree.protected_size() == 0


def test_requests_that_score_the_same_contexts_at_once_leave_one_copy(host: Host) -> None:
    first, second = scoring(A, B), scoring(B, A)
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
