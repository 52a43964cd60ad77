"""One calibration: choose on the validation part, then try what was chosen on the held-out part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from sglang_ape.calibrate.ladder import PLAIN_RUNG, Rung, Standing, best_within, rungs
from sglang_ape.calibrate.measure import Measure, Setting
from sglang_ape.calibrate.scores import Metric, is_right
from sglang_ape.calibrate.search import TOLERANCE, UNIT, Point, Search, greedy, grid, ranking
from sglang_ape.calibrate.tokens import Row

Objective = Literal["match", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

DEFAULT = Point(0.9, 0.9)  # of a server without flags
PLAIN = Setting(UNIT)  # what nothing chosen may be worse than
FEW_ROWS = 30
_GUARD_TRIES = 5
_SEARCHES = {"greedy": greedy, "grid": grid}


class Plan(NamedTuple):
    """What to search, and how."""

    objective: Objective
    search: Search
    metric: Metric
    temperatures: tuple[float, ...]
    scales: tuple[float, ...]
    prefixes: tuple[str, ...]  # candidates beside the rows' own
    softs: tuple[float, ...] = ()  # rungs to try beside the plain one
    refines: tuple[int, ...] = ()
    warm: tuple[str, ...] = ()  # items to try in P
    budget: float = math.inf  # extra prefill tokens a request, as a mean

    @property
    def rungs(self) -> list[Rung]:
        """What to try above T, S and the prefix; none: no more was asked for."""
        found = rungs(self.softs, self.refines, bool(self.warm))
        return found if len(found) > 1 else []


class Figure(NamedTuple):
    """A mean over rows."""

    mean: float
    error: float | None  # standard error of the mean; None for a single row
    rows: int


class Result(NamedTuple):
    """One setting on one part of the data."""

    name: str
    divergence: Figure | None  # None: no row could be asked sequentially, or it is sequential
    accuracy: Figure | None  # None: no row has a label


class Step(NamedTuple):
    """One rung on one part of the data."""

    rung: Rung
    accuracy: Figure
    tokens: float  # extra prefill tokens, mean over requests

    @property
    def standing(self) -> Standing:
        return Standing(self.rung, self.accuracy.mean, self.tokens)


class Cell(NamedTuple):
    """One scored setting of the search."""

    setting: Setting
    score: float  # of the objective, lower is better


class Outcome(NamedTuple):
    """All that a calibration found out."""

    chosen: Setting
    cells: list[Cell]
    validation: list[Result]
    held_out: list[Result]
    notes: list[str]
    ladder: list[Step]  # all rungs, on the validation part; empty where none was to be tried
    held_out_ladder: list[Step]  # the plain and the chosen one


class Calibration:
    """Runs a plan.

    Args:
        plan: what to search.
        measure: asks the engine.
        fits: whether a row's sequential prompt can be asked.
    """

    def __init__(self, plan: Plan, measure: Measure, fits: Callable[[Row], bool]) -> None:
        self.notes: list[str] = []
        self._plan = plan
        self._measure = measure
        self._fits = fits

    def run(self, validation: Sequence[Row], held_out: Sequence[Row]) -> Outcome:
        """Search on one part, report on both.

        Args:
            validation: at least one row; each fits if the objective is ``match``, has a label if
                it is ``accuracy``.
            held_out: may be empty.
        """
        for name, rows in (("validation", validation), ("held-out", held_out)):
            if 0 < len(rows) < FEW_ROWS:
                few = f"only {len(rows)} row" + "s" * (len(rows) != 1)
                self.notes.append(f"{few} in the {name} part: differences may be chance")
        self._measure.ask_sequentially([row for row in (*validation, *held_out) if self._fits(row)])
        prefix, cells = self._search(validation)
        chosen = self._guarded(validation, prefix, cells)
        results, results_held_out = (self._results(rows, chosen) for rows in (validation, held_out))
        ladder = self._ladder(validation, chosen, self._plan.rungs)
        rung = PLAIN_RUNG
        if ladder:
            rung = best_within([step.standing for step in ladder], self._plan.budget).rung
        tried_again = dict.fromkeys([PLAIN_RUNG, rung]) if ladder else ()
        return Outcome(
            chosen._replace(rung=rung),
            [Cell(setting, score) for setting, score in cells.items()],
            results,
            results_held_out,
            self.notes,
            ladder,
            self._ladder(held_out, chosen, list(tried_again)),
        )

    def _search(self, rows: Sequence[Row]) -> tuple[str | None, dict[Setting, float]]:
        """Score each prefix at two settings, and the best prefix at those of the search.

        Returns:
            The best prefix, and all scores.
        """
        cells: dict[str | None, dict[Point, float]] = {None: {}}
        best = None
        if self._plan.prefixes:
            probes = (UNIT, DEFAULT)
            for prefix in (None, *self._plan.prefixes):
                scores = self._scores(rows, probes, prefix)
                cells[prefix] = dict(zip(probes, scores, strict=True))
            lowest = {prefix: min(own.values()) for prefix, own in cells.items()}
            limit = min(lowest.values()) + TOLERANCE
            best = next(prefix for prefix in cells if lowest[prefix] <= limit)
        cells[best] = _SEARCHES[self._plan.search](
            lambda points: self._scores(rows, points, best),
            self._plan.temperatures,
            self._plan.scales,
            cells[best],
        )
        return best, {
            Setting(point, prefix): score
            for prefix, own in cells.items()
            for point, score in own.items()
        }

    def _scores(
        self, rows: Sequence[Row], points: Sequence[Point], prefix: str | None
    ) -> list[float]:
        settings = [Setting(point, prefix) for point in points]
        if self._plan.objective == "match":
            return [_mean(own) for own in self._measure.divergences(rows, settings)]
        return [1 - _mean(own) for own in self._right(rows, settings)]

    def _guarded(
        self, rows: Sequence[Row], prefix: str | None, cells: dict[Setting, float]
    ) -> Setting:
        """The best setting that is no worse than T = S = 1, by its score and in accuracy.

        Compared are T = S = 1 with the prefix of the setting and with the rows' own.
        """
        own = {one.point: score for one, score in cells.items() if one.prefix == prefix}
        ranked = [Setting(point, prefix) for point in ranking(own)]
        ranked = [setting for setting in ranked if cells[setting] <= cells[PLAIN]]
        labelled = [row for row in rows if row.answers]
        if self._plan.objective == "accuracy" or not labelled:
            return ranked[0] if ranked else PLAIN
        bars = [PLAIN, Setting(UNIT, prefix)]
        needed = max(map(_mean, self._right(labelled, bars)))
        for passed_over, setting in enumerate(ranked[:_GUARD_TRIES]):
            if _mean(self._right(labelled, [setting])[0]) >= needed:
                if passed_over:
                    self.notes.append(
                        f"passed over for less accuracy than T = S = 1 on the validation part: "
                        f"{passed_over} of the best matches"
                    )
                return setting
        self.notes.append(
            "the best matches are less accurate than T = S = 1 on the validation part: kept is "
            "T = S = 1"
        )
        return PLAIN

    def _results(self, rows: Sequence[Row], chosen: Setting) -> list[Result]:
        if not rows:
            return []
        matched = [row for row in rows if self._fits(row)]
        labelled = [row for row in rows if row.answers]
        settings = list(dict.fromkeys([PLAIN, Setting(DEFAULT), chosen]))
        distances = self._measure.divergences(matched, settings)
        rights = self._right(labelled, settings)
        measured = {
            setting: (_figure(distance), _figure(right))
            for setting, distance, right in zip(settings, distances, rights, strict=True)
        }
        sequential = [
            float(is_right(self._measure.targets[row.line].text, row.answers, self._plan.metric))
            for row in labelled
            if self._fits(row)
        ]
        return [
            Result("sequential", None, _figure(sequential)),
            Result("T = S = 1", *measured[PLAIN]),
            Result("T = S = 0.9", *measured[Setting(DEFAULT)]),
            Result("chosen", *measured[chosen]),
        ]

    def _ladder(self, rows: Sequence[Row], chosen: Setting, tried: Sequence[Rung]) -> list[Step]:
        """Rungs at the chosen T, S and prefix, on the rows that have answers."""
        labelled = [row for row in rows if row.answers]
        if not labelled or not tried:
            return []
        settings = [chosen._replace(rung=rung) for rung in tried]
        rights = self._right(labelled, settings)
        answers = self._measure.answers(labelled, settings)
        return [
            Step(rung, _known_figure(right), _mean([answer.extra_tokens for answer in own]))
            for rung, right, own in zip(tried, rights, answers, strict=True)
        ]

    def _right(self, rows: Sequence[Row], settings: Sequence[Setting]) -> list[list[float]]:
        """For each setting, 1 for each row with the right answer, else 0."""
        return [
            [
                float(is_right(text, row.answers, self._plan.metric))
                for row, text in zip(rows, texts, strict=True)
            ]
            for texts in self._measure.texts(rows, settings)
        ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _figure(values: Sequence[float]) -> Figure | None:
    return _known_figure(values) if values else None


def _known_figure(values: Sequence[float]) -> Figure:
    mean, count = _mean(values), len(values)
    if count == 1:
        return Figure(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Figure(mean, math.sqrt(variance / count), count)
