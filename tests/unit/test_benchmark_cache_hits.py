"""The cache benchmark's own parts: traces, ideal caches, the example, the figures of a trace."""

import argparse
import contextlib
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cache_hits import (
    FINDS,
    SUBSETS,
    Corpus,
    Served,
    bodies_of,
    cached_context_tokens,
    example_row,
    ideal_hits,
    measure,
    moving_share,
    parse,
    report,
    spread_of,
    trace_row,
)
from benchmarks.common.cache_models import LruTree, context_cache_finds, prefix_cache_finds
from benchmarks.common.client import Timed
from benchmarks.common.controls import ControlError
from benchmarks.common.pairs import Kind, Model, PairServer
from benchmarks.common.prompts import Prompt
from benchmarks.common.traces import Order, TraceShape, draw, popularity

##### Traces

shapes = st.builds(
    TraceShape,
    documents=st.integers(8, 60),
    requests=st.integers(1, 20),
    per_request=st.integers(1, 8),
    zipf=st.floats(0, 2),
)


@settings(deadline=None, max_examples=40)
@given(shape=shapes, order=st.sampled_from(Order), seed=st.integers(0, 2**32))
def test_requests_bring_distinct_documents(shape: TraceShape, order: Order, seed: int) -> None:
    trace = draw(shape, order, seed)
    assert len(trace) == shape.requests
    for request in trace:
        assert len(set(request)) == len(request) == shape.per_request
        assert all(0 <= document < shape.documents for document in request)
    assert trace == draw(shape, order, seed)


@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_both_orders_have_the_same_documents(shape: TraceShape, seed: int) -> None:
    by_relevance, by_popularity = (draw(shape, order, seed) for order in Order)
    assert [tuple(sorted(request)) for request in by_relevance] == by_popularity


def test_seeds_draw_different_traces() -> None:
    shape = TraceShape(100, 20, 4, 1.0)
    assert draw(shape, Order.RELEVANCE, 0) != draw(shape, Order.RELEVANCE, 1)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_documents_come_as_often_as_zipf_says(exponent: float) -> None:
    shape = TraceShape(documents=50, requests=20_000, per_request=1, zipf=exponent)
    drawn = [document for (document,) in draw(shape, Order.RELEVANCE, 0)]
    counts = np.bincount(drawn, minlength=shape.documents)
    expected = shape.requests * popularity(shape.documents, exponent)
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert expected[0] / expected[9] == pytest.approx(10**exponent)


def test_relevance_puts_popular_documents_anywhere() -> None:
    shape = TraceShape(documents=50, requests=2000, per_request=4, zipf=1.0)
    places = [request.index(0) for request in draw(shape, Order.RELEVANCE, 0) if 0 in request]
    counts = np.bincount(places, minlength=4)
    assert (abs(counts - len(places) / 4) < 5 * np.sqrt(len(places) / 4)).all()


##### Ideal caches

ROOM = 10**6


def test_the_example_of_the_paper() -> None:
    found: dict[Kind, list[int]] = {kind: [] for kind in Kind}
    for target in SUBSETS:
        served = [*(subset for subset in SUBSETS if subset != target), target]
        found[Kind.STOCK].append(prefix_cache_finds(served, 5, 2, ROOM)[-1])
        found[Kind.APE].append(context_cache_finds(served, 5, 2, ROOM)[-1])
    assert {kind: tuple(counts) for kind, counts in found.items()} == FINDS
    assert sum(FINDS[Kind.STOCK]) / 12 == pytest.approx(0.4167, abs=1e-4)


def test_a_prefix_cache_finds_what_came_first_before() -> None:
    requests = [(0, 1, 2), (0, 1, 3), (1, 0, 2), (0, 1, 3), (3, 0, 1), (1, 0, 3)]
    assert prefix_cache_finds(requests, 5, 2, ROOM) == [0, 2, 0, 3, 0, 2]
    assert context_cache_finds(requests, 5, 2, ROOM) == [0, 2, 3, 3, 3, 3]


def test_documents_unused_for_longest_go_first() -> None:
    # Room for three documents of 10 and a tail or two of 1.
    requests = [(0,), (1,), (0,), (2,), (3,), (0,), (1,), (2,)]
    #           miss  miss  hit   miss  miss evicts 1, hit, miss evicts 2, miss evicts 3
    assert context_cache_finds(requests, 10, 1, 33) == [0, 0, 1, 0, 0, 1, 0, 0]
    assert prefix_cache_finds(requests, 10, 1, 33) == [0, 0, 1, 0, 0, 1, 0, 0]


def test_of_a_sequence_the_end_goes_first() -> None:
    requests = [(0, 1), (2,), (0, 1)]
    # Room for two documents and a tail: document 2 evicts the tail and the document at the end.
    assert prefix_cache_finds(requests, 10, 1, 21) == [0, 0, 1]
    assert prefix_cache_finds(requests, 10, 1, 22) == [0, 0, 1]
    assert prefix_cache_finds(requests, 10, 1, 32) == [0, 0, 2]


