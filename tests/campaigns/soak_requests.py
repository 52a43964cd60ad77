"""Requests of the soak, drawn at random, and the check of their answers."""

import random
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from tests.campaigns.soak_jobs import (
    FAINT_SCORE,
    MAX_NEW_TOKENS,
    SCORE_TOLERANCE,
    TENANTS,
    Corpus,
    Ids,
    Job,
    Place,
    Tenant,
)

Body = dict[str, Any]


class Kind(StrEnum):
    """A route, and how it is asked to answer."""

    GENERATE = "/generate"
    STREAM = "/generate, stream"
    SAMPLES = "/generate, n > 1"
    BATCH = "/generate, batch"
    COMPLETIONS = "/v1/completions"
    COMPLETIONS_STREAM = "/v1/completions, stream"

    @property
    def streams(self) -> bool:
        return self in (Kind.STREAM, Kind.COMPLETIONS_STREAM)

    @property
    def native(self) -> bool:
        return self.value.startswith("/generate")

    @property
    def path(self) -> str:
        return self.value.partition(",")[0]


class Fate(StrEnum):
    """What the client does; all but the first end a request before its time."""

    WAIT = "waits for the answer"
    ABORT = "POST /abort_request"
    HALF_BODY = "disconnects within the body"
    WHOLE_BODY = "disconnects after the body"
    NO_ANSWER = "disconnects before the answer"
    FIRST_EVENT = "disconnects at the first event"
    MID_STREAM = "disconnects in the stream"


_OF_ALL = {Fate.WAIT: 66, Fate.ABORT: 12, Fate.HALF_BODY: 3, Fate.WHOLE_BODY: 4}
_OF_WHOLE_ANSWERS = {**_OF_ALL, Fate.NO_ANSWER: 12}
_OF_STREAMS = {**_OF_ALL, Fate.FIRST_EVENT: 6, Fate.MID_STREAM: 8}
_KINDS = {
    Kind.GENERATE: 40,
    Kind.STREAM: 20,
    Kind.SAMPLES: 6,
    Kind.BATCH: 8,
    Kind.COMPLETIONS: 14,
    Kind.COMPLETIONS_STREAM: 12,
}


class Ask(NamedTuple):
    """One request."""

    number: int
    kind: Kind
    jobs: tuple[Job, ...]
    orders: tuple[tuple[int, ...], ...]  # of each job's documents, by index
    samples: int  # answers to each job
    new_tokens: int
    body: Body
    places: frozenset[Place]  # of contexts that it gives by id
    fate: Fate
    delay: float  # seconds until it is aborted or the client disconnects
    events: int  # that the client reads before it disconnects

    @property
    def sort(self) -> str:
        if not self.jobs[0].documents:
            return "plain"
        if any(job.rung for job in self.jobs):
            return "soft or refine, some by id" if self.places else "soft or refine"
        return "contexts, some by id" if self.places else "contexts"

    def needed_tokens(self, corpus: Corpus) -> int:
        """What the largest of its jobs may come to hold."""
        return max(job.needed_tokens(corpus, self.new_tokens) for job in self.jobs)


class Answer(NamedTuple):
    """One sequence of tokens, from any route."""

    tokens: Ids
    finish: str | None
    logprobs: list[tuple[float, int]]  # with the tokens; those that came, if asked for
    scores: list[float] | None  # of its contexts; None if that is not told


