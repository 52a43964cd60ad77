"""What the soak asks: a finite set of questions, each with the oracle's answer."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from tqdm import tqdm

from tests.support.oracle import Completion, Oracle

MAX_NEW_TOKENS = 40
TOLERANCE = 1e-4  # of a log-probability, where no score plays a part
CLEAR_MARGIN = 1e-3  # of logits: what fp32 rounding cannot turn over

_PREFIX_LENGTHS = (9, 14)
_DOCUMENTS = 24
_SETTINGS = ((0.9, 0.9), (0.5, 1.0), (1.5, 0.7), (1.0, 1.0))
_RUNGS: tuple[dict[str, float], ...] = (
    *({}, {}, {}, {}, {"soft": 0.02}, {"soft": 0.2}, {"refine": 1}, {"refine": 2}),
)

SCORE_TOLERANCE = 2e-3
FAINT_SCORE = -18.0  # by attention: one below it is the square of little more than rounding
_CLEAR_SCORE = 0.01  # between the last context that ``refine`` keeps and the next
_NULL_TOKENS = 10  # at most, of a query that asks for nothing

TENANTS = (None, "one", "two")  # values of extra_key; all of them have the same texts

Ids = list[int]
Tenant = str | None


class Place(NamedTuple):
    """A tenant's document after a prefix, both by number."""

    tenant: Tenant
    prefix: int
    document: int


class Corpus(NamedTuple):
    """The texts; each document may stand after each prefix."""

    prefixes: list[Ids]
    documents: list[Ids]

    @property
    def places(self) -> list[Place]:
        numbers = range(len(self.prefixes)), range(len(self.documents))
        return [Place(*place) for place in product(TENANTS, *numbers)]


class Job(NamedTuple):
    """One question. Without documents it is a plain request."""

    prefix: int
    documents: tuple[int, ...]
    query: Ids
    temperature: float
    scale: float
    tokens: Ids  # the oracle's first MAX_NEW_TOKENS
    logprobs: list[float]
    rung: Mapping[str, float] = MappingProxyType({})  # ``soft`` or ``refine``
    scores: tuple[float, ...] = ()  # of the documents, if they are scored

    @property
    def is_ordered(self) -> bool:
        """Whether the order of its contexts has an effect."""
        return "refine" in self.rung

    @property
    def tolerance(self) -> float:
        """Of a log-probability."""
        return TOLERANCE + self.rung.get("soft", 0) * SCORE_TOLERANCE

    def places(self, tenant: Tenant) -> list[Place]:
        return [Place(tenant, self.prefix, document) for document in self.documents]

    def prompt_tokens(self, corpus: Corpus) -> int:
        if not self.documents:
            return len(self.query)
        own = sum(len(corpus.documents[d]) for d in self.documents)
        return len(corpus.prefixes[self.prefix]) + own + len(self.query)

    def needed_tokens(self, corpus: Corpus, new_tokens: int) -> int:
        """What it, and whatever scores its contexts, may come to hold."""
        return self.prompt_tokens(corpus) + max(new_tokens, _NULL_TOKENS if self.scores else 0)


def make_corpus(seed: int) -> Corpus:
    rng = random.Random(f"{seed} corpus")
    prefixes = [_ids(rng, length) for length in _PREFIX_LENGTHS]
    return Corpus(prefixes, [_ids(rng, rng.randint(8, 80)) for _ in range(_DOCUMENTS)])


def make_jobs(
    corpus: Corpus, model: Path, seed: int, count: int, large_tokens: int, by_attention: bool
) -> list[Job]:
    """Draw questions and answer them.

    A third are plain, and every 50th fills the pool up to ``large_tokens``. Questions at which two
    tokens are about equally likely are left out, so that there is one right answer to each.
    """
    asker = _Asker(corpus, Oracle(model), by_attention)
    rng = random.Random(f"{seed} jobs")
    jobs: list[Job] = []
    bar = tqdm(total=count, desc="oracle", unit="job")
    while len(jobs) < count:
        large = large_tokens if len(jobs) % 50 == 49 else 0
        job = asker.draw(rng, plain=len(jobs) % 3 == 2, large_tokens=large)
        if job is not None:
            jobs.append(job)
            bar.update()
    bar.close()
    return jobs


