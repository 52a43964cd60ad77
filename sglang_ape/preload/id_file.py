"""The id file: what was registered, one line a document, written so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from sglang_ape.preload.documents import InputError


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
