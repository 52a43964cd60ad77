"""Data of many-shot learning: examples to show and questions to ask, from files and the hub."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import hub
from benchmarks.common.data import DataError, Row, held_out, read_jsonl
from benchmarks.common.scores import is_number

TO_SHOW = ("pool", "train")  # values of a file's column ``split``
TO_ASK = ("dev", "validation", "test")

_FINAL = "####"  # stands before the final number in GSM8K's solutions
_CALCULATOR = re.compile(r"<<[^>]*>>")


class Example(NamedTuple):
    """One example, to show or to ask.

    Attributes:
        text: to classify, or a problem.
        answer: the label, or the final number.
        solution: the chain of thought that leads to the number; empty for a label.
    """

    text: str
    answer: str
    solution: str = ""


class Examples(NamedTuple):
    """A data set.

    Attributes:
        name: for tables and files.
        pool: what may be shown; none of its texts is asked.
        asked: what may be asked.
        labels: of a classification, sorted; none for problems with a number as their answer.
    """

    name: str
    pool: tuple[Example, ...]
    asked: tuple[Example, ...]
    labels: tuple[str, ...]


def load(given: str, seed: int) -> Examples:
    """A data set by its public name or the path of a JSONL file.

    Args:
        given: a name or repository of :data:`benchmarks.common.hub.SOURCES`, or a path.
        seed: decides what is asked, if the set does not say.

    Raises:
        DataError: there is no such name, or the data is not what it should be.
        Unavailable: the hub cannot be reached.
    """
    for name, source in hub.SOURCES.items():
        if given in (name, source.repository):
            return _from_hub(name, source, seed)
    path = Path(given)
    if not path.is_file():
        known = ", ".join(hub.SOURCES)
        raise DataError(f"{given!r} is neither a file nor one of {known}")
    return from_rows(path.name.split(".")[0], read_jsonl(path), seed)


def from_rows(name: str, rows: Sequence[Row], seed: int) -> Examples:
    """The data set of a file.

    Rows have ``text`` and ``label``, or ``question`` and ``answer``: a number, with the chain of
    thought in ``solution``, or GSM8K's own form, which ends with ``####`` and the number. A column
    ``split`` (``pool`` or ``train``; ``dev``, ``validation`` or ``test``) says what is shown and
    what is asked; without it a tenth of the rows is asked.

    Raises:
        DataError: a row is different.
    """
    read = _labelled if "label" in rows[0].values else _solved
    if "split" not in rows[0].values:
        return _examples(name, *held_out([read(row) for row in rows], seed))
    splits: dict[str, list[Example]] = {split: [] for split in (*TO_SHOW, *TO_ASK)}
    for row in rows:
        split = row.get("split", str)
        if split not in splits:
            raise DataError(f"{row.where}: 'split' must be one of {', '.join(splits)}: {split!r}")
        splits[split].append(read(row))
    pool = [one for split in TO_SHOW for one in splits[split]]
    return _examples(name, pool, [one for split in TO_ASK for one in splits[split]])


def in_order(data: Examples, seed: int) -> list[Example]:
    """Every example of the pool, so ordered that each beginning is balanced over the labels.

    The order consists of rounds with one example of each label; labels that have run out are
    missing in later rounds. Fewer shots are thus always a beginning of more.

    Args:
        data: whose pool is ordered; problems without labels are shuffled.
        seed: of the order.
    """
    drawn = random.Random(f"shots {seed}")
    groups: dict[str, list[Example]] = {}
    for example in data.pool:
        groups.setdefault(example.answer if data.labels else "", []).append(example)
    for group in groups.values():
        drawn.shuffle(group)
    order = []
    for number in range(max(map(len, groups.values()))):
        left = [group[number] for group in groups.values() if number < len(group)]
        order += drawn.sample(left, len(left))
    return order


def first_shots(data: Examples, shots: int, seed: int) -> list[Example]:
    """The beginning of :func:`in_order`.

    Raises:
        DataError: the pool has fewer examples.
    """
    if shots > len(data.pool):
        raise DataError(f"{data.name} has {len(data.pool)} examples to show, not {shots}")
    return in_order(data, seed)[:shots]


def questions(data: Examples, count: int | None, seed: int) -> list[Example]:
    """Some of what may be asked, drawn at random; all of it, in its own order, for None.

    Raises:
        DataError: there are fewer.
    """
    if count is None:
        return list(data.asked)
    if count > len(data.asked):
        raise DataError(f"{data.name} has {len(data.asked)} questions, not {count}")
    return random.Random(f"questions {seed}").sample(data.asked, count)


def _from_hub(name: str, source: hub.Source, seed: int) -> Examples:
    read = _solved if name == "gsm8k" else _classified
    pool = [read(row) for row in hub.load(source, hub.POOL)]
    if source.questions is None:
        return _examples(name, *held_out(pool, seed))
    return _examples(name, pool, [read(row) for row in hub.load(source, source.questions)])


def _examples(name: str, pool: Iterable[Example], asked: Sequence[Example]) -> Examples:
    texts = {example.text for example in asked}
    kept = tuple(example for example in pool if example.text not in texts)
    if not kept or not asked:
        raise DataError(f"{name} has {len(kept)} examples to show and {len(asked)} to ask")
    labels = {one.answer for one in (*kept, *asked)} if not kept[0].solution else set()
    return Examples(name, kept, tuple(asked), tuple(sorted(labels)))


def _labelled(row: Row) -> Example:
    return Example(row.get("text", str), _readable(row.get("label", str)))


def _classified(row: Row) -> Example:
    return Example(row.get("text", str), _readable(row.get("answer", str)))


def _readable(label: str) -> str:
    return label.replace("_", " ")


def _solved(row: Row) -> Example:
    problem = row.get("text" if "text" in row.values else "question", str)
    answer = row.get("answer", str)
    if "solution" in row.values:
        solution = row.get("solution", str)
    else:
        solution, _, answer = answer.rpartition(_FINAL)
    solution, answer = _CALCULATOR.sub("", solution).strip(), answer.strip()
    if not solution or not is_number(answer):
        raise DataError(f"{row.where}: a solution and a number are needed: {answer!r:.100}")
    return Example(problem, answer, solution)
