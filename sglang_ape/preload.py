"""Register every document of a JSONL file with a server's context store.

    python -m sglang_ape.preload --url http://127.0.0.1:30000 documents.jsonl

A line of the file is a JSON string, or an object with the field ``text`` (``--text-field``) or
``input_ids``. The ids of the documents go into an id file, after every batch; a run that ended
early is taken up by the same command, and documents that the server still knows are not sent again.

Exit status: 0, done; 1, the server refused or went away; 2, the input is wrong and nothing was
sent; 130, interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import requests
from tqdm import tqdm

from sglang_ape.client import ContextStore
from sglang_ape.errors import ApeRequestError

API_KEY_VARIABLE = "SGLANG_API_KEY"
_SHOWN_ERRORS = 10


class InputError(Exception):
    """A file is not what it should be; the message is for the user."""


##### The documents


class Document(NamedTuple):
    """One line of the input."""

    line: int  # from 1
    sha256: str  # of the text in UTF-8; of ids, see _sha256_of_ids
    context: str | dict[str, list[int]]  # as ContextStore.register takes it


class Line(NamedTuple):
    """What is kept of a document."""

    number: int
    sha256: str


def documents(path: Path, text_field: str) -> Iterator[Document | InputError]:
    """The documents of a JSONL file, and for a wrong line its error; blank lines are left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.isspace():
                try:
                    yield Document(number, *_parsed(raw, text_field))
                except ValueError as error:
                    yield InputError(f"{path}, line {number}: {error}")


def survey(path: Path, text_field: str) -> list[Line]:
    """Check the whole file.

    Raises:
        InputError: names every wrong line, or the first few of many.
    """
    lines: list[Line] = []
    errors: list[str] = []
    for found in documents(path, text_field):
        if isinstance(found, InputError):
            errors.append(str(found))
        else:
            lines.append(Line(found.line, found.sha256))
    if len(errors) > _SHOWN_ERRORS:
        errors[_SHOWN_ERRORS:] = [f"and {len(errors) - _SHOWN_ERRORS} further lines"]
    if errors or not lines:
        raise InputError("\n".join(errors) or f"{path} holds no document")
    return lines


def _parsed(raw: bytes, text_field: str) -> tuple[str, str | dict[str, list[int]]]:
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
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError("'input_ids' must be a list of integers that are not negative")
    if not ids:
        raise ValueError("'input_ids' is empty")
    return _sha256_of_ids(ids), {"input_ids": ids}


def _sha256_of_ids(ids: list[int]) -> str:
    """Of the byte FF, which no text in UTF-8 holds, and the ids as JSON without blanks."""
    return hashlib.sha256(b"\xff" + orjson.dumps(ids)).hexdigest()


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


##### The id file


class Record(NamedTuple):
    """A line of the id file."""

    line: int  # of the document
    sha256: str  # of the document
    id: str
    tokens: int
    settings: str  # hash of what else the id depends on: see Settings


_START = b'{"line":'  # of every record


class IdFile:
    """The records of one run after another: appended to, and in the end written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> list[Record]:
        """Make sure of a file that can be appended to; a line that a crash cut off is removed.

        Raises:
            InputError: it is a file of something else, and was left as it is.
        """
        with self.path.open("a+b") as file:
            file.seek(0)
            whole, _, rest = file.read().rpartition(b"\n")
            records = [self._parsed(raw, i) for i, raw in enumerate(whole.splitlines(), 1)]
            if rest[: len(_START)] != _START[: len(rest)]:
                raise self._foreign(len(records) + 1)
            file.truncate(file.tell() - len(rest))
        return records

    def append(self, records: Sequence[Record]) -> None:
        with self.path.open("ab") as file:
            file.write(_dumped(records))

    def rewrite(self, records: Sequence[Record]) -> None:
        """Replace all of it at once: at any moment the file is the old one or the new one."""
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with new.open("wb") as file:
                file.write(_dumped(records))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        finally:
            new.unlink(missing_ok=True)

    def _parsed(self, raw: bytes, number: int) -> Record:
        try:
            record = Record(**orjson.loads(raw))
        except (ValueError, TypeError):
            raise self._foreign(number) from None
        if [*map(type, record)] != [int, str, str, int, str]:
            raise self._foreign(number)
        return record

    def _foreign(self, number: int) -> InputError:
        return InputError(f"{self.path}, line {number}: not a line of an id file; name another")


def _dumped(records: Sequence[Record]) -> bytes:
    return b"".join(orjson.dumps(record._asdict()) + b"\n" for record in records)


##### The run


@dataclass(frozen=True)
class Settings:
    """How the documents are registered, the same for all of a run.

    Attributes:
        before: ``prefix`` or ``messages`` of :meth:`ContextStore.register`, or nothing.
        tenant: its ``lora_path`` and ``extra_key``, where they were given.
        pin: whether the documents are pinned.
    """

    before: Mapping[str, Any]
    tenant: Mapping[str, str]
    pin: bool

    @property
    def digest(self) -> str:
        """The same for runs in which equal documents have equal ids."""
        whole = json.dumps([self.before, self.tenant], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass
class Counts:
    """Of the documents that were sent."""

    documents: int = 0
    tokens: int = 0
    cached_tokens: int = 0  # the server had not to compute them


class Preload:
    """One run.

    Args:
        store: of the server.
        ids: the id file.
        settings: of the run.
        lines: of all documents.
    """

    def __init__(
        self, store: ContextStore, ids: IdFile, settings: Settings, lines: Sequence[Line]
    ) -> None:
        self.counts = Counts()
        self._store = store
        self._ids = ids
        self._settings = settings
        self._lines = lines
        self._known: dict[str, Record] = {}  # by hash, in this run

    @property
    def done(self) -> int:
        """How many documents are registered."""
        return sum(line.sha256 in self._known for line in self._lines)

    def resume(self, recorded: Sequence[Record]) -> None:
        """Take over what an earlier run registered in the same way, if the server still knows."""
        mine = [record for record in recorded if record.settings == self._settings.digest]
        if not mine:
            return
        pin = self._settings.pin
        known = {one["id"] for one in self._listed() if one["pinned"] or not pin}
        self._known = {record.sha256: record for record in mine if record.id in known}

    def send(self, found: Iterator[Document | InputError], batch_size: int) -> None:
        """Register what is not known yet, equal documents once.

        Raises:
            InputError: a document is refused, or is not there any more.
        """
        missing = {line.sha256 for line in self._lines} - set(self._known)
        with self._progress() as progress:
            batch: list[Document] = []
            for document in found:
                if isinstance(document, InputError):
                    raise document
                if document.sha256 in missing:
                    missing.remove(document.sha256)
                    batch.append(document)
                if len(batch) == batch_size:
                    progress(self._send(batch))
                    batch = []
            if batch:
                progress(self._send(batch))
        if missing:
            raise InputError("the documents were changed while they were read")
"""x"""
