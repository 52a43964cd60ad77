"""The documents: a JSONL file, checked as a whole before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

_SHOWN_ERRORS = 10


class InputError(Exception):
    """A file is not what it should be; the message is for the user."""


class Document(NamedTuple):
    """One line of the input."""

    line: int  # from 1
    sha256: str  # of the text in UTF-8; of ids, see _ids
    context: str | dict[str, list[int]]  # as ContextStore.register takes it


class Documents:
    """A JSONL file, read line by line as often as needed; blank lines are left out.

    Args:
        path: of the file.
        text_field: of those lines that are objects.
    """

    def __init__(self, path: Path, text_field: str) -> None:
        self.path = path
        self._text_field = text_field

    def __iter__(self) -> Iterator[Document]:
        return (self._parsed(number, raw) for number, raw in self._lines())

    def survey(self) -> list[tuple[int, str]]:
        """Check the whole file.

        Returns:
            Number and hash of each line.

        Raises:
            InputError: names the wrong lines, of many the first.
        """
        found: list[tuple[int, str]] = []
        errors: list[str] = []
        for number, raw in self._lines():
            try:
                found.append(self._parsed(number, raw)[:2])
            except InputError as error:
                errors.append(str(error))
        if len(errors) > _SHOWN_ERRORS:
            errors[_SHOWN_ERRORS:] = [f"and {len(errors) - _SHOWN_ERRORS} further lines"]
        if errors or not found:
            raise InputError("\n".join(errors) or f"{self.path} holds no document")
        return found

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from ((number, raw) for number, raw in enumerate(file, 1) if not raw.isspace())

    def _parsed(self, number: int, raw: bytes) -> Document:
        try:
            return Document(number, *_hashed(raw, self._text_field))
        except ValueError as error:
            raise InputError(f"{self.path}, line {number}: {error}") from None


def _hashed(raw: bytes, text_field: str) -> tuple[str, str | dict[str, list[int]]]:
    """Hash and context of a line; raises ValueError."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    if isinstance(value, str):
        return _text(value, "the text")
    if not isinstance(value, dict):
        raise ValueError(f"must be a string or an object, got {_kind(value)}")
    given = [name for name in dict.fromkeys((text_field, "input_ids")) if name in value]
    if len(given) != 1:
        what = "both" if given else "neither"
        raise ValueError(f"has {what} of the fields {text_field!r} and 'input_ids'")
    if given == ["input_ids"]:
        return _ids(value["input_ids"])
    return _text(value[text_field], repr(text_field))


def _text(text: Any, name: str) -> tuple[str, str]:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {_kind(text)}")
    if not text:
        raise ValueError(f"{name} is empty")
    return hashlib.sha256(text.encode()).hexdigest(), text


def _ids(ids: Any) -> tuple[str, dict[str, list[int]]]:
    """The hash is that of the byte FF, which no UTF-8 holds, and the ids as JSON, no blanks."""
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError("'input_ids' must be a list of integers that are not negative")
    if not ids:
        raise ValueError("'input_ids' is empty")
    return hashlib.sha256(b"\xff" + orjson.dumps(ids)).hexdigest(), {"input_ids": ids}


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
