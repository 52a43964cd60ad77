"""Two ways to answer the same questions, compared question by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1_000  # resamples at once, so that memory stays small


class Comparison(NamedTuple):
    """How much better one way is than another, on the questions that both answered.

    Attributes:
        questions: how many those are.
        difference: mean of (own score - other score).
        low: lower end of its confidence interval; None for fewer than two questions.
        high: upper end.
        better: questions with a higher score.
        worse: questions with a lower score.
        p: of the exact two-sided sign test over these; of 0/1 scores that is the exact test of
            McNemar.
    """

    questions: int
    difference: float
    low: float | None
    high: float | None
    better: int
    worse: int
    p: float


def compare(own: Sequence[float], other: Sequence[float], seed: int) -> Comparison:
    """Compare scores of the same questions, in the same order; there must be one at least.

    Args:
        own: scores.
        other: scores to compare with.
        seed: of the resampling.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    low, high = interval(differences, seed) if len(differences) > 1 else (None, None)
    return Comparison(
        len(differences),
        math.fsum(differences) / len(differences),
        low,
        high,
        better,
        worse,
        sign_test(better, worse),
    )


def interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The confidence interval of a mean: percentiles of the bootstrap (Efron 1979).

    Values are drawn with replacement, as many as there are, :data:`RESAMPLES` times; the ends are
    percentiles of the means of these samples. Where all values are equal the interval has no width,
    which says that nothing else was seen, not that nothing else is possible.

    Args:
        values: one a question.
        seed: of what is drawn.
    """
    import numpy as np

    drawn = np.random.default_rng(seed)
    every = np.asarray(values, dtype=np.float64)
    means = [
        every[drawn.integers(0, len(every), (_CHUNK, len(every)))].mean(axis=1)
        for _ in range(RESAMPLES // _CHUNK)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), (tail, 100 - tail))
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """The chance of a split at least as uneven, if either side were as likely; 1 without any."""
    count, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)
