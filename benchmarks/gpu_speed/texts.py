"""Prompts of random tokens, drawn from one seed; no two draws share more than a token by chance."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np


class Documents(NamedTuple):
    """A prefix and the contexts after it."""

    prefix: list[int]
    contexts: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.contexts))


class Prompt(NamedTuple):
    """What one request asks; a plain one has no contexts."""

    documents: Documents
    query: list[int]

    @property
    def sequence(self) -> list[int]:
        """The prompt as one sequence."""
        ids = [*self.documents.prefix]
        for context in self.documents.contexts:
            ids += context
        return ids + self.query


class Texts:
    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab = vocab
        self._numbers = np.random.default_rng(seed)
        self.random = random.Random(seed)

    def ids(self, count: int) -> list[int]:
        # From 2 on: config.json calls 0 and 1 BOS and EOS.
        return self._numbers.integers(2, self._vocab, count).tolist()

    def plain(self, length: int) -> Prompt:
        return Prompt(Documents([], []), self.ids(length))

    def documents(self, prefix: int, count: int, length: int) -> Documents:
        return Documents(self.ids(prefix), [self.ids(length) for _ in range(count)])

    def shuffled(self, documents: Documents) -> Documents:
        contexts = self.random.sample(documents.contexts, len(documents.contexts))
        return documents._replace(contexts=contexts)

    def different_orders(self, documents: Documents, count: int) -> list[Documents]:
        """Orders that each begin with another context, so that a prefix cache finds none again."""
        heads = self.random.sample(range(len(documents.contexts)), count)
        orders = []
        for head in heads:
            rest = [i for i in range(len(documents.contexts)) if i != head]
            self.random.shuffle(rest)
            contexts = [documents.contexts[i] for i in (head, *rest)]
            orders.append(documents._replace(contexts=contexts))
        return orders
