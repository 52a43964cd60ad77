"""The validation file: JSON lines, checked as a whole before anything is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_SHOWN_ERRORS = 10

Filled = Annotated[str, Field(min_length=1)]


class InputError(Exception):
    """An input is not what it should be; the message is for the user."""


class Message(BaseModel):
    """One of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Filled
    content: str


class Example(BaseModel):
    """One line of the file.

    Attributes:
        contexts: as in a request.
        query: Q, or ``messages``, in which the contexts stand before the content of the first
            user message.
        prefix: P of this row, beside ``query``.
        answers: accepted answers; a row without them has no part in accuracies.
        split: the part that the row belongs to; in a file that gives it, every row has one.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    contexts: Annotated[list[Filled], Field(min_length=1)]
    query: Filled | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    prefix: str | None = None
    answers: Annotated[list[Filled], Field(min_length=1)] | None = None
    split: Literal["validation", "held_out"] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Example:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either query or messages")
        if self.messages is not None:
            if self.prefix is not None:
                raise ValueError("prefix cannot stand beside messages, which hold it")
            if "user" not in [message.role for message in self.messages]:
                raise ValueError("messages need a user message, where the contexts stand")
        return self


@dataclass(frozen=True)
class Line:
    """An example and where it stands."""

    number: int  # from 1
    example: Example


class Parts(NamedTuple):
    """What settings are chosen on, and what they are then tried on."""

    validation: list[Line]
    held_out: list[Line]


def load(path: Path) -> list[Line]:
    """Read and check the whole file; blank lines are left out.

    Raises:
        InputError: names the wrong lines, of many the first.
        OSError: the file cannot be read.
    """
    lines: list[Line] = []
    errors: list[str] = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if not raw or raw.isspace():
            continue
        try:
            lines.append(Line(number, _parsed(raw)))
        except ValueError as error:
            errors.append(f"{path}, line {number}: {error}")
    if not errors:
        errors = _split_errors(path, lines)
    if len(errors) > _SHOWN_ERRORS:
        errors[_SHOWN_ERRORS:] = [f"and {len(errors) - _SHOWN_ERRORS} further lines"]
    if errors or not lines:
        raise InputError("\n".join(errors) or f"{path} holds no row")
    return lines


def divide(lines: Sequence[Line], held_out: float, seed: int) -> Parts:
    """By the rows' own ``split``, else by a shuffle with the seed.

    Args:
        lines: at least one.
        held_out: share of the rows, 0 to below 1, rounded; one row is always kept to choose on.
        seed: of the shuffle. Both parts keep the order of the file.

    Raises:
        InputError: no row is left to choose on.
    """
    if lines[0].example.split is not None:
        chosen = [line for line in lines if line.example.split == "validation"]
        if not chosen:
            raise InputError('no row has the split "validation"')
        return Parts(chosen, [line for line in lines if line.example.split == "held_out"])
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    away = set(order[: min(round(held_out * len(lines)), len(lines) - 1)])
    return Parts(
        [line for i, line in enumerate(lines) if i not in away],
        [line for i, line in enumerate(lines) if i in away],
    )


def _parsed(raw: bytes) -> Example:
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"must be an object, got {type(fields).__name__}")
    try:
        return Example.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{name}: {message}" if name else message) from None


def _split_errors(path: Path, lines: Sequence[Line]) -> list[str]:
    """Rows without a split in a file that gives one to others."""
    without = [line.number for line in lines if line.example.split is None]
    if len(without) in (0, len(lines)):
        return []
    return [f"{path}, line {number}: split is missing, other rows have one" for number in without]
