"""The quality ladder: how much a request may cost beyond plain APE, and what that brings.

A rung is a value of soft, of refine or of neither, with the warm items in P or without them. Its
quality is the share of right answers: divergences from the sequential answers cannot be used, for
they are measured with the answer as a part of the query, and soft and refine weigh contexts by the
query. Its cost are the tokens that a request prefills beyond those of plain APE.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Rung(NamedTuple):
    """One step of the ladder, above T, S and the prefix."""

    soft: float = 0.0  # λ
    refine: int = 0  # m; only one of the two is above 0
    warm: bool = False  # whether P ends with the warm items

    @property
    def name(self) -> str:
        parts = [
            "warm" if self.warm else "",
            f"soft {self.soft:g}" if self.soft else "",
            f"refine {self.refine}" if self.refine else "",
        ]
        return " + ".join(filter(None, parts)) or "plain"


PLAIN_RUNG = Rung()


class Standing(NamedTuple):
    """How one rung did."""

    rung: Rung
    accuracy: float
    tokens: float  # extra prefill tokens, mean over requests


def rungs(softs: Sequence[float], refines: Sequence[int], warm: bool) -> list[Rung]:
    """All rungs to try, each once: the plain one first, those with warm items last."""
    steps = [
        PLAIN_RUNG,
        *(Rung(soft=soft) for soft in softs if soft),
        *(Rung(refine=refine) for refine in refines if refine),
    ]
    warmed = [step._replace(warm=True) for step in steps] if warm else []
    return list(dict.fromkeys([*steps, *warmed]))


def best_within(standings: Sequence[Standing], budget: float) -> Standing:
    """The most accurate within the budget; of equals the cheapest, then the first.

    Args:
        standings: the plain rung, which costs nothing, among them.
        budget: extra prefill tokens a request, as a mean.
    """
    allowed = [one for one in standings if one.tokens <= budget]
    return min(allowed, key=lambda one: (-one.accuracy, one.tokens))


def frontier(standings: Sequence[Standing]) -> list[Standing]:
    """Those to which no other is better in one of accuracy and cost and as good in the other.

    By cost; of equals the first.
    """
    ranked = sorted(standings, key=lambda one: (one.tokens, -one.accuracy))
    best = itertools.accumulate((one.accuracy for one in ranked), max, initial=-1.0)
    return [one for one, before in zip(ranked, best, strict=False) if one.accuracy > before]
