"""Ranking of documents by BM25 (Robertson and Zaragoza 2009), over words after normalisation."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from benchmarks.common.scores import normalised

K1, B = 1.2, 0.75  # how soon repeated words stop to count, and how much length does


class Index:
    """Documents that can be ranked for a query.

    The weight of a word is ln(1 + (N - n + 0.5) / (n + 0.5)), for n of N documents that have it,
    times f (k1 + 1) / (f + k1 (1 - b + b length / mean length)) for f occurrences.

    Args:
        texts: of the documents, at least one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = [Counter(normalised(text).split()) for text in texts]
        self._count = len(texts)
        self._weights: dict[str, dict[int, float]] = defaultdict(dict)
        mean = max(sum(own.total() for own in words) / len(texts), 1)
        for document, own in enumerate(words):
            norm = K1 * (1 - B + B * own.total() / mean)
            for word, occurrences in own.items():
                self._weights[word][document] = occurrences * (K1 + 1) / (occurrences + norm)

    def ranked(self, query: str) -> list[int]:
        """Indices of all documents that share a word with the query, the best ones first."""
        scores: dict[int, float] = defaultdict(float)
        for word in normalised(query).split():
            having = self._weights.get(word, {})
            rarity = math.log(1 + (self._count - len(having) + 0.5) / (len(having) + 0.5))
            for document, weight in having.items():
                scores[document] += rarity * weight
        return sorted(scores, key=lambda document: (-scores[document], document))
