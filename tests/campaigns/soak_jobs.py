"""What the soak asks: a finite set of questions, each with the oracle's answer."""

import random
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from tests.support.oracle import Oracle

MAX_NEW_TOKENS = 40
CLEAR_MARGIN = 1e-3  # of logits: what fp32 rounding cannot turn over

_PREFIX_LENGTHS = (9, 14)
_DOCUMENTS = 24
_SETTINGS = ((0.9, 0.9), (0.5, 1.0), (1.5, 0.7), (1.0, 1.0))

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

    def places(self, tenant: Tenant) -> list[Place]:
        return [Place(tenant, self.prefix, document) for document in self.documents]

    def prompt_tokens(self, corpus: Corpus) -> int:
        if not self.documents:
            return len(self.query)
        own = sum(len(corpus.documents[d]) for d in self.documents)
        return len(corpus.prefixes[self.prefix]) + own + len(self.query)


def make_corpus(seed: int) -> Corpus:
    rng = random.Random(f"{seed} corpus")
    prefixes = [_ids(rng, length) for length in _PREFIX_LENGTHS]
    return Corpus(prefixes, [_ids(rng, rng.randint(8, 80)) for _ in range(_DOCUMENTS)])


def make_jobs(corpus: Corpus, model: Path, seed: int, count: int, large_tokens: int) -> list[Job]:
    """Draw questions and answer them.

    A third are plain, and every 50th fills the pool up to ``large_tokens``. Questions at which two
    tokens are about equally likely are left out, so that there is one right answer to each.
    """
    oracle = Oracle(model)
    rng = random.Random(f"{seed} jobs")
    jobs: list[Job] = []
    bar = tqdm(total=count, desc="oracle", unit="job")
    while len(jobs) < count:
        large = large_tokens if len(jobs) % 50 == 49 else 0
        job = _draw(corpus, oracle, rng, plain=len(jobs) % 3 == 2, large_tokens=large)
        if job is not None:
            jobs.append(job)
            bar.update()
    bar.close()
    return jobs


def _draw(
    corpus: Corpus, oracle: Oracle, rng: random.Random, plain: bool, large_tokens: int
) -> Job | None:
    prefix = rng.randrange(len(corpus.prefixes))
    temperature, scale = rng.choice(_SETTINGS)
    documents = tuple(_choose(corpus, rng, large_tokens))
    query = _ids(rng, rng.randint(1, 12))
    texts = [corpus.documents[d] for d in documents]
    if plain:
        # It begins like a context does, so that both find each other's KV.
        chosen = texts if large_tokens else texts[:1]
        query = corpus.prefixes[prefix] + [token for text in chosen for token in text] + query
        documents = ()
        answer = oracle.generate_plain(query, MAX_NEW_TOKENS)
    else:
        given = corpus.prefixes[prefix], texts, query
        answer = oracle.generate(*given, MAX_NEW_TOKENS, temperature, scale)
    if _margins(answer.logits).min() < CLEAR_MARGIN:
        return None
    return Job(prefix, documents, query, temperature, scale, answer.token_ids, answer.logprobs)


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
