"""Results: a JSON file that grows as figures come in, tables for the terminal, plots."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.common import machine


class Results:
    """``results.json`` in a folder.

    A run that is killed leaves what it had measured: the file is replaced at every addition.

    Args:
        folder: made if it is not there.
        benchmark: its name.
        settings: all that decides what is measured.
    """

    def __init__(self, folder: Path, benchmark: str, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.content = self._first(benchmark, settings)
        self.write()

    def _first(self, benchmark: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What is in the file before the first row."""
        return {
            "benchmark": benchmark,
            "command": command_line(benchmark),
            "settings": dict(settings),
            "machine": machine.describe(),
            "rows": [],
            "finished": False,
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self.write()

    def note(self, key: str, value: Any) -> None:
        """A fact beside the rows."""
        self.content[key] = value
        self.write()

    def finish(self) -> None:
        self.content["finished"] = True
        self.write()
        print(f"results: {self.folder / 'results.json'}")

    def write(self) -> None:
        path = self.folder / "results.json"
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(path)


def command_line(benchmark: str) -> str:
    """The command of this process; of an absolute path, its last part."""
    return " ".join([f"python -m benchmarks.{benchmark}", *map(without_folder, sys.argv[1:])])


def without_folder(argument: str) -> str:
    """An argument of a command line; of an absolute path, its last part."""
    return Path(argument).name if os.path.isabs(argument) else argument


class Column(NamedTuple):
    """One column of a table."""

    title: str
    key: str
    format: str = "{}"  # of a value that is there; a missing one or None is left blank


def show(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; all but the first column are set to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column.title, justify="right" if i else "left")
    for row in rows:
        values = [row.get(column.key) for column in columns]
        cells = zip(columns, values, strict=True)
        table.add_row(*("" if v is None else column.format.format(v) for column, v in cells))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


class Line(NamedTuple):
    """One line of a plot; ``x`` and ``y`` are equally long."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    # Half of an error bar's length, or its lengths below and above.
    spread: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None = None


class Axes(NamedTuple):
    """One of the plots that stand side by side in a file."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


class Bars(NamedTuple):
    """One of the plots that stand side by side in a file: a bar for each value."""

    title: str
    unit: str
    values: Mapping[str, float]


def plot(path: Path, title: str, plots: Sequence[Axes | Bars]) -> None:
    """Draw plots side by side into a PNG file; without matplotlib, say that there is none."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no plot {path}: matplotlib is not installed")
        return
    matplotlib.use("Agg")  # no window, whatever the machine has
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(plots), figsize=(5.5 * len(plots), 4.2), squeeze=False, layout="constrained"
    )
    for axes, one in zip(all_axes[0], plots, strict=True):
        _draw_bars(axes, one) if isinstance(one, Bars) else _draw_lines(axes, one)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plot: {path}")


def _draw_lines(axes: Any, one: Axes) -> None:
    for line in one.lines:
        axes.errorbar(line.x, line.y, line.spread, label=line.label, marker="o", capsize=2)
    if one.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")
    if one.log_y:
        _label_plainly(axes)
    axes.set(title=one.title, xlabel=one.x, ylabel=one.y)
    if one.lines:
        axes.legend(fontsize="small")


def _label_plainly(axes: Any) -> None:
    """A logarithmic axis for y with labels such as 0.1, 0.2, 0.5, 1."""

    def label(y: float, _: Any) -> str:
        leading = round(y / 10 ** math.floor(math.log10(y) + 1e-9))
        return f"{y:g}" if leading in (1, 2, 5) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(label)
    axes.yaxis.set_minor_formatter(label)


def _draw_bars(axes: Any, one: Bars) -> None:
    bars = axes.barh(list(one.values), list(one.values.values()))
    axes.bar_label(bars, fmt="{:.3g}", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(title=one.title, xlabel=one.unit)
