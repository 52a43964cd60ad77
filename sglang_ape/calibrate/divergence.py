"""How far APE's next-token distributions are from those of the sequential prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_LEAST_REST = 1e-7  # below that, what fp32 leaves of a sum of probabilities is rounding


class Target(NamedTuple):
    """The sequential answer to one row, and what else was likely at each of its positions."""

    text: str
    tokens: list[int]  # of the answer, n of them
    ids: np.ndarray  # (n, k) int64: the k most likely tokens at each position
    logprobs: np.ndarray  # (n, k) float64: their natural log-probabilities

    @property
    def support(self) -> list[int]:
        """All tokens of ``ids``, each once."""
        return np.unique(self.ids).tolist()


def at_tokens(ids: np.ndarray, logprobs: Sequence[Mapping[int, float]]) -> np.ndarray:
    """Pick from each position's log-probabilities (n mappings) those of its ``ids`` (n, k)."""
    picked = [
        [own[token] for token in row] for row, own in zip(ids.tolist(), logprobs, strict=True)
    ]
    return np.array(picked, dtype=np.float64)


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence KL(expected, actual) over n positions, in nats.

    The distributions are known at k tokens a position; all other tokens count as one, which can
    only make the divergence smaller.

    Args:
        expected: (n, k) log-probabilities of the sequential prompt, at its most likely tokens.
        actual: (n, k) log-probabilities of APE at the same tokens.
    """
    p, q = np.exp(expected), np.exp(actual)
    p_rest = np.maximum(1 - p.sum(1), _LEAST_REST)
    q_rest = np.maximum(1 - q.sum(1), _LEAST_REST)
    known = (p * (expected - actual)).sum(1)
    return float((known + p_rest * np.log(p_rest / q_rest)).mean())
