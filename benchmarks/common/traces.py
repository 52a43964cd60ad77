"""Traces of a retrieval service: which documents each request brings, and in which order."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np

Request = tuple[int, ...]  # documents, in the order in which they are given; 0 is the most popular


class Order(StrEnum):
    """How the documents of a request follow one another. Its value names it in tables."""

    RELEVANCE = "relevance"  # as a retriever ranks them: another order for every question
    POPULARITY = "popularity"  # the most popular first: the best that a prefix cache can be given


class TraceShape(NamedTuple):
    """What a trace is drawn from."""

    documents: int
    requests: int
    per_request: int  # distinct documents of one request
    zipf: float  # exponent: the document of rank r is drawn in proportion to 1 / r ** zipf


def popularity(documents: int, exponent: float) -> np.ndarray:
    """Probability of each document to be drawn first, the most popular first: ``(documents,)``."""
    weights = np.arange(1, documents + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def draw(shape: TraceShape, order: Order, seed: int) -> list[Request]:
    """Requests of distinct documents. One seed draws the same sets of documents in every order."""
    sets, orders = np.random.default_rng(seed).spawn(2)
    weights = popularity(shape.documents, shape.zipf)
    requests = []
    for _ in range(shape.requests):
        drawn = sets.choice(shape.documents, shape.per_request, replace=False, p=weights)
        arranged = np.sort(drawn) if order is Order.POPULARITY else orders.permutation(drawn)
        requests.append(tuple(arranged.tolist()))
    return requests
