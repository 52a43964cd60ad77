"""What the user sees in the end: the heat map and the table, as text."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ape.calibrate.ladder import frontier
from sglang_ape.calibrate.run import Cell, Figure, Outcome, Result
from sglang_ape.calibrate.search import Point

_SHADES = (22, 28, 64, 100, 136, 130, 124, 88)  # of the 256 terminal colours, from good to bad
_SHOWN_PREFIX = 60


def table(outcome: Outcome) -> list[str]:
    """Every setting on both parts, with standard errors."""
    lines = []
    for name, results in (("validation", outcome.validation), ("held out", outcome.held_out)):
        if not results:
            lines.append(f"{name}: no rows")
            continue
        lines.append(f"{name:<14}{'divergence (nats/token)':>28}{'accuracy':>26}")
        lines += [_line(result) for result in results]
    return lines


def ladder(outcome: Outcome) -> list[str]:
    """Every rung that was tried, by cost, with its accuracy."""
    best = frontier([step.standing for step in outcome.ladder])
    lines = []
    for name, steps in (("validation", outcome.ladder), ("held out", outcome.held_out_ladder)):
        if not steps:
            continue
        lines.append(f"{name:<22}{'accuracy':>24}{'extra tokens/request':>24}{'frontier':>12}")
        for step in sorted(steps, key=lambda step: (step.tokens, -step.accuracy.mean)):
            rung = step.rung.name + ("*" if step.rung == outcome.chosen.rung else "")
            accuracy = _shown(step.accuracy, "{:.3f}")
            mark = "yes" if steps is outcome.ladder and step.standing in best else ""
            lines.append(f"  {rung:<20}{accuracy:>24}{step.tokens:>24.1f}{mark:>12}".rstrip())
    return lines


def heat_map(
    cells: Sequence[Cell], chosen: Point, prefix: str | None, colour: bool = False
) -> list[str]:
    """Scores by T (down) and S (across), of one prefix.

    Args:
        cells: of the search.
        chosen: gets a star.
        prefix: whose scores are shown.
        colour: whether to shade them, for a terminal.
    """
    scores = {cell.setting.point: cell.score for cell in cells if cell.setting.prefix == prefix}
    low, high = min(scores.values()), max(scores.values())
    scales = sorted({point.scale for point in scores})
    lines = ["T \\ S " + "".join(f"{scale:>9g}" for scale in scales)]
    for temperature in sorted({point.temperature for point in scores}):
        shown = [f"{temperature:>5g} "]
        for scale in scales:
            point = Point(temperature, scale)
            if point not in scores:
                shown.append(f"{'·':>9}")
                continue
            text = f"{scores[point]:>8.4f}" + ("*" if point == chosen else " ")
            shown.append(_shaded(text, scores[point], low, high) if colour else text)
        lines.append("".join(shown).rstrip())
    return lines


def described(prefix: str | None) -> str:
    """A prefix in one short line."""
    if prefix is None:
        return "the rows' own"
    return repr(prefix if len(prefix) <= _SHOWN_PREFIX else f"{prefix[:_SHOWN_PREFIX]}…")


def _line(result: Result) -> str:
    divergence = _shown(result.divergence, "{:.4f}")
    accuracy = _shown(result.accuracy, "{:.3f}")
    return f"  {result.name:<12}{divergence:>28}{accuracy:>26}"


def _shown(figure: Figure | None, form: str) -> str:
    if figure is None:
        return "-"
    error = "" if figure.error is None else f" ± {form.format(figure.error)}"
    return f"{form.format(figure.mean)}{error} (n={figure.rows})"


def _shaded(text: str, score: float, low: float, high: float) -> str:
    share = 0.0 if high == low else (score - low) / (high - low)
    shade = _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]
    return f"\x1b[97;48;5;{shade}m{text}\x1b[0m"
