"""Controls that a quality benchmark runs on itself: some of its answers have known values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common.client import Answer, Client, Refused
from benchmarks.common.methods import LEAST_SOFT, Method, Rungs, body_of
from benchmarks.common.prompts import Prompt
from benchmarks.common.reference import Reference
from sglang_ape.arguments import ATTENTION

# Largest difference of a log-probability between the server and the fp32 reference, by the
# server's type of numbers.
TOLERANCE = {"float32": 0.01, "other": 0.3}
ANSWER_TOKENS = 8
REFERENCE_TOKENS = 1024  # of a prompt; the reference is dense
REFERENCE_CONTEXTS = 8
SCORE_TOLERANCE = {"float32": 1e-4, "other": 0.05}  # of a score, relative to it


class ControlError(Exception):
    """A row with a known value has another: what was measured cannot be trusted."""


_MEANING = {
    Method.SEQUENTIAL: "an ordinary prompt",
    Method.ONE_CONTEXT: "one context at T = S = 1",
    Method.APE: "APE",
    Method.REFINE_ALL: "refine with m = N",
    Method.LEAST_SOFT: "soft with a λ that moves nothing",
    Method.NO_SOFT: "soft with λ = 0",
}


def check_alike(
    known: Method,
    known_answers: Sequence[Answer | Refused],
    checked: Method,
    checked_answers: Sequence[Answer | Refused],
    again: Callable[[Method, int], str],
) -> str:
    """One method must answer every question as another one does.

    All text as one context at T = S = 1, and contexts that are all refined, are answered as the
    ordinary prompt; soft that moves nothing as APE.

    Args:
        known: the method whose answers are right.
        known_answers: of the questions.
        checked: the method that is checked.
        checked_answers: of the same questions.
        again: asks a question (by its index) anew by itself. On a GPU, what else is in a batch
            moves the numbers a little, and with them now and then a word.

    Returns:
        What was seen, for the table.

    Raises:
        ControlError: an answer differs.
    """
    compared = 0
    for i, pair in enumerate(zip(known_answers, checked_answers, strict=True)):
        refused = [isinstance(answer, Refused) for answer in pair]
        if any(refused):
            if not all(refused):
                raise ControlError(f"question {i}: refused in one form only: {pair}")
            continue
        compared += 1
        texts = [answer["text"] for answer in pair]
        if texts[0] != texts[1]:
            texts = [again(method, i) for method in (known, checked)]
        if texts[0] != texts[1]:
            raise ControlError(
                f"question {i}: {_MEANING[checked]} is answered {texts[1]!r}, the same text as "
                f"{_MEANING[known]} {texts[0]!r}"
            )
    return f"{compared} of {len(known_answers)} questions fit, all answered alike"


def check_scored(answers: Sequence[Answer | Refused], prompts: Sequence[Prompt]) -> None:
    """Each answer must bring a score for each of its contexts.

    Args:
        answers: of requests that have their contexts scored.
        prompts: their questions.

    Raises:
        ControlError: one does not.
    """
    for i, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        if not isinstance(answer, Refused) and len(prompt.contexts) > 1:
            found = len(answer["meta_info"].get("contexts", ()))
            if found != len(prompt.contexts):
                raise ControlError(
                    f"question {i}: {found} scores for {len(prompt.contexts)} contexts"
                )


def check_scores(
    client: Client, reference: Reference, prompts: Sequence[Prompt], dtype: str
) -> str:
    """The server's scores must be log P(Q | P, C), as the reference computes it.

    A server with ``--ape-scorer attention`` has other scores, which are not checked here.

    Args:
        client: of a server with APE.
        reference: of the same model.
        prompts: with two contexts or more.
        dtype: the server's type of numbers.

    Returns:
        What was seen, for the table.

    Raises:
        ControlError: a score is off by more than rounding.
    """
    if client.info().get("ape_scorer") == ATTENTION:
        return "not checked: the server scores by attention"
    largest, count = 0.0, 0
    sampling = {"temperature": 0, "max_new_tokens": 1}
    for prompt in map(_shortened, prompts):
        body = body_of(Method.SOFT, prompt, (), Rungs(1.0, 1.0, soft=LEAST_SOFT), sampling)
        answer = client.generate([body])[0]
        if isinstance(answer, Refused):
            raise ControlError(f"a shortened prompt was refused: {answer}")
        check_scored([answer], [prompt])
        scores = [one["score"] for one in answer["meta_info"]["contexts"]]
        for context, score in zip(prompt.contexts, scores, strict=True):
            alone = Prompt(prompt.prefix, (context,), [])
            true = sum(reference.logprobs(alone, prompt.query, parallel=False))
            largest, count = max(largest, abs(score - true) / max(abs(true), 1.0)), count + 1
    seen = f"{count} scores within {largest:.2g} of a dense fp32 computation, relatively"
    if largest > SCORE_TOLERANCE.get(dtype, SCORE_TOLERANCE["other"]):
        raise ControlError(f"scores are not log P(Q | P, C): {seen}")
    return seen


class Distance(NamedTuple):
    """Largest difference of a log-probability, in nats."""

    server: float  # between the server and the reference, contexts apart
    sequential: float  # between the reference's two ways to encode the contexts


def check_parallel(
    client: Client, reference: Reference, prompts: Sequence[Prompt], dtype: str
) -> str:
    """The server's T = S = 1 must be plain parallel encoding as the reference computes it.

    The server answers each prompt, cut to a few contexts; the reference scores the same tokens.
    The difference has to be rounding, and less than a fifth of what separates parallel from
    sequential encoding on these prompts: otherwise the control could not have told them apart.

    Args:
        client: of a server with APE.
        reference: of the same model.
        prompts: with two contexts or more.
        dtype: the server's type of numbers.

    Returns:
        What was seen, for the table.

    Raises:
        ControlError: the difference is larger.
    """
    distances = [_distance(client, reference, _shortened(prompt)) for prompt in prompts]
    server = max(distance.server for distance in distances)
    sequential = max(distance.sequential for distance in distances)
    tolerance = TOLERANCE.get(dtype, TOLERANCE["other"])
    seen = (
        f"log-probabilities of {len(prompts)} answers within {server:.2g} of a dense fp32 "
        f"computation; sequential encoding is {sequential:.2g} away"
    )
    if server > tolerance or server > sequential / 5:
        raise ControlError(f"T = S = 1 is not plain parallel encoding: {seen}")
    return seen


def _distance(client: Client, reference: Reference, prompt: Prompt) -> Distance:
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    body = body_of(Method.PARALLEL, prompt, (), Rungs(1.0, 1.0), sampling) | {
        "return_logprob": True
    }
    answer = client.generate([body])[0]
    if isinstance(answer, Refused):
        raise ControlError(f"a shortened prompt was refused: {answer}")
    served, tokens = _output(answer["meta_info"])
    parallel = reference.logprobs(prompt, tokens, parallel=True)
    sequential = reference.logprobs(prompt, tokens, parallel=False)
    return Distance(_largest(served, parallel), _largest(sequential, parallel))


def _output(meta: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    logprobs = meta["output_token_logprobs"]
    return [one[0] for one in logprobs], [one[1] for one in logprobs]


def _largest(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _shortened(prompt: Prompt) -> Prompt:
    """The prompt with the first few of its contexts, and of those as much as the reference takes.

    Two stay in any case: one context is no parallel encoding.
    """
    count = min(REFERENCE_CONTEXTS, len(prompt.contexts))
    room = (REFERENCE_TOKENS - len(prompt.prefix) - len(prompt.query)) // count
    cut = tuple(ids[: max(room, 8)] for ids in prompt.contexts[:count])
    return prompt._replace(contexts=cut)