class _Asker(NamedTuple):
    """Draws questions, and answers them."""

    corpus: Corpus
    oracle: Oracle
    by_attention: bool  # how contexts are scored

    def draw(self, rng: random.Random, plain: bool, large_tokens: int) -> Job | None:
        """None if there is not one right answer."""
        prefix = rng.randrange(len(self.corpus.prefixes))
        temperature, scale = rng.choice(_SETTINGS)
        documents = tuple(_choose(self.corpus, rng, large_tokens))
        query = _ids(rng, rng.randint(1, 12))
        job = Job(prefix, documents, query, temperature, scale, [], [], rng.choice(_RUNGS))
        if plain:
            # It begins like a context does, so that both find each other's KV.
            chosen = documents if large_tokens else documents[:1]
            row = self._row(job, chosen)
            job = job._replace(documents=(), query=row, rung={})
        if job.rung and len(job.documents) > max(1, job.rung.get("refine", 0)):
            job = job._replace(scores=self._scores(job))
        answer = self._answer(job)
        if answer is None or _margins(answer.logits).min() < CLEAR_MARGIN:
            return None
        return job._replace(tokens=answer.token_ids, logprobs=answer.logprobs)

    def _scores(self, job: Job) -> tuple[float, ...]:
        prefix, texts = self.corpus.prefixes[job.prefix], self._texts(job.documents)
        if self.by_attention:
            null = self.oracle.null(job.query)
            return tuple(self.oracle.attention_scores(prefix, texts, job.query, null))
        return tuple(self.oracle.likelihood(prefix, text, job.query) for text in texts)

    def _answer(self, job: Job) -> Completion | None:
        if not job.documents:
            return self.oracle.generate_plain(job.query, MAX_NEW_TOKENS)
        if job.is_ordered:
            kept = _kept(job)
            row = None if kept is None else self._row(job, kept)
            return None if row is None else self.oracle.generate_plain(row, MAX_NEW_TOKENS)
        soft = job.rung.get("soft", 0.0)
        bias = [soft * (score - max(job.scores)) for score in job.scores] or None
        given = self.corpus.prefixes[job.prefix], self._texts(job.documents), job.query
        return self.oracle.generate(*given, MAX_NEW_TOKENS, job.temperature, job.scale, bias)

    def _row(self, job: Job, documents: Sequence[int]) -> Ids:
        parts = [self.corpus.prefixes[job.prefix], *self._texts(documents), job.query]
        return [token for part in parts for token in part]

    def _texts(self, documents: Sequence[int]) -> list[Ids]:
        return [self.corpus.documents[d] for d in documents]


def _kept(job: Job) -> list[int] | None:
    """The documents of the highest scores, of equal ones the first; None if that is not clear."""
    count = int(job.rung["refine"])
    if not job.scores:
        return list(job.documents[:count])
    ranked = sorted(range(len(job.scores)), key=lambda i: (-job.scores[i], i))
    last, following = ranked[count - 1 : count + 1]
    twins = job.documents[last] == job.documents[following]
    if not twins and job.scores[last] - job.scores[following] < _CLEAR_SCORE:
        return None
    return [job.documents[i] for i in sorted(ranked[:count])]


def _choose(corpus: Corpus, rng: random.Random, large_tokens: int) -> Iterator[int]:
    """One to six documents, some of them twice; or as many as ``large_tokens`` hold."""
    numbers: Sequence[int] = range(len(corpus.documents))
    if not large_tokens:
        yield from rng.choices(numbers, k=rng.randint(1, 6))
        return
    left = large_tokens
    for number in rng.sample(numbers, k=len(numbers)):
        if len(corpus.documents[number]) <= left:
            left -= len(corpus.documents[number])
            yield number


def _margins(logits: torch.Tensor) -> torch.Tensor:
    best = logits.topk(2).values
    return best[:, 0] - best[:, 1]


def _ids(rng: random.Random, length: int) -> Ids:
    return [rng.randrange(4, 512) for _ in range(length)]
