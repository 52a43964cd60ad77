"""What scores of contexts lead to: a bias for each, or the choice of a few."""

from __future__ import annotations

from collections.abc import Sequence

from flashinfer_ext.reference import LOWEST_BIAS


def biases(scores: Sequence[float], soft: float) -> tuple[float, ...]:
    """``soft * (score - highest score)`` of each context, natural log.

    Returns:
        None of them if all are 0: attention is then as without.
    """
    top = max(scores)
    found = tuple(
        max(soft * (score - top), LOWEST_BIAS) if score < top else 0.0 for score in scores
    )
    return found if any(found) else ()


def highest(scores: Sequence[float], count: int) -> list[int]:
    """The indices of the highest scores, ascending; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[:count])
