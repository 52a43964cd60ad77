"""Rows of data sets: from JSONL files, and the errors that say what is wrong with them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

HELD_OUT = 0.1  # of the rows, where a set does not say which ones are to be asked


class DataError(Exception):
    """A data set has not what is needed; the message says where and what."""


class Unavailable(Exception):
    """A data set cannot be loaded here, for instance without a network."""


class Row(NamedTuple):
    """One row, and where it stands, for messages."""

    where: str
    values: Mapping[str, Any]

    def get(self, name: str, kind: type[T]) -> T:
        """The value of a column.

        Raises:
            DataError: it is not there, or of another type, or an empty text.
        """
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            raise DataError(f"{self.where}: {name!r} must be of type {kind.__name__}: {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The value of a column that holds a list of texts, at least one.

        Raises:
            DataError: it holds anything else.
        """
        values = self.get(name, list)
        if not values or not all(isinstance(one, str) and one.strip() for one in values):
            raise DataError(f"{self.where}: {name!r} must be a list of texts: {values!r:.200}")
        return tuple(values)

    def rows(self, name: str) -> list[Row]:
        """The value of a column that holds a list of objects."""
        values = self.get(name, list)
        if not all(isinstance(one, dict) for one in values):
            raise DataError(f"{self.where}: {name!r} must be a list of objects")
        return [Row(f"{self.where}, {name}[{i}]", one) for i, one in enumerate(values)]


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSONL file, which may be compressed (``.gz``).

    Raises:
        DataError: the file cannot be read, has no rows, or a line is not a JSON object.
    """
    rows = []
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(Row(f"{path.name}, line {number}", json.loads(line)))
                    if not isinstance(rows[-1].values, dict):
                        raise DataError(f"{rows[-1].where}: not a JSON object")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}, line {len(rows) + 1} or after: {error}") from error
    if not rows:
        raise DataError(f"{path.name} has no rows")
    return rows


def held_out(rows: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Divide rows into those to draw from and a tenth to ask.

    Args:
        rows: at least two.
        seed: decides which.

    Raises:
        DataError: there are fewer.
    """
    if len(rows) < 2:
        raise DataError("a data set needs two rows at least: one to show and one to ask")
    shuffled = random.Random(f"held out {seed}").sample(rows, len(rows))
    asked = max(1, round(HELD_OUT * len(rows)))
    return shuffled[asked:], shuffled[:asked]