class Draw:
    """Draws requests; equal arguments draw equal ones.

    Args:
        ids: of registered contexts, by place.
    """

    def __init__(
        self, corpus: Corpus, jobs: Sequence[Job], ids: Mapping[Place, str], seed: str
    ) -> None:
        self._corpus = corpus
        self._jobs = jobs
        self._ids = ids
        self._seed = seed

    def ask(self, number: int) -> Ask:
        rng = random.Random(f"{self._seed} {number}")
        kind = _weighted(rng, _KINDS)
        fate = _weighted(rng, _OF_STREAMS if kind.streams else _OF_WHOLE_ANSWERS)
        first = rng.choice(self._jobs)
        jobs = [first]
        if kind is Kind.BATCH:
            alike = [job for job in self._jobs if bool(job.documents) == bool(first.documents)]
            jobs += rng.choices(alike, k=rng.randint(1, 2))
        samples = rng.randint(2, 3) if kind is Kind.SAMPLES else 1
        # What is ended early should still run when its end comes.
        new_tokens = rng.randint(3, 10) if fate is Fate.WAIT else rng.randint(10, MAX_NEW_TOKENS)
        if any(len(job.documents) > 10 or len(job.query) > 600 for job in jobs):
            new_tokens = min(new_tokens, 10)
        tenants = _tenants(rng, len(jobs))
        places: set[Place] = set()
        orders = [_order(job, rng) for job in jobs]
        prompts = _prompts(self._corpus, jobs, orders, tenants, rng, self._ids, places)
        rid = f"{self._seed}-{number:06d}"
        body = _native(kind, jobs, prompts, samples, new_tokens, rid, rng)
        if not kind.native:
            body = _completions(kind, prompts[0], new_tokens, rid)
        delay = rng.choice((0.0, 0.02, 0.1, 0.3, 1.0)) * rng.random()
        events = 1 if fate is Fate.FIRST_EVENT else rng.randint(2, 8)
        return Ask(
            number,
            kind,
            tuple(jobs),
            tuple(orders),
            samples,
            new_tokens,
            body,
            frozenset(places),
            fate,
            delay,
            events,
        )


def _tenants(rng: random.Random, count: int) -> list[Tenant]:
    """Whose the jobs of one request are. SGLang takes no list of keys with a null in it."""
    if rng.random() < 0.5:
        return [rng.choice(TENANTS)] * count
    return rng.choices([tenant for tenant in TENANTS if tenant is not None], k=count)


def _order(job: Job, rng: random.Random) -> tuple[int, ...]:
    """Of its documents: any at all, where that has no effect."""
    numbers = range(len(job.documents))
    return tuple(numbers if job.is_ordered else rng.sample(numbers, k=len(numbers)))


def _prompts(
    corpus: Corpus,
    jobs: Sequence[Job],
    orders: Sequence[Sequence[int]],
    tenants: Sequence[Tenant],
    rng: random.Random,
    ids: Mapping[Place, str],
    places: set[Place],
) -> list[Body]:
    """The fields that make the prompts; what is given by id is added to ``places``."""
    by_id = rng.random() < 0.35
    without_prefix = by_id and len(jobs) == 1 and rng.random() < 0.5
    prompts: list[Body] = []
    for job, order, tenant in zip(jobs, orders, tenants, strict=True):
        own = {} if tenant is None else {"extra_key": tenant}
        if not job.documents:
            prompts.append({"input_ids": job.query, **own})
            continue
        contexts: list[Body] = []
        for place in (job.places(tenant)[i] for i in order):
            if by_id and (without_prefix or rng.random() < 0.5):
                contexts.append({"id": ids[place]})
                places.add(place)
            else:
                contexts.append({"input_ids": corpus.documents[place.document]})
        prompt = {
            **own,
            "input_ids": job.query,
            "contexts": contexts,
            "prefix_ids": corpus.prefixes[job.prefix],
            "ape": {"temperature": job.temperature, "scale": job.scale, **job.rung},
        }
        if without_prefix:
            del prompt["prefix_ids"]  # it comes with the ids
        prompts.append(prompt)
    return prompts


def _native(
    kind: Kind,
    jobs: Sequence[Job],
    prompts: Sequence[Body],
    samples: int,
    new_tokens: int,
    rid: str,
    rng: random.Random,
) -> Body:
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body: Body = {"sampling_params": params, "rid": rid, **prompts[0]}
    if samples > 1:
        params["n"] = samples
    if len(jobs) > 1:
        body |= {name: [prompt[name] for prompt in prompts] for name in prompts[0]}
        body["rid"] = [f"{rid}-{i}" for i in range(len(jobs))]
    if kind.streams:
        body["stream"] = True
    elif rng.random() < 0.5:
        body["return_logprob"] = True
    return body


