"""The controls of the quality benchmarks: they hold, and fail, where they should."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.client import Refused
from benchmarks.common.controls import (
    REFERENCE_CONTEXTS,
    REFERENCE_TOKENS,
    ControlError,
    check_alike,
    check_parallel,
    check_scored,
    check_scores,
)
from benchmarks.common.methods import LEAST_SOFT, Method, Rungs, body_of
from benchmarks.common.prompts import Encoder, Ids, Prompt
from benchmarks.common.reference import Reference, layout

PROMPT = Prompt([1, 2], ([3, 4, 5], [6], [7, 8]), [9, 10, 11])


def test_layout_is_the_formula_written_with_loops() -> None:
    length = PROMPT.tokens + 2  # two tokens of an answer
    part_of = [0, 0, 1, 1, 1, 2, 3, 3] + 5 * [4]  # P, three contexts, Q and the answer
    positions = [0, 1, 2, 3, 4, 2, 2, 3, 5, 6, 7, 8, 9]
    found, mask = layout(PROMPT, length, parallel=True)
    assert found.tolist() == positions
    for row in range(length):
        for column in range(length):
            alone = part_of[column] in (0, part_of[row]) or part_of[row] == 4
            assert mask[row, column] == (column <= row and alone), (row, column)


def test_layout_of_an_ordinary_sequence() -> None:
    positions, mask = layout(PROMPT, PROMPT.tokens, parallel=False)
    assert positions.tolist() == list(range(PROMPT.tokens))
    assert mask.tolist() == [[c <= r for c in range(PROMPT.tokens)] for r in range(PROMPT.tokens)]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(str(tiny_llama))


def test_reference_joins_one_context_as_a_sequence(reference: Reference) -> None:
    drawn = random.Random(0)
    ids = [drawn.randrange(4, 500) for _ in range(40)]
    one = Prompt(ids[:4], (ids[4:30],), ids[30:36])
    alike = [reference.logprobs(one, ids[36:], parallel) for parallel in (True, False)]
    assert alike[0] == pytest.approx(alike[1], abs=1e-4)
    two = one._replace(contexts=(ids[4:15], ids[15:30]))
    apart = reference.logprobs(two, ids[36:], parallel=True)
    other_order = two._replace(contexts=two.contexts[::-1])
    assert apart != pytest.approx(alike[0], abs=0.1)
    assert apart == pytest.approx(reference.logprobs(other_order, ids[36:], True), abs=1e-4)


##### Prompts


@pytest.mark.parametrize("chat", [False, True])
def test_every_method_asks_the_same_tokens(tiny_llama: Path, chat: bool) -> None:
    encoder = Encoder(str(tiny_llama), chat)
    texts = ["The keeper trims the lamp.\n", "Snow falls in winter.\n", "Tin melts.\n"]
    prompt = encoder.prompt("Answer shortly.\n", texts, "Question: who?\nAnswer:", "It rains.\n")
    assert list(prompt.contexts) == [encoder.prompt("x", [text], "y").contexts[0] for text in texts]

    def body(method: Method) -> dict[str, Any]:
        return body_of(method, prompt, (0, 2), Rungs(0.9, 0.8, soft=0.1, refine=2), {})

    sequence = body(Method.SEQUENTIAL)["input_ids"]
    assert len(sequence) == prompt.tokens
    warm = (Method.WARM, Method.WARM_SOFT)
    for method in Method:
        own = body(method)
        if "contexts" in own and method not in warm:
            joined = [token for context in own["contexts"] for token in context["input_ids"]]
            assert [*own["prefix_ids"], *joined, *own["input_ids"]] == sequence
    items = encoder.prompt("x", ["It rains.\n"], "y").contexts[0]
    for method in warm:
        assert body(method)["prefix_ids"] == [*prompt.prefix, *items]
        assert {**body(method), "ape": 0, "prefix_ids": 0} == {
            **body(Method.APE),
            "ape": 0,
            "prefix_ids": 0,
        }
    kept = [*prompt.contexts[0], *prompt.contexts[2]]
    assert body(Method.HALF)["input_ids"] == [*prompt.prefix, *kept, *prompt.query]
    assert body(Method.NONE)["input_ids"] == [*prompt.prefix, *prompt.query]
    assert len(body(Method.ONE_CONTEXT)["contexts"]) == 1

    def options(method: Method) -> tuple[float, ...]:
        ape = body(method)["ape"]
        return tuple(ape[name] for name in ("temperature", "scale", "soft", "refine"))

    for method in (Method.ONE_CONTEXT, Method.PARALLEL):
        assert options(method) == (1, 1, 0, 0)
    for method in (Method.APE, Method.WARM, Method.NO_SOFT):
        assert options(method) == (0.9, 0.8, 0, 0)
    assert options(Method.SOFT) == options(Method.WARM_SOFT) == (0.9, 0.8, 0.1, 0)
    assert options(Method.LEAST_SOFT) == (0.9, 0.8, LEAST_SOFT, 0)
    assert options(Method.REFINE) == (0.9, 0.8, 0, 2)
    assert options(Method.REFINE_ALL) == (0.9, 0.8, 0, 3)
    assert body_of(Method.APE, prompt, (), None, {})["ape"] == {}


##### One context


def texts(*given: str) -> list[dict[str, str]]:
    return [{"text": text} for text in given]


def check_one_context(sequential: Any, one_context: Any, again: Any) -> str:
    return check_alike(Method.SEQUENTIAL, sequential, Method.ONE_CONTEXT, one_context, again)


def never(method: Method, index: int) -> str:
    raise AssertionError("nothing has to be asked again")


def test_one_context_holds() -> None:
    assert check_one_context(texts("a", "b"), texts("a", "b"), never).startswith("2 of 2")
    refused = [Refused("too long"), *texts("b")]
    assert check_one_context(refused, refused, never).startswith("1 of 2")


def test_a_difference_that_goes_away_alone_is_none() -> None:
    seen = check_one_context(texts("a", "b"), texts("a", "c"), lambda method, index: "b")
    assert seen.startswith("2 of 2")


def test_one_context_fails() -> None:
    def again(method: Method, index: int) -> str:
        assert index == 1
        return method.value

    with pytest.raises(ControlError, match="question 1: one context"):
        check_one_context(texts("a", "b"), texts("a", "c"), again)
    with pytest.raises(ControlError, match="question 0: refused in one form only"):
        check_one_context(texts("a"), [Refused("too long")], never)


@pytest.mark.parametrize(
    ("known", "checked"),
    [
        (Method.SEQUENTIAL, Method.REFINE_ALL),
        (Method.APE, Method.LEAST_SOFT),
        (Method.APE, Method.NO_SOFT),
    ],
)
def test_rungs_that_must_change_nothing(known: Method, checked: Method) -> None:
    same = texts("a", "b")
    assert check_alike(known, same, checked, same, never).startswith("2 of 2")
    with pytest.raises(ControlError, match=r"question 1: (refine|soft) with"):
        check_alike(known, same, checked, texts("a", "c"), lambda method, index: method.value)


##### Scores


class ScoringServer:
    """Scores of -1, -2, … for the contexts of a request."""

    def __init__(self, error: float = 0.0, drops: int = 0, scorer: str = "likelihood") -> None:
        self.error = error
        self.drops = drops
        self.scorer = scorer

    def info(self) -> dict[str, Any]:
        return {"ape_scorer": self.scorer}

    def generate(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        assert bodies[0]["ape"]["soft"] == LEAST_SOFT
        count = len(bodies[0]["contexts"]) - self.drops
        scores = [{"id": f"ctx-{i}", "score": -1.0 - i + self.error} for i in range(count)]
        return [{"text": "", "meta_info": {"contexts": scores}}]


class QueryReference:
    """The true scores of :class:`ScoringServer`, in three tokens each."""

    def logprobs(self, prompt: Prompt, answer: Ids, parallel: bool) -> list[float]:
        assert (prompt.prefix, answer, prompt.query, parallel) == ([1, 2], [9, 10, 11], [], False)
        return 3 * [(-1.0 - [[3, 4, 5], [6], [7, 8]].index(prompt.contexts[0])) / 3]


def scores_seen(server: ScoringServer, dtype: str = "float32") -> str:
    given: Any = server
    reference: Any = QueryReference()
    return check_scores(given, reference, [PROMPT], dtype)


def test_scores_hold_within_rounding() -> None:
    assert scores_seen(ScoringServer()).startswith("3 scores within")
    assert scores_seen(ScoringServer(0.01), "bfloat16").startswith("3 scores within 0.01")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (ScoringServer(error=0.01), "not log P"),
        (ScoringServer(drops=1), "question 0: 2 scores for 3 contexts"),
    ],
)
def test_wrong_scores_fail(server: ScoringServer, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        scores_seen(server)


def test_other_scores_than_likelihoods_are_not_compared_with_these() -> None:
    server = ScoringServer(error=5.0, scorer="attention")
    assert scores_seen(server) == "not checked: the server scores by attention"


def test_one_context_needs_no_score() -> None:
    check_scored(
        [{"meta_info": {}}, Refused("too long")], [PROMPT._replace(contexts=([3],)), PROMPT]
    )


##### Parallel


class FakeReference:
    """Log-probabilities 0.1, 0.2, … of parallel encoding; others lie so far away."""

    def __init__(self, sequential: float) -> None:
        self.sequential = sequential
        self.prompts: list[Prompt] = []

    def logprobs(self, prompt: Prompt, answer: Ids, parallel: bool) -> list[float]:
        self.prompts.append(prompt)
        return [-0.1 * i - (0 if parallel else self.sequential) for i in range(len(answer))]


class FakeClient:
    """A server whose log-probabilities are off by a constant."""

    def __init__(self, error: float, refuses: bool = False) -> None:
        self.error = error
        self.refuses = refuses

    def generate(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        if self.refuses:
            return [Refused("no")]
        assert bodies[0]["ape"]["temperature"] == bodies[0]["ape"]["scale"] == 1.0
        tokens = [[-0.1 * i + self.error, 20 + i, None] for i in range(8)]
        return [{"text": "", "meta_info": {"output_token_logprobs": tokens}}]


def seen(client: FakeClient, sequential: float, dtype: str, prompt: Prompt = PROMPT) -> str:
    fake: Any = FakeReference(sequential)
    server: Any = client
    return check_parallel(server, fake, [prompt], dtype)


def test_parallel_holds_within_rounding() -> None:
    assert "1 answers within 0.001" in seen(FakeClient(0.001), 2.0, "float32")
    assert "within 0.1" in seen(FakeClient(0.1), 2.0, "bfloat16")


@pytest.mark.parametrize(
    ("error", "sequential", "dtype"),
    [
        (0.02, 2.0, "float32"),  # more than rounding
        (0.4, 9.0, "bfloat16"),
        (0.005, 0.02, "float32"),  # sequential encoding would have passed as well
    ],
)
def test_parallel_fails(error: float, sequential: float, dtype: str) -> None:
    with pytest.raises(ControlError, match="not plain parallel encoding"):
        seen(FakeClient(error), sequential, dtype)


def test_a_refused_prompt_is_no_control() -> None:
    with pytest.raises(ControlError, match="refused"):
        seen(FakeClient(0, refuses=True), 2.0, "float32")


def test_long_prompts_are_cut_for_the_reference() -> None:
    long = Prompt([1] * 100, tuple([5] * 400 for _ in range(20)), [9] * 50)
    fake: Any = FakeReference(2.0)
    server: Any = FakeClient(0.001)
    check_parallel(server, fake, [long], "float32")
    for prompt in fake.prompts:
        assert len(prompt.contexts) == REFERENCE_CONTEXTS
        assert prompt.tokens <= REFERENCE_TOKENS
