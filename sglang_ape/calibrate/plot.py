"""The heat map, the ladder and the held-out figures as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_ape.calibrate.data import InputError
from sglang_ape.calibrate.ladder import frontier
from sglang_ape.calibrate.run import Outcome
from sglang_ape.calibrate.search import Point


def require_matplotlib() -> None:
    """Fail before the work, not after it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'sglang-ape[bench]'") from None


def draw(outcome: Outcome, objective: str, path: Path) -> None:
    """Write a PNG, whatever the suffix.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = (3, 3, 2) if outcome.ladder else (3, 2)
    figure = Figure(figsize=(2.2 * sum(widths), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    first, *between, last = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_map(figure, first, outcome, "divergence" if objective == "match" else "error rate")
    for axes in between:
        _draw_ladder(axes, outcome)
    _draw_bars(last, outcome, objective)
    figure.savefig(path, format="png", dpi=150)


def _draw_map(figure: Any, axes: Any, outcome: Outcome, label: str) -> None:
    import numpy as np

    chosen = outcome.chosen
    scores = {
        cell.setting.point: cell.score
        for cell in outcome.cells
        if cell.setting.prefix == chosen.prefix
    }
    temperatures = sorted({point.temperature for point in scores})
    scales = sorted({point.scale for point in scores})
    grid = np.array([[scores.get(Point(t, s), np.nan) for s in scales] for t in temperatures])
    image = axes.imshow(np.ma.masked_invalid(grid), origin="lower", cmap="viridis_r", aspect="auto")
    figure.colorbar(image, ax=axes, label=f"{label} on the validation part")
    axes.set_xticks(range(len(scales)), [f"{value:g}" for value in scales])
    axes.set_yticks(range(len(temperatures)), [f"{value:g}" for value in temperatures])
    axes.set(xlabel="S", ylabel="T", title="scored settings")
    x, y = scales.index(chosen.point.scale), temperatures.index(chosen.point.temperature)
    axes.plot(x, y, marker="*", markersize=16, color="white", markeredgecolor="black")


def _draw_ladder(axes: Any, outcome: Outcome) -> None:
    """Points, the frontier's with their names: rungs of equal cost lie above one another."""
    for step in outcome.ladder:
        axes.errorbar(
            step.tokens,
            step.accuracy.mean,
            yerr=step.accuracy.error or 0.0,
            fmt="o",
            markersize=5,
            markerfacecolor="tab:orange" if step.rung.warm else "tab:blue",
            color="tab:orange" if step.rung.warm else "tab:blue",
            alpha=0.7,
            capsize=3,
        )
        if step.rung == outcome.chosen.rung:
            place = (step.tokens, step.accuracy.mean)
            axes.plot(*place, marker="*", markersize=16, color="white", markeredgecolor="black")
    best = frontier([step.standing for step in outcome.ladder])
    costs, accuracies = [one.tokens for one in best], [one.accuracy for one in best]
    axes.step(costs, accuracies, where="post", color="black", alpha=0.4)
    for one in best:
        side = "left" if 2 * one.tokens <= max(costs) else "right"
        shift = (8, 6) if side == "left" else (-8, 6)
        axes.annotate(
            one.rung.name, (one.tokens, one.accuracy), shift, textcoords="offset points", ha=side
        )
    axes.set(
        xlabel="extra prefill tokens a request",
        ylabel="accuracy on the validation part",
        title="rungs (orange: with warm items)",
    )
    axes.margins(0.1)


def _draw_bars(axes: Any, outcome: Outcome, objective: str) -> None:
    part = "held-out" if outcome.held_out else "validation"
    results = outcome.held_out or outcome.validation
    field = "divergence" if objective == "match" else "accuracy"
    figures = {one.name: getattr(one, field) for one in results if getattr(one, field) is not None}
    means = [figure.mean for figure in figures.values()]
    errors = [figure.error or 0.0 for figure in figures.values()]
    axes.bar(list(figures), means, yerr=errors, capsize=4)
    unit = " (nats a token)" if objective == "match" else ""
    axes.set(ylabel=f"{field}{unit}", title=f"{part} part, mean ± standard error")
    axes.tick_params(axis="x", rotation=20)
