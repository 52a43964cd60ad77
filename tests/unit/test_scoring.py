"""Scores of contexts: the rows that ask for them, what is kept, and what becomes of them."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_ext.reference import LOWEST_BIAS
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.scoring.choice import biases, highest
from sglang_ape.scoring.known import KnownScores, score_keys
from sglang_ape.scoring.probe import null_query, probe_row
from sglang_ape.scoring.question import Question
from sglang_ape.scoring.rows import Room, likelihoods, score_rows
from sglang_ape.scoring.scorer import Attention, Scorer
from sglang_ape.spec import MOST_NULL_TOKENS, ApeSpec, ProbeSpec, ScoreSpec
from sglang_ape.store.contexts import Tenant

fast = settings(deadline=None, max_examples=80)
tokens = st.lists(st.integers(0, 9), min_size=1, max_size=5)
scores_of_contexts = st.lists(st.floats(-500, 0), min_size=1, max_size=8)
LIMITS = Limits(window=100, context_tokens=1000, pool_tokens=1000, vocab_size=50)
NOBODY = Tenant(None, None)


def ids(values: Sequence[int]) -> array:
    return array("I", values)


# ---------------------------------------------------------------- biases and highest


@given(scores=scores_of_contexts, soft=st.floats(0, 100))
def test_the_likeliest_context_has_no_bias_and_the_others_what_the_formula_says(
    scores: list[float], soft: float
) -> None:
    found = biases(scores, soft) or (0.0,) * len(scores)
    top = max(scores)
    expected = [max(soft * (score - top), LOWEST_BIAS) for score in scores]
    assert found == pytest.approx(expected)
    assert max(found) == 0.0


@pytest.mark.parametrize(("scores", "soft"), [([-3.0, -1.0], 0.0), ([-2.0, -2.0], 5.0), ([-1], 1)])
def test_biases_that_change_nothing_are_none(scores: list[float], soft: float) -> None:
    assert biases(scores, soft) == ()


@given(scores=scores_of_contexts, count=st.integers(1, 9))
def test_the_highest_scores_are_chosen_in_the_given_order(scores: list[float], count: int) -> None:
    chosen = highest(scores, count)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(scores))
    left = set(range(len(scores))) - set(chosen)
    assert all(scores[i] >= scores[j] for i in chosen for j in left)


def test_of_equal_scores_the_first_contexts_are_chosen() -> None:
    assert highest([-1.0, -2.0, -1.0, -1.0], 2) == [0, 2]


# ---------------------------------------------------------------- rows


@fast
@given(
    prefix=st.lists(st.integers(0, 9), max_size=4),
    contexts=st.lists(tokens, min_size=1, max_size=8),
    query=tokens,
    copies=st.integers(1, 20),
    room=st.integers(1, 60),
    data=st.data(),
)
def test_rows_hold_every_context_once_with_a_copy_of_the_query_behind_its_last_token(
    prefix: list[int],
    contexts: list[list[int]],
    query: list[int],
    copies: int,
    room: int,
    data: st.DataObject,
) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(contexts) - 1), unique=True))
    rows = list(
        score_rows(ids(prefix), list(map(ids, contexts)), ids(query), wanted, Room(copies, room))
    )
    assert [i for row in rows for i in row.contexts] == wanted
    for row in rows:
        own = [contexts[i] for i in row.contexts]
        tail = [token for context in own for token in [context[-1], *query]]
        assert row.input_ids.tolist() == prefix + [t for c in own for t in c] + tail
        assert row.spec == ScoreSpec.of(len(prefix), [len(c) for c in own], 1 + len(query))
        if len(own) > 1:
            assert len(tail) <= copies and len(row.input_ids) <= room


def test_the_likelihood_of_a_copy_is_the_sum_over_the_query() -> None:
    (row,) = score_rows(ids([1]), [ids([2, 3]), ids([4])], ids([5, 6]), [0, 1], Room(99, 99))
    logprobs = [(None, 3), (-1.0, 5), (-2.0, 6), (-9.0, 4), (-0.5, 5), (-0.25, 6)]
    assert likelihoods(row, logprobs) == [-3.0, -0.75]
    with pytest.raises(RuntimeError, match="5 log-probabilities for 2 copies of 3 tokens"):
        likelihoods(row, logprobs[1:])


@pytest.mark.parametrize(
    ("query", "tail"), [([5], []), ([5, 6, 7], [7]), (list(range(10, 30)), [25, 26, 27, 28, 29])]
)
def test_a_null_query_ends_as_the_query_does(query: list[int], tail: list[int]) -> None:
    assert null_query(ids([1, 2]), ids(query)).tolist() == [1, 2, *tail]
    assert len(null_query(ids([1] * 40), ids(query))) <= MOST_NULL_TOKENS


def test_a_measured_row_holds_the_contexts_the_query_and_the_null_query() -> None:
    row = probe_row(ids([1]), [ids([2, 3]), ids([4])], ids([5, 6]), ids([9]))
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 6]
    assert row.spec == ProbeSpec.of(1, [2, 1], 2, 2)
    assert (row.contexts, row.scored_tokens) == ((0, 1), 4)


# ---------------------------------------------------------------- what is known


def test_the_least_recently_used_score_is_forgotten_first() -> None:
    known = KnownScores(most=2)
    for key in (b"a", b"b"):
        known.add(key, -1.0, known.age)
    known.get(b"a")
    known.add(b"c", -3.0, known.age)
    assert [known.get(key) for key in (b"a", b"b", b"c")] == [-1.0, None, -3.0]


def test_a_score_of_replaced_weights_is_not_kept() -> None:
    known, before = KnownScores(), 0
    known.add(b"old", -1.0, known.age)
    known.forget()
    known.add(b"late", -1.0, before)
    known.add(b"new", -2.0, known.age)
    assert [known.get(key) for key in (b"old", b"late", b"new")] == [None, None, -2.0]


@pytest.mark.parametrize("of_set", [False, True])
def test_a_score_depends_on_everything_and_on_where_one_part_ends(of_set: bool) -> None:
    variants = [
        (("lora", None), [1], [2], [3]),
        ((None, "lora"), [1], [2], [3]),
        ((None, None), [1], [2], [3]),
        ((None, None), [1, 2], [3], [3]),
        ((None, None), [1], [2, 3], [3]),
        ((None, None), [1], [2], [3, 3]),
        ((None, None), [], [1, 2], [3]),
    ]
    keys = {
        score_keys(whose, ids(prefix), [ids(context)], ids(query), of_set)[0]
        for whose, prefix, context, query in variants
    }
    assert len(keys) == len(variants)


def test_a_score_may_depend_on_the_other_contexts_but_not_on_their_order() -> None:
    def keys(*contexts: list[int], of_set: bool) -> list[bytes]:
        return score_keys((None, None), ids([1]), list(map(ids, contexts)), ids([9]), of_set)

    for of_set in (False, True):
        both = keys([2], [3], of_set=of_set)
        assert keys([3], [2], of_set=of_set) == both[::-1]
        assert (keys([2], of_set=of_set) == both[:1]) == (not of_set)


# ---------------------------------------------------------------- the scorer


class Engine:
    """Stands for ``TokenizerManager``: a likelihood is minus the sum of a context's tokens."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.aborted: list[str] = []
        self.ended = 0
        self.hold: asyncio.Event | None = None
        self.finish_reason = {"type": "length"}
        loaded = {"adapter": SimpleNamespace(lora_id="id of adapter")}
        self.lora_registry = SimpleNamespace(get_all_adapters=lambda: loaded)
        self.server_args = SimpleNamespace(log_requests=False)

    async def generate(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        self.asked.append(obj)
        try:
            if self.hold is not None:
                await self.hold.wait()
            spec = ApeSpec.from_custom_params(obj.sampling_params["custom_params"])
            assert isinstance(spec, ScoreSpec)
            assert obj.logprob_start_len == spec.context_end
            logprobs: list[tuple[float | None, int]] = []
            bounds = zip(spec.context_starts, spec.context_stops, strict=True)
            for start, stop in bounds:
                total = sum(obj.input_ids[start:stop])
                logprobs += [(None, 0), (-float(total), 0)] + [(0.0, 0)] * (spec.copy_len - 2)
            meta = {"cached_tokens": 1, "finish_reason": self.finish_reason}
            yield {"meta_info": {**meta, "input_token_logprobs": logprobs}}
        finally:
            self.ended += 1

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def scorer(engine: Engine) -> Scorer:
    return Scorer(engine, LIMITS, lambda: 0)


def question(*contexts: list[int], **given: Any) -> Question:
    fields = {"tenant": NOBODY, "prefix": ids([7]), "query": ids([8, 9]), "rid": None}
    return Question(**{**fields, "contexts": list(map(ids, contexts)), "priority": None, **given})


def test_every_context_gets_its_own_score_and_what_it_took_is_told(
    engine: Engine, scorer: Scorer
) -> None:
    found = asyncio.run(scorer.score(question([1, 2], [5], [1, 1]), engine.generate, None))
    assert found.by_context == (-3.0, -5.0, -2.0)
    assert (found.scored_tokens, found.encoded_tokens) == (3 * 3, 1 + 5 - 1)


def test_scores_once_known_are_not_asked_again(engine: Engine, scorer: Scorer) -> None:
    asyncio.run(scorer.score(question([1], [2]), engine.generate, None))
    found = asyncio.run(scorer.score(question([2], [3], [3], [1]), engine.generate, None))
    assert found.by_context == (-2.0, -3.0, -3.0, -1.0)
    assert found.scored_tokens == 3, "the new context, once"
    again = asyncio.run(scorer.score(question([3], [1]), engine.generate, None))
    assert (again.scored_tokens, again.encoded_tokens, len(engine.asked)) == (0, 0, 2)


def test_nothing_is_known_across_tenants_and_adapters(engine: Engine, scorer: Scorer) -> None:
    tenants = [NOBODY, Tenant(None, "a"), Tenant(None, "b"), Tenant("adapter", None)]
    for tenant in tenants:
        asked = asyncio.run(scorer.score(question([1], tenant=tenant), engine.generate, None))
        assert asked.scored_tokens > 0
        assert (engine.asked[-1].lora_path, engine.asked[-1].extra_key) == tenant
    unloaded = question([1], tenant=Tenant("unloaded", None))
    for _ in range(2):  # the next adapter of this name may be another
        assert asyncio.run(scorer.score(unloaded, engine.generate, None)).scored_tokens > 0


def test_scores_computed_while_weights_change_are_used_but_not_kept(
    engine: Engine, scorer: Scorer
) -> None:
    async def run() -> None:
        engine.hold = asyncio.Event()
        task = asyncio.create_task(scorer.score(question([1]), engine.generate, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        scorer.known.forget()
        engine.hold.set()
        assert (await task).by_context == (-1.0,)

    asyncio.run(run())
    assert len(scorer.known) == 0


def test_a_row_has_no_more_than_the_engine_has_room_for(engine: Engine) -> None:
    scorer = Scorer(engine, LIMITS._replace(pool_tokens=40), lambda: 12)
    contexts = [[i] * 5 for i in range(1, 7)]
    found = asyncio.run(scorer.score(question(*contexts), engine.generate, None))
    assert found.by_context == tuple(-5.0 * i for i in range(1, 7))
    assert len(engine.asked) > 1
    assert all(len(obj.input_ids) <= 40 - 8 - 12 for obj in engine.asked)


def test_aborting_a_request_aborts_what_is_scored_for_it(engine: Engine, scorer: Scorer) -> None:
    async def run() -> None:
        engine.hold = asyncio.Event()
        engine.finish_reason = {"type": "abort"}
        task = asyncio.create_task(scorer.score(question([1], rid="mine"), engine.generate, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        scorer.abort("other", engine.abort_request)
        assert engine.aborted == []
        scorer.abort("mine", engine.abort_request)
        assert engine.aborted == [engine.asked[0].rid]
        engine.hold.set()
        with pytest.raises(ApeRequestError, match="aborted"):
            await task
        scorer.abort("mine", engine.abort_request)
        assert len(engine.aborted) == 1, "nothing is left of it"

    asyncio.run(run())
    assert len(scorer.known) == 0


def test_a_client_that_goes_away_leaves_no_scoring_behind(engine: Engine) -> None:
    scorer = Scorer(engine, LIMITS._replace(pool_tokens=20), lambda: 0)

    async def run() -> None:
        engine.hold = asyncio.Event()
        asked = question([1] * 3, [2] * 3, [3] * 3)
        task = asyncio.create_task(scorer.score(asked, engine.generate, None))
        while len(engine.asked) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.ended == 3, "SGLang aborts a request whose generator is closed"

    asyncio.run(run())


def test_a_refused_row_ends_the_others(engine: Engine) -> None:
    scorer = Scorer(engine, LIMITS._replace(pool_tokens=20), lambda: 0)

    async def refuse(obj: Any, request: Any) -> AsyncIterator[Any]:
        if len(engine.asked) == 2:
            raise ValueError("no")
        async for answer in engine.generate(obj, request):
            yield answer

    async def run() -> None:
        engine.hold = asyncio.Event()
        with pytest.raises(ValueError, match="no"):
            await scorer.score(question([1] * 3, [2] * 3, [3] * 3), refuse, None)
        assert engine.ended == 2

    asyncio.run(run())


# ---------------------------------------------------------------- by attention


class Measures:
    """Stands for ``TokenizerManager`` and the channel: a score is minus a context's length."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.server_args = SimpleNamespace(log_requests=False)
        self.factor = -1.0
        self._specs: dict[str, ProbeSpec] = {}

    async def generate(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        self.asked.append(obj)
        spec = ApeSpec.from_custom_params(obj.sampling_params["custom_params"])
        assert isinstance(spec, ProbeSpec) and not obj.return_logprob
        self._specs[obj.rid] = spec
        yield {"meta_info": {"cached_tokens": 1, "finish_reason": {"type": "length"}}}

    async def take(self, rid: str) -> list[float]:
        return [self.factor * length for length in self._specs.pop(rid).context_lens]


@pytest.fixture
def measures() -> Measures:
    return Measures()


def by_attention(measures: Measures, limits: Limits = LIMITS, pinned: int = 0) -> Scorer:
    attention = Attention(ids([40]), measures.take, lambda *_: pinned)
    return Scorer(measures, limits, lambda: pinned, attention)


def test_attention_is_measured_in_one_row_for_all_contexts(measures: Measures) -> None:
    scorer = by_attention(measures)
    asked = question([1, 2], [5], [1, 1, 1])
    found = asyncio.run(scorer.score(asked, measures.generate, None))
    assert found.by_context == (-2.0, -1.0, -3.0)
    assert (found.scored_tokens, found.encoded_tokens) == (2 + 2, 1 + 6 - 1)
    again = asyncio.run(scorer.score(question([5], [1, 1, 1], [1, 2]), measures.generate, None))
    assert again.by_context == (-1.0, -3.0, -2.0), "known, whatever the order"
    assert (again.scored_tokens, len(measures.asked)) == (0, 1)


def test_attention_beside_other_contexts_is_measured_anew(measures: Measures) -> None:
    scorer = by_attention(measures)
    for contexts in ([1, 2], [5]), ([1, 2], [6]), ([1, 2],):
        found = asyncio.run(scorer.score(question(*contexts), measures.generate, None))
        assert found.scored_tokens > 0
    assert len(measures.asked) == 3


def test_contexts_that_cannot_be_measured_at_once_are_refused(measures: Measures) -> None:
    scorer = by_attention(measures, LIMITS._replace(pool_tokens=20))
    with pytest.raises(ApeRequestError, match=r"takes 17 tokens that are not pinned; .* for 12"):
        asyncio.run(scorer.score(question([1] * 6, [2] * 6), measures.generate, None))
    assert measures.asked == []


def test_pinned_contexts_need_no_room_of_their_own(measures: Measures) -> None:
    scorer = by_attention(measures, LIMITS._replace(pool_tokens=30), pinned=13)
    asyncio.run(scorer.score(question([1] * 6, [2] * 6), measures.generate, None))
    assert len(measures.asked[0].input_ids) == 17 > 30 - 8 - 13


def test_scores_that_are_no_numbers_are_an_error(measures: Measures) -> None:
    measures.factor = float("nan")
    scorer = by_attention(measures)
    with pytest.raises(RuntimeError, match="no numbers"):
        asyncio.run(scorer.score(question([1], [2]), measures.generate, None))
    assert len(scorer.known) == 0