def _completions(kind: Kind, prompt: Body, new_tokens: int, rid: str) -> Body:
    rest = {name: value for name, value in prompt.items() if name != "input_ids"}
    return {
        "model": "tiny",
        "prompt": prompt["input_ids"],
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": kind.streams,
        "rid": rid,
        **rest,
    }


def answers_of(ask: Ask, reply: Any) -> list[Answer]:
    """The answers in a JSON body."""
    if not ask.kind.native:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        scores = _scores(reply["usage"])
        return [Answer(one["token_ids"], one["finish_reason"], [], scores) for one in choices]
    return [
        Answer(
            one["output_ids"],
            one["meta_info"]["finish_reason"]["type"],
            [(row[0], row[1]) for row in one["meta_info"].get("output_token_logprobs", ())],
            _scores(one["meta_info"]),
        )
        for one in (reply if isinstance(reply, list) else [reply])
    ]


def answer_of_stream(ask: Ask, events: Sequence[Any]) -> Answer:
    """What the events of a stream come to; the finish is None if it has not ended."""
    if ask.kind.native:
        tokens: Ids = []
        finish, scores = None, None
        for event in events:
            scores = _scores(event["meta_info"])
            finish = (event["meta_info"]["finish_reason"] or {}).get("type")
            # SGLang's event of a request aborted in the queue repeats one token alone.
            tokens = tokens if finish == "abort" else event["output_ids"]
        return Answer(tokens, finish, [], scores)
    choices = [choice for event in events for choice in event["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids") or ()]
    finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return Answer(tokens, finishes[-1] if finishes else None, [], None)


def _scores(told: Mapping[str, Any]) -> list[float]:
    return [one["score"] for one in told.get("contexts", ())]


def faults_in(
    ask: Ask, answers: Sequence[Answer], partial: bool = False, may_abort: bool = False
) -> Iterator[str]:
    """How answers differ from the oracle's, or partial and aborted ones from its beginning.

    Args:
        ask: what was asked.
        answers: to it.
        partial: whether the client left before their end.
        may_abort: whether the server has a reason of its own to end the request.
    """
    may_abort = may_abort or ask.fate is Fate.ABORT
    if len(answers) != len(ask.jobs) * ask.samples:
        yield f"{len(answers)} answers to {len(ask.jobs)} jobs, {ask.samples} samples each"
        return
    for i, answer in enumerate(answers):
        if answer.finish == "abort" and not may_abort:
            yield f"answer {i} was aborted, and nobody asked for that"
        whole = not partial and answer.finish != "abort"
        item = i // ask.samples
        fault = _fault(answer, ask.jobs[item], ask.orders[item], ask.new_tokens, whole)
        if fault:
            yield f"answer {i}: {fault}"


def _fault(
    answer: Answer, job: Job, order: Sequence[int], new_tokens: int, whole: bool
) -> str | None:
    expected = job.tokens[:new_tokens]
    if not whole:
        begins = answer.tokens == expected[: len(answer.tokens)]
        return None if begins else f"{answer.tokens} does not begin the oracle's {expected}"
    if answer.tokens != expected or answer.finish != "length":
        return f"{answer.tokens}, finish {answer.finish}, is not the oracle's {expected}"
    # SGLang drops the log-probability of a token now and then when it retracts a request.
    remaining = iter(zip(expected, job.logprobs, strict=False))
    for logprob, token in answer.logprobs:
        if not any(
            token == wanted and abs(logprob - best) <= job.tolerance for wanted, best in remaining
        ):
            return f"log-probability {logprob} of token {token} is not the oracle's"
    scores = [job.scores[i] for i in order] if job.scores else []
    if answer.scores is not None and not _near(answer.scores, scores):
        return f"scores {answer.scores} are not the oracle's {scores}"
    return None


def _near(told: Sequence[float], expected: Sequence[float]) -> bool:
    return len(told) == len(expected) and all(
        abs(max(one, FAINT_SCORE) - max(other, FAINT_SCORE)) <= SCORE_TOLERANCE
        for one, other in zip(told, expected, strict=True)
    )


def _weighted(rng: random.Random, weights: Mapping[Any, int]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]
