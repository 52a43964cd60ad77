"""Controls that a quality benchmark runs on itself: two rows of its table have known values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common.client import Answer, Client, Refused
from benchmarks.common.methods import Method, body_of
from benchmarks.common.prompts import Prompt
from benchmarks.common.reference import Reference

# Largest difference of a log-probability between the server and the fp32 reference, by the
# server's type of numbers.
TOLERANCE = {"float32": 0.01, "other": 0.3}
ANSWER_TOKENS = 8
REFERENCE_TOKENS = 1024  # of a prompt; the reference is dense
REFERENCE_CONTEXTS = 8


class ControlError(Exception):
    """A row with a known value has another: what was measured cannot be trusted."""


def check_one_context(
    sequential: Sequence[Answer | Refused],
    one_context: Sequence[Answer | Refused],
    again: Callable[[Method, int], str],
) -> str:
    """All text as one context at T = S = 1 must be answered as the ordinary prompt is.

    Args:
        sequential: answers to the ordinary prompts.
        one_context: answers to the same text as one context.
        again: asks a question (by its index) anew by itself. On a GPU, what else is in a batch
            moves the numbers a little, and with them now and then a word.

    Returns:
        What was seen, for the table.

    Raises:
        ControlError: an answer differs.
    """
    compared = 0
    for i, pair in enumerate(zip(sequential, one_context, strict=True)):
        refused = [isinstance(answer, Refused) for answer in pair]
        if any(refused):
            if not all(refused):
                raise ControlError(f"question {i}: refused in one form only: {pair}")
            continue
        compared += 1
        texts = [answer["text"] for answer in pair]
        if texts[0] != texts[1]:
            texts = [again(method, i) for method in (Method.SEQUENTIAL, Method.ONE_CONTEXT)]
        if texts[0] != texts[1]:
            raise ControlError(
                f"question {i}: one context at T = S = 1 is answered {texts[1]!r}, the same text "
                f"as an ordinary prompt {texts[0]!r}"
            )
    return f"{compared} of {len(sequential)} questions fit, all answered alike"


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
    body = body_of(Method.PARALLEL, prompt, (), {}, sampling) | {"return_logprob": True}
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