def test_what_one_request_needs_is_never_evicted_for_it() -> None:
    tree = LruTree(30)
    tree.insert([((1,), [10]), ((2,), [10])])
    tree.insert([((1,), [10]), ((3,), [20])])
    assert (tree.find((1,)), tree.find((2,)), tree.find((3,))) == (1, 0, 1)
    with pytest.raises(ValueError, match="does not fit"):
        tree.insert([((4,), [20]), ((5,), [20])])


@settings(deadline=None, max_examples=40)
@given(shape=shapes, seed=st.integers(0, 1000), room=st.integers(0, 40))
def test_contexts_are_found_at_least_as_often_when_nothing_is_evicted(
    shape: TraceShape, seed: int, room: int
) -> None:
    requests = draw(shape, Order.RELEVANCE, seed)
    by_prefix = prefix_cache_finds(requests, 10, 1, ROOM)
    by_context = context_cache_finds(requests, 10, 1, ROOM)
    assert all(one <= other for one, other in zip(by_prefix, by_context, strict=True))
    seen: set[int] = set()
    for request, found in zip(requests, by_context, strict=True):
        assert found == len(seen & set(request))
        seen |= set(request)
    smallest = 10 * shape.per_request + 1
    bounded = context_cache_finds(requests, 10, 1, smallest + 10 * room)
    assert sum(bounded) <= sum(by_context)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_lru_matches_a_list_kept_in_order(data: st.DataObject) -> None:
    requests = data.draw(
        st.lists(st.permutations(range(6)).map(lambda p: tuple(p[:2])), min_size=1, max_size=30)
    )
    capacity = data.draw(st.integers(2, 6))
    kept: list[int] = []
    expected = []
    for request in requests:
        expected.append(len(set(request) & set(kept)))
        hits = [document for document in request if document in kept]
        others = [document for document in kept if document not in request]
        missing = [document for document in request if document not in kept]
        kept = [*others, *hits, *missing][-capacity:]
    assert context_cache_finds(requests, 1, 0, capacity) == expected


##### The example against answers


@pytest.mark.parametrize(("kind", "share"), [(Kind.STOCK, pytest.approx(5 / 12)), (Kind.APE, 1.0)])
def test_the_example_as_it_must_be(kind: Kind, share: float) -> None:
    row = example_row(kind, [7 * count for count in FINDS[kind]], 7)
    assert row["hit_share"] == share


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("subset", range(4))
@pytest.mark.parametrize("error", [-1, 1])
def test_any_other_count_is_noticed(kind: Kind, subset: int, error: int) -> None:
    found = [7 * count for count in FINDS[kind]]
    found[subset] += error
    with pytest.raises(ControlError, match=str(found[subset])):
        example_row(kind, found, 7)


##### A trace against answers

PROMPT = Prompt([1, 1], ((2, 2, 2), (3, 3, 3)), [4])


@pytest.mark.parametrize(("cached", "tokens"), [(0, 0), (1, 0), (2, 0), (3, 1), (8, 6), (9, 6)])
def test_of_a_plain_prompt_the_prefix_and_the_query_do_not_count(cached: int, tokens: int) -> None:
    meta = {"prompt_tokens": 9, "cached_tokens": cached}
    assert cached_context_tokens(Kind.STOCK, PROMPT, meta) == tokens


def test_contexts_count_as_the_server_says() -> None:
    meta = {"prompt_tokens": 9, "ape": {"context_tokens": 6, "cached_context_tokens": 3}}
    assert cached_context_tokens(Kind.APE, PROMPT, meta) == 3
    with pytest.raises(ControlError, match="6 context tokens came back as 7"):
        wrong = {**meta, "ape": {"context_tokens": 7, "cached_context_tokens": 3}}
        cached_context_tokens(Kind.APE, PROMPT, wrong)
    with pytest.raises(ControlError, match="9 tokens came back as 8"):
        cached_context_tokens(Kind.STOCK, PROMPT, {"prompt_tokens": 8, "cached_tokens": 0})


def test_figures_of_a_trace() -> None:
    def timed(sent: float, cached: int) -> Timed:
        return Timed(0.5, 1.0, {"prompt_tokens": 9, "cached_tokens": cached}, sent)

    warm_up = Served([PROMPT], [timed(0.0, 0)])
    counted = Served([PROMPT] * 3, [timed(5.0, 2), timed(5.5, 5), timed(6.0, 8)])
    row = trace_row(Kind.STOCK, Order.RELEVANCE, warm_up, counted, 12.0)
    assert row["hits"] == [0, 0, 3, 6]
    assert row["hit_share"] == pytest.approx(9 / 18)
    assert (row["requests"], row["seconds"]) == (3, 2.0)
    assert row["requests_per_second"] == 1.5
    assert row["prompt_tokens_per_second"] == 13.5
    assert row["computed_tokens"] == 27 - 15
    assert (row["first_token_50"], row["last_token_99"], row["evicted_tokens"]) == (0.5, 1.0, 12)


def test_percentiles() -> None:
    found = spread_of("x", list(range(101)))
    assert found == {"x_50": 50, "x_90": 90, "x_99": 99}


