"""Served tokens and log-probabilities equal the oracle's in every scheduling situation."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from tests.support.deployments import DEPLOYMENTS, Deployment
from tests.support.oracle import Completion, Oracle
from tests.support.server import Server

NEW_TOKENS = 8

Ids = list[int]


class Bench:
    """A server, its oracle, and random material."""

    def __init__(self, deployment: Deployment, server: Server, oracle: Oracle) -> None:
        self.deployment = deployment
        self.server = server
        self.oracle = oracle
        self.rng = random.Random(0)

    def ids(self, length: int) -> Ids:
        return [self.rng.randrange(4, 512) for _ in range(length)]

    def texts(self, *lengths: int) -> list[Ids]:
        return [self.ids(length) for length in lengths]

    def check(
        self,
        prefix: Ids,
        contexts: Sequence[Ids],
        query: Ids,
        temperature: float = 0.9,
        scale: float = 0.9,
        new_tokens: int = NEW_TOKENS,
    ) -> dict[str, Any]:
        """Ask once, compare with the oracle, and return the answer's ``meta_info``."""
        return self.ask(prefix, contexts, query, temperature, scale, new_tokens)["meta_info"]

    def ask(
        self,
        prefix: Ids,
        contexts: Sequence[Ids],
        query: Ids,
        temperature: float = 0.9,
        scale: float = 0.9,
        new_tokens: int = NEW_TOKENS,
    ) -> dict[str, Any]:
        """Ask once, compare with the oracle, and return the answer."""
        body = request_body(prefix, contexts, query, temperature, scale, new_tokens)
        expected = self.oracle.generate(prefix, contexts, query, new_tokens, temperature, scale)
        answer = self.server.generate(body)
        self.assert_equal(answer, expected)
        self.server.assert_clean()
        return answer

    def assert_equal(self, answer: dict[str, Any], expected: Completion) -> None:
        assert_equal(answer, expected, self.deployment.tolerance, self.deployment.loses_logprobs)


def request_body(
    prefix: Ids, contexts: Sequence[Ids], query: Ids, t: float, s: float, new_tokens: int
) -> dict[str, Any]:
    return {
        "prefix_ids": prefix,
        "contexts": [{"input_ids": context} for context in contexts],
        "input_ids": query,
        "ape": {"temperature": t, "scale": s},
        **_sampling(new_tokens),
    }


def _plain_body(ids: Ids, new_tokens: int) -> dict[str, Any]:
    return {"input_ids": ids, **_sampling(new_tokens)}


def _sampling(new_tokens: int) -> dict[str, Any]:
    greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"sampling_params": greedy, "return_logprob": True}


def assert_equal(
    answer: dict[str, Any], expected: Completion, tolerance: float, may_lose_logprobs: bool = False
) -> None:
    """Equal tokens, and log-probabilities within ``tolerance``.

    A token that the oracle finds as good as its own within the tolerance is right too; behind it
    the two texts part, and nothing more is compared.
    """
    served = answer["output_ids"]
    agreed = _leading_equal(served, expected.token_ids)
    if agreed < len(expected.token_ids):
        logprobs = expected.logits[agreed].log_softmax(-1)
        gap = expected.logprobs[agreed] - logprobs[served[agreed]].item()
        assert gap <= tolerance, f"token {agreed} is {served[agreed]}, {gap} less likely"
        assert len(served) == len(expected.token_ids)
    rows = answer["meta_info"]["output_token_logprobs"]
    assert len(rows) == len(served) or may_lose_logprobs
    remaining = iter(zip(expected.token_ids, expected.logprobs, strict=True))
    for logprob, token, *_ in rows[: agreed - (len(served) - len(rows))]:
        assert any(
            token == wanted and abs(logprob - best) <= tolerance for wanted, best in remaining
        ), f"log-probability {logprob} of token {token} is not the oracle's"


