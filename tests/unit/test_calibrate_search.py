"""The searches over T and S, on tables of scores."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape.calibrate.search import (
    TOLERANCE,
    UNIT,
    Cells,
    Point,
    Score,
    best_of,
    greedy,
    grid,
    ranking,
)

VALUES = (0.2, 0.5, 0.9, 1.0, 1.3)
SEARCHES = pytest.mark.parametrize("search", [greedy, grid])

axes = st.lists(st.sampled_from(VALUES), min_size=1, unique=True)
seeds = st.integers(0, 10**6)
tables = st.dictionaries(
    st.builds(Point, st.sampled_from(VALUES), st.sampled_from(VALUES)),
    st.floats(0, 5, allow_nan=False) | st.sampled_from([0.0, 0.125, 0.25]),
    min_size=1,
)


class Table:
    """A score for every point, drawn from a seed, and a record of what was asked for."""

    def __init__(self, seed: int, levels: int = 1000) -> None:
        self.asked: list[Point] = []
        self._seed = seed
        self._levels = levels

    def __call__(self, points: Sequence[Point]) -> list[float]:
        self.asked += points
        return [self.at(point) for point in points]

    def at(self, point: Point) -> float:
        return random.Random(f"{self._seed} {point}").randrange(self._levels) / self._levels


@SEARCHES
@given(seed=seeds, temperatures=axes, scales=axes, levels=st.sampled_from([3, 1000]))
def test_the_best_is_a_scored_cell_and_never_worse_than_unit(
    search: object, seed: int, temperatures: list[float], scales: list[float], levels: int
) -> None:
    table = Table(seed, levels)
    cells = search(table, temperatures, scales)  # type: ignore[operator]
    assert cells == {point: table.at(point) for point in table.asked}
    assert UNIT in cells
    best = best_of(cells)
    assert cells[best] <= cells[UNIT]
    assert cells[best] <= min(cells.values()) + TOLERANCE


@SEARCHES
@given(seed=seeds, temperatures=axes, scales=axes)
def test_a_search_is_deterministic_and_asks_for_each_point_once(
    search: object, seed: int, temperatures: list[float], scales: list[float]
) -> None:
    one, other = Table(seed), Table(seed)
    assert search(one, temperatures, scales) == search(other, temperatures, scales)  # type: ignore[operator]
    assert one.asked == other.asked
    assert len(set(one.asked)) == len(one.asked)


@given(seed=seeds, temperatures=axes, scales=axes)
def test_the_grid_is_all_pairs_and_greedy_scores_a_part_of_them(
    seed: int, temperatures: list[float], scales: list[float]
) -> None:
    whole = grid(Table(seed), temperatures, scales)
    assert set(whole) == {UNIT} | {Point(t, s) for t in temperatures for s in scales}
    some = greedy(Table(seed), [*temperatures, 1.0], [*scales, 1.0])
    assert set(some) <= set(grid(Table(seed), [*temperatures, 1.0], [*scales, 1.0]))


@given(seed=seeds, temperatures=axes, scales=axes)
def test_the_greedy_result_cannot_be_bettered_along_one_axis(
    seed: int, temperatures: list[float], scales: list[float]
) -> None:
    cells = greedy(Table(seed), temperatures, scales)
    best = best_of(cells)
    for value in temperatures:
        neighbour = best._replace(temperature=value)
        assert neighbour not in cells or cells[best] <= cells[neighbour] + TOLERANCE
    if len(cells) > 1:
        assert any(best._replace(temperature=value) in cells for value in temperatures)


@SEARCHES
def test_known_scores_are_not_asked_for_again(search: object) -> None:
    table = Table(1)
    known = {UNIT: 0.25, Point(0.5, 0.5): 0.0}
    cells = search(table, [0.5, 1.0], [0.5, 1.0], known)  # type: ignore[operator]
    assert not set(known) & set(table.asked)
    assert {point: cells[point] for point in known} == known


def test_a_bowl_is_followed_to_its_bottom() -> None:
    def score(points: Sequence[Point]) -> list[float]:
        return [(p.temperature - 0.5) ** 2 + (p.scale - 0.9) ** 2 for p in points]

    checked: Score = score
    assert best_of(greedy(checked, VALUES, VALUES)) == Point(0.5, 0.9)


@given(cells=tables)
def test_of_equal_scores_the_nearest_to_unit_wins_in_any_order(cells: Cells) -> None:
    best = best_of(cells)
    assert best == best_of(dict(reversed(list(cells.items()))))
    for point, score in cells.items():
        if score <= min(cells.values()) + TOLERANCE:
            assert best.distance <= point.distance


@given(cells=tables, unit=st.floats(0, 5))
def test_the_ranking_starts_with_the_best_ends_with_unit_and_holds_nothing_worse(
    cells: dict[Point, float], unit: float
) -> None:
    cells = {**cells, UNIT: unit}
    ranked = ranking(cells)
    assert ranked[0] == best_of(cells)
    assert ranked[-1] == UNIT
    assert len(set(ranked)) == len(ranked)
    assert all(cells[point] <= unit for point in ranked)
