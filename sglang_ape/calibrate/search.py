"""The searches over T and S: which settings are scored, and which of them wins.

Pure functions over a score; lower is better. Source of the greedy one: APE paper, section 5, where
T and S are searched greedily on a validation set.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

Search = Literal["greedy", "grid"]
SEARCHES: tuple[Search, ...] = get_args(Search)

TOLERANCE = 1e-4  # scores that differ by no more count as equal: rounding may not decide
_MAX_ROUNDS = 5


class Point(NamedTuple):
    """T and S."""

    temperature: float
    scale: float

    @property
    def distance(self) -> tuple[float, float, float]:
        """How far from T = S = 1; no two points have the same."""
        return (abs(self.temperature - 1) + abs(self.scale - 1), -self.temperature, -self.scale)


UNIT = Point(1.0, 1.0)

Score = Callable[[Sequence[Point]], Sequence[float]]
Cells = Mapping[Point, float]


def best_of(cells: Cells) -> Point:
    """The lowest score; of scores equal within :data:`TOLERANCE` that nearest to T = S = 1."""
    lowest = min(cells.values())
    tied = [point for point, score in cells.items() if score <= lowest + TOLERANCE]
    return min(tied, key=lambda point: point.distance)


def ranking(cells: Cells) -> list[Point]:
    """The best, then those no worse than T = S = 1 by their score, and T = S = 1 at the end."""
    best = best_of(cells)
    others = [p for p in cells if p not in (best, UNIT) and cells[p] <= cells[UNIT]]
    others.sort(key=lambda point: (cells[point], point.distance))
    return [*dict.fromkeys([best, *others, UNIT])] if best != UNIT else [UNIT]


def greedy(
    score: Score, temperatures: Sequence[float], scales: Sequence[float], known: Cells | None = None
) -> dict[Point, float]:
    """One coordinate after the other, from T = S = 1.

    T is tried over its values with S kept, then S with the best T kept, until neither moves.

    Args:
        score: of some settings at once; each is asked for once.
        temperatures: values of T; 1 need not be among them.
        scales: values of S, likewise.
        known: scores that need not be asked for.

    Returns:
        All scored settings, those of ``known`` too.
    """
    cells = dict(known or {})
    at = UNIT
    for _ in range(_MAX_ROUNDS):
        before = at
        for axis, values in (("temperature", temperatures), ("scale", scales)):
            line = [at, *(at._replace(**{axis: value}) for value in values)]
            _fill(cells, score, line)
            at = best_of({point: cells[point] for point in line})
        if at == before:
            break
    return cells


def grid(
    score: Score, temperatures: Sequence[float], scales: Sequence[float], known: Cells | None = None
) -> dict[Point, float]:
    """All pairs, and T = S = 1; arguments and result as of :func:`greedy`."""
    cells = dict(known or {})
    _fill(cells, score, [UNIT, *itertools.starmap(Point, itertools.product(temperatures, scales))])
    return cells


def _fill(cells: dict[Point, float], score: Score, points: Sequence[Point]) -> None:
    missing = [point for point in dict.fromkeys(points) if point not in cells]
    if missing:
        cells.update(zip(missing, score(missing), strict=True))