def _leading_equal(one: Ids, other: Ids) -> int:
    """How many tokens the two begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


@pytest.fixture(scope="module", params=DEPLOYMENTS, ids=lambda deployment: deployment.name)
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    deployment = request.param
    model = request.getfixturevalue(deployment.model)
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(model, deployment.all_flags, log, deployment.env) as server:
        yield Bench(deployment, server, Oracle(model))


def test_cold_then_warm_then_permuted_give_the_same_answer(bench: Bench) -> None:
    prefix, query = bench.ids(5), bench.ids(6)
    contexts = bench.texts(7, 40, 3, 19)
    total = 5 + 69 + 6
    cold = bench.check(prefix, contexts, query)
    assert (cold["prompt_tokens"], cold["cached_tokens"]) == (total, 0)
    warm = bench.check(prefix, contexts, query)
    permuted = bench.check(prefix, [contexts[i] for i in (2, 0, 3, 1)], query)
    if bench.deployment.caches:
        assert warm["cached_tokens"] == permuted["cached_tokens"] == total - 1


def test_a_subset_and_a_superset_reuse_what_is_cached(bench: Bench) -> None:
    prefix, contexts = bench.ids(8), bench.texts(21, 33, 12, 5)
    bench.check(prefix, contexts, bench.ids(9))
    subset = bench.check(prefix, [contexts[3], contexts[1]], bench.ids(9))
    superset = bench.check(prefix, [bench.ids(14), *contexts[::-1]], bench.ids(9))
    if bench.deployment.caches:
        assert subset["cached_tokens"] == 8 + 5 + 33
        assert superset["cached_tokens"] == 8 + 21 + 33 + 12 + 5


def test_equal_contexts_count_as_often_as_they_are_given(bench: Bench) -> None:
    prefix, query, twin, other = bench.texts(4, 6, 18, 11)
    bench.check(prefix, [twin, other, twin, twin], query)
    bench.check(prefix, [twin, twin], query)


def test_one_context(bench: Bench) -> None:
    bench.check(bench.ids(5), bench.texts(23), bench.ids(7), temperature=0.4, scale=0.6)


def test_one_context_at_unit_temperature_and_scale_is_the_plain_request(bench: Bench) -> None:
    prefix, context, query = bench.texts(6, 25, 8)
    answer = bench.server.generate(request_body(prefix, [context], query, 1, 1, NEW_TOKENS))
    plain = bench.server.generate(_plain_body(prefix + context + query, NEW_TOKENS))
    expected = bench.oracle.generate_plain(prefix + context + query, NEW_TOKENS)
    bench.assert_equal(answer, expected)
    bench.assert_equal(plain, expected)
    # T = 1 + 1e-9 takes the two-pass attention to the same result.
    bench.check(prefix, [context], query, temperature=1 + 1e-9, scale=1)


def test_hundreds_of_contexts_beyond_the_window(bench: Bench) -> None:
    count = 300 if bench.deployment.pool_tokens > 4000 else 60
    bench.check(bench.ids(6), bench.texts(*[12] * count), bench.ids(10))


def test_contexts_of_one_token(bench: Bench) -> None:
    bench.check(bench.ids(3), bench.texts(1, 1, 1, 9, 1), bench.ids(2))


def test_no_prefix_at_all(bench: Bench) -> None:
    bench.check([], bench.texts(9, 17), bench.ids(5))


def test_a_query_of_one_token(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(5), bench.texts(9, 17), bench.ids(1)
    for _ in range(2):
        bench.check(prefix, contexts, query)


def test_temperature_and_scale_at_their_bounds(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(5), bench.texts(9, 17), bench.ids(6)
    for temperature, scale in ((0.05, 1.0), (10.0, 1.0), (0.7, 0.0), (1.0, 3.0)):
        bench.check(prefix, contexts, query, temperature, scale)


def test_different_temperatures_and_scales_in_one_batch(bench: Bench) -> None:
    settings = [(0.9, 0.9), (0.2, 0.8), (1.0, 1.0), (2.0, 0.5)]
    prefix, contexts, query = bench.ids(5), bench.texts(31, 8, 16), bench.ids(6)
    body = {
        "prefix_ids": prefix,
        "contexts": [[{"input_ids": ids} for ids in contexts]] * len(settings),
        "input_ids": [query] * len(settings),
        "ape": [{"temperature": t, "scale": s} for t, s in settings],
        **_sampling(NEW_TOKENS),
    }
    for answer, (t, s) in zip(bench.server.generate(body), settings, strict=True):
        bench.assert_equal(answer, bench.oracle.generate(prefix, contexts, query, NEW_TOKENS, t, s))
    bench.server.assert_clean()


def test_a_second_turn_over_the_same_contexts_finds_the_first(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(5), bench.texts(31, 8), bench.ids(6)
    first = bench.ask(prefix, contexts, query)["output_ids"]
    turn = bench.check(prefix, contexts[::-1], query + first + bench.ids(4))
    if bench.deployment.caches:
        # The last new token was never fed back, unless the overlapped step after it has begun.
        assert turn["cached_tokens"] - (5 + 39 + 6 + NEW_TOKENS) in (-1, 0)


def test_plain_requests_and_contexts_share_kv_in_both_directions(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(10), bench.texts(40, 30), bench.ids(5)
    bench.check(prefix, contexts, query)
    plain = prefix + contexts[1] + bench.ids(6)
    answer = bench.server.generate(_plain_body(plain, NEW_TOKENS))
    bench.assert_equal(answer, bench.oracle.generate_plain(plain, NEW_TOKENS))

    prefix, contexts = bench.ids(10), bench.texts(40, 30)
    plain = prefix + contexts[0]
    bench.server.generate(_plain_body(plain, NEW_TOKENS))
    meta = bench.check(prefix, contexts, query)
    if bench.deployment.caches:
        assert answer["meta_info"]["cached_tokens"] == 10 + 30
        assert meta["cached_tokens"] == 10 + 40


def test_every_context_once_seen_is_never_computed_again(bench: Bench) -> None:
    if not bench.deployment.caches:
        pytest.skip("the radix cache is off")
    prefix, documents = bench.ids(12), bench.texts(30, 41, 22, 35)
    bench.check(prefix, documents, bench.ids(5))
    for _ in range(8):
        contexts = bench.rng.sample(documents, 3)
        meta = bench.check(prefix, contexts, bench.ids(5))
        assert meta["cached_tokens"] == 12 + sum(map(len, contexts))


def test_prompt_logprobs_of_the_query_are_those_of_the_oracle(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(5), bench.texts(31, 8), bench.ids(9)
    start = 5 + 39
    expected = bench.oracle.query_logprobs(prefix, contexts, query, 0.9, 0.9)
    for _ in range(2):
        body = request_body(prefix, contexts, query, 0.9, 0.9, 1) | {"logprob_start_len": start}
        rows = bench.server.generate(body)["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in rows] == query
        served = [logprob for logprob, *_ in rows[1:]]
        worst = max(abs(a - b) for a, b in zip(served, expected, strict=True))
        assert worst <= bench.deployment.tolerance


def _register(bench: Bench, prefix: Ids, contexts: list[Ids], pin: bool) -> list[str]:
    body = {"prefix_ids": prefix, "contexts": [{"input_ids": ids} for ids in contexts], "pin": pin}
    response = bench.server.post("/ape/contexts", body)
    assert response.status_code == 200, response.text
    return [context["id"] for context in response.json()["contexts"]]


def _check_by_id(bench: Bench, ids: list[str], query: Ids, expected: Completion) -> dict[str, Any]:
    body = request_body([], [], query, 0.9, 0.9, NEW_TOKENS) | {
        "contexts": [{"id": id} for id in ids]
    }
    del body["prefix_ids"]  # it comes with the ids
    answer = bench.server.generate(body)
    bench.assert_equal(answer, expected)
    return answer["meta_info"]


def test_contexts_known_by_id_give_the_same_answer_cached_or_not(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(7), bench.texts(31, 1, 44), bench.ids(5)
    expected = bench.oracle.generate(prefix, contexts, query, NEW_TOKENS, 0.9, 0.9)
    ids = _register(bench, prefix, contexts, pin=False)
    registered = _check_by_id(bench, ids, query, expected)
    bench.server.flush()
    _check_by_id(bench, ids, query, expected)
    if bench.deployment.caches:
        assert registered["ape"]["cached_context_tokens"] == 76
        listed = bench.server.client.get(f"/ape/contexts/{ids[2]}").json()
        assert listed["cached_tokens"] == 44


def test_pinned_contexts_are_never_computed_again_until_they_are_deleted(bench: Bench) -> None:
    if not bench.deployment.caches:
        pytest.skip("the radix cache is off")
    prefix, contexts, query = bench.ids(7), bench.texts(60, 80), bench.ids(5)
    expected = bench.oracle.generate(prefix, contexts, query, NEW_TOKENS, 0.9, 0.9)
    ids = _register(bench, prefix, contexts, pin=True)
    fillers = [_plain_body(bench.ids(600), 4) for _ in range(bench.deployment.pool_tokens // 500)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bench.server.generate, fillers))
    meta = _check_by_id(bench, ids, query, expected)
    assert meta["ape"]["cached_context_tokens"] == 140
    for id in ids:
        assert bench.server.client.delete(f"/ape/contexts/{id}").status_code == 200
    bench.server.assert_clean()


def test_a_crowd_of_apes_and_plain_requests_all_get_their_own_answer(bench: Bench) -> None:
    prefix, documents = bench.ids(9), bench.texts(60, 45, 80, 30, 52, 71, 24, 38)
    jobs = []
    for i in range(24):
        query, new_tokens = bench.ids(bench.rng.randint(1, 12)), bench.rng.randint(4, 16)
        if i % 4 == 3:
            plain = prefix + bench.rng.choice(documents) + query
            expected = bench.oracle.generate_plain(plain, new_tokens)
            jobs.append((_plain_body(plain, new_tokens), expected))
            continue
        chosen = bench.rng.choices(documents, k=bench.rng.randint(1, 5))
        t, s = bench.rng.choice([(0.9, 0.9), (0.5, 1.0), (1.5, 0.7)])
        expected = bench.oracle.generate(prefix, chosen, query, new_tokens, t, s)
        jobs.append((request_body(prefix, chosen, query, t, s, new_tokens), expected))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(bench.server.generate, [body for body, _ in jobs]))
    for answer, (_, expected) in zip(answers, jobs, strict=True):
        bench.assert_equal(answer, expected)
    bench.server.flush()


def test_prompt_logprobs_in_a_crowd_are_those_of_the_own_prompt(bench: Bench) -> None:
    prompts = bench.texts(*(bench.rng.randint(12, 60) for _ in range(48)))
    bodies = [
        _plain_body(ids, bench.rng.randint(2, 12)) | {"logprob_start_len": 0} for ids in prompts
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(bench.server.generate, bodies))
    for ids, answer in zip(prompts, answers, strict=True):
        served = [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
        expected = bench.oracle.query_logprobs([], [], ids)
        assert served == pytest.approx(expected, abs=bench.deployment.tolerance)


# ---------------------------------------------------------------- soft and refine


class Rung(NamedTuple):
    """A request with ``soft`` or ``refine``, and what it was made of."""

    prefix: Ids
    contexts: list[Ids]
    query: Ids
    ape: dict[str, Any]
    new_tokens: int = NEW_TOKENS

    @property
    def body(self) -> dict[str, Any]:
        body = request_body(self.prefix, self.contexts, self.query, 0.9, 0.9, self.new_tokens)
        return {**body, "ape": self.ape}


def _assert_rung(bench: Bench, rung: Rung, answer: dict[str, Any]) -> list[float]:
    """Scores and answer are the oracle's; returns the scores as they were told.

    What follows from scores is computed from those that were told: in half precision they differ
    from the oracle's, within the tolerance for each token.
    """
    prefix, contexts, query, ape, new_tokens = rung
    told = [one["score"] for one in answer["meta_info"]["contexts"]]
    if bench.deployment.by_attention:
        expected = bench.oracle.attention_scores(prefix, contexts, query, bench.oracle.null(query))
        tolerance = bench.deployment.attention_tolerance
    else:
        expected = [bench.oracle.likelihood(prefix, context, query) for context in contexts]
        tolerance = bench.deployment.tolerance * max(1.0, len(query) ** 0.5)
    assert told == pytest.approx(expected, abs=tolerance)
    if ape.get("refine"):
        best = sorted(sorted(range(len(told)), key=lambda i: -told[i])[: ape["refine"]])
        row = prefix + [token for i in best for token in contexts[i]] + query
        bench.assert_equal(answer, bench.oracle.generate_plain(row, new_tokens))
        return told
    t, s = ape.get("temperature", 0.9), ape.get("scale", 0.9)
    bias = [ape["soft"] * (score - max(told)) for score in told]
    completion = bench.oracle.generate(prefix, contexts, query, new_tokens, t, s, bias)
    bench.assert_equal(answer, completion)
    return told


@pytest.mark.parametrize("soft", [0.02, 0.1, 3.0])
def test_soft_answers_are_those_of_the_oracle(bench: Bench, soft: float) -> None:
    ape = {"temperature": 0.8, "scale": 0.9, "soft": soft}
    rung = Rung(bench.ids(7), bench.texts(31, 1, 44, 20), bench.ids(9), ape)
    first = bench.server.generate(rung.body)
    told = _assert_rung(bench, rung, first)
    assert first["meta_info"]["cached_tokens"] == 0
    copies = 9 + len(bench.oracle.null(rung.query)) if bench.deployment.by_attention else 4 * 10
    assert first["meta_info"]["ape"]["scored_tokens"] == copies
    bench.server.assert_clean()

    # Known scores cost nothing, and the order of contexts changes nothing.
    again = bench.server.generate(rung._replace(contexts=rung.contexts[::-1]).body)
    assert [one["score"] for one in again["meta_info"]["contexts"]] == told[::-1]
    assert again["meta_info"]["ape"]["scored_tokens"] == 0
    _assert_rung(bench, rung._replace(contexts=rung.contexts[::-1]), again)
    if bench.deployment.caches:
        assert again["meta_info"]["cached_tokens"] == 7 + 96 + 9 - 1


def test_soft_of_zero_is_no_soft(bench: Bench) -> None:
    rung = Rung(bench.ids(7), bench.texts(31, 12), bench.ids(5), {"soft": 0.0})
    plain = bench.server.generate(rung._replace(ape={}).body)
    answer = bench.server.generate(rung.body)
    assert answer["output_ids"] == plain["output_ids"]
    assert "contexts" not in answer["meta_info"]
    assert answer["meta_info"]["ape"]["scored_tokens"] == 0


@pytest.mark.parametrize("count", [1, 2])
def test_refined_answers_are_those_of_the_sequence_of_the_likeliest(
    bench: Bench, count: int
) -> None:
    rung = Rung(bench.ids(7), bench.texts(31, 14, 44, 20), bench.ids(9), {"refine": count})
    _assert_rung(bench, rung, bench.server.generate(rung.body))
    bench.server.assert_clean()
    again = bench.server.generate(rung.body)
    _assert_rung(bench, rung, again)
    usage = again["meta_info"]["ape"]
    assert (usage["contexts"], usage["scored_tokens"]) == (count, 0)
    if bench.deployment.caches:
        assert usage["refined_tokens"] == 0, "the sequence is cached like any prompt"


def test_refining_all_contexts_is_one_sequential_request(bench: Bench) -> None:
    rung = Rung(bench.ids(7), bench.texts(31, 14, 20), bench.ids(9), {"refine": 3})
    row = rung.prefix + [token for own in rung.contexts for token in own] + rung.query
    expected = bench.oracle.generate_plain(row, NEW_TOKENS)
    answer = bench.server.generate(rung.body)
    bench.assert_equal(answer, expected)
    plain = bench.server.generate(_plain_body(row, NEW_TOKENS))
    assert plain["output_ids"] == answer["output_ids"]
    assert "contexts" not in answer["meta_info"], "nothing had to be scored"


def test_a_crowd_on_all_rungs_gets_its_own_answers(bench: Bench) -> None:
    prefix, documents = bench.ids(9), bench.texts(60, 45, 80, 30, 52, 24)
    rungs: list[Any] = []
    for i in range(20):
        query, new_tokens = bench.ids(bench.rng.randint(2, 12)), bench.rng.randint(4, 12)
        chosen = bench.rng.sample(documents, bench.rng.randint(2, 5))
        apes: list[dict[str, Any]] = [{"soft": 0.1}, {"refine": 1}, {"soft": 1.0}, {}]
        rungs.append(Rung(prefix, chosen, query, apes[i % 4], new_tokens))
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(bench.server.generate, [rung.body for rung in rungs]))
    for rung, answer in zip(rungs, answers, strict=True):
        if rung.ape:
            _assert_rung(bench, rung, answer)
            continue
        given = rung.prefix, rung.contexts, rung.query, rung.new_tokens
        bench.assert_equal(answer, bench.oracle.generate(*given, 0.9, 0.9))
    bench.server.flush()


def test_a_batch_of_rungs_gets_one_answer_each(bench: Bench) -> None:
    prefix, contexts, query = bench.ids(6), bench.texts(30, 22, 15), bench.ids(5)
    apes: list[dict[str, Any]] = [{"soft": 0.2}, {}, {"refine": 2}]
    rungs = [Rung(prefix, contexts, query, ape) for ape in apes]
    body = {**rungs[0].body, "contexts": [rungs[0].body["contexts"]] * 3}
    answers = bench.server.generate({**body, "input_ids": [query] * 3, "ape": apes})
    _assert_rung(bench, rungs[0], answers[0])
    _assert_rung(bench, rungs[2], answers[2])
    expected = bench.oracle.generate(prefix, contexts, query, NEW_TOKENS, 0.9, 0.9)
    bench.assert_equal(answers[1], expected)
    bench.server.assert_clean()