@settings(deadline=None, max_examples=40)
@given(hits=st.lists(st.integers(0, 8), min_size=1, max_size=50), windows=st.integers(1, 20))
def test_windows_cover_the_trace(hits: list[int], windows: int) -> None:
    ends, shares = moving_share(hits, 8, windows)
    assert ends[-1] == len(hits)
    assert len(ends) == len(set(ends)) == len(shares) <= windows
    sizes = np.diff([0, *ends])
    assert float((sizes * shares).sum()) == pytest.approx(sum(hits) / 8)


def test_both_servers_get_the_same_tokens() -> None:
    args, _ = parse(["--quick"])
    corpora = [Corpus(1000, args) for _ in Kind]
    sequential, ape = (
        bodies_of(kind, corpus.prompts([(3, 1), (1, 0)]), 4)
        for kind, corpus in zip(Kind, corpora, strict=True)
    )
    for one, other in zip(sequential, ape, strict=True):
        parts = [other["prefix_ids"], *(c["input_ids"] for c in other["contexts"])]
        assert one["input_ids"] == [*(i for part in parts for i in part), *other["input_ids"]]
    assert ape[0]["contexts"][1] == ape[1]["contexts"][0]
    assert ape[0]["input_ids"][0] != ape[1]["input_ids"][0]


class FakeClient:
    """A server whose cache is the ideal one."""

    def __init__(self, kind: Kind, args: argparse.Namespace) -> None:
        self._kind = kind
        self._args = args
        self._starts: dict[int, int] = {}  # document by its first token
        self._requests: list[tuple[int, ...]] = []

    def flush(self) -> None:
        self._requests = []

    def metrics(self) -> dict[str, float]:
        return {}

    def stream(
        self, bodies: list[dict[str, Any]], concurrency: int, label: str | None
    ) -> list[Timed]:
        assert concurrency in (1, self._args.concurrency)
        return [self._one(body) for body in bodies]

    def _one(self, body: dict[str, Any]) -> Timed:
        self._requests.append(self._documents(body))
        cached = ideal_hits(self._kind, self._requests, self._args)[-1]
        contexts = len(self._requests[-1]) * self._args.document_tokens
        meta = {
            "prompt_tokens": contexts + self._args.prefix + self._args.query,
            "cached_tokens": self._args.prefix + cached,
            "ape": {"context_tokens": contexts, "cached_context_tokens": cached},
        }
        return Timed(0.1, 0.2, meta, float(len(self._requests)))

    def _documents(self, body: dict[str, Any]) -> tuple[int, ...]:
        size = self._args.document_tokens
        if self._kind is Kind.APE:
            first = [context["input_ids"][0] for context in body["contexts"]]
        else:
            first = body["input_ids"][self._args.prefix : -self._args.query : size]
        return tuple(self._starts.setdefault(token, len(self._starts)) for token in first)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def server(kind: Kind, model: Model, args: argparse.Namespace, flags: Any) -> Any:
        info = {"max_total_num_tokens": 1000, "attention_backend": "x", "dtype": "y"}
        yield PairServer(FakeClient(kind, args), list(flags[kind]), 1.0, info)

    monkeypatch.setattr("benchmarks.cache_hits.pair_server", server)
    monkeypatch.setattr(
        "benchmarks.cache_hits.pair_model", lambda *_: Model("path", "fake", (), 2000)
    )


OPTIONS = ["--documents", "30", "--requests", "40", "--per-request", "3", "--concurrency", "2"]
OPTIONS += ["--document-tokens", "20", "--prefix", "4", "--query", "3", "--generated", "2"]


def test_a_whole_run_and_its_report(
    fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--pool-tokens", "1000", "--out", str(tmp_path)]
    for only in ("stock", "ape"):
        content = measure(*parse([*options, "--only", only]))
    rows = {(row["part"], row["kind"], row.get("order")): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 6
    assert rows["example", "stock", None]["hit_share"] == pytest.approx(5 / 12)
    for order in Order:
        stock, ape = (rows["trace", kind.value, order.value] for kind in Kind)
        assert ape["hit_share"] == pytest.approx(ape["ideal_hit_share"])
        assert stock["hit_share"] < ape["hit_share"]
        assert stock["requests"] == 34
    report(content, tmp_path)
    shown = capsys.readouterr().out
    assert "41.7%" in shown
    assert "34 of 40 requests counted" in shown
    assert (tmp_path / "cache_hits.png").stat().st_size > 0
    assert json.loads((tmp_path / "results.json").read_text())["finished"]


def test_a_smaller_pool_than_asked_for_is_noticed(fakes: None, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="1,000 tokens, not the 2,000"):
        measure(*parse([*OPTIONS, "--pool-tokens", "2000", "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pool-tokens", "1000"],
        ["--documents", "3"],
        ["--warm-up", "1"],
        ["--orders", "any"],
        ["--zipf", "-1"],
        ["--report", "/nowhere", "--requests", "0"],
    ],
)
def test_wrong_options_end_with_a_message(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2


def test_subsets_are_all_choices_in_one_order() -> None:
    assert {frozenset(s) for s in SUBSETS} == {frozenset(p[:3]) for p in permutations(range(4))}
    assert all(list(subset) == sorted(subset) for subset in SUBSETS)
