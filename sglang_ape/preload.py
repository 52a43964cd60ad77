"""Register every document of a JSONL file with a server's context store.

    python -m sglang_ape.preload --url http://127.0.0.1:30000 documents.jsonl

A line of the file is a JSON string, or an object with the field ``text`` (``--text-field``) or
``input_ids``. The ids go into a second JSONL file, after every batch: a run that ended early is
taken up by the same command. What stands in that file and is known to the server is not sent again;
remove the file to have everything sent.

Exit status: 0, done; 1, the server refused something or went away; 2, the input is wrong and
nothing was sent; 130, interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
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
    tenant: Mapping[str, Any]
    pin: bool

    @property
    def digest(self) -> str:
        """The same for runs in which equal documents have equal ids."""
        whole = json.dumps([self.before, self.tenant], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass
class Sent:
    """What a run sent to the server."""

    documents: int = 0
    tokens: int = 0
    cached_tokens: int = 0  # of them, that the server had not to compute


class Preload:
    """One run.

    Args:
        store: of the server.
        documents: to be registered.
        id_file: where their ids go.
        settings: how they are registered.

    Raises:
        InputError: a line of either file is wrong.
    """

    def __init__(
        self, store: ContextStore, documents: Documents, id_file: IdFile, settings: Settings
    ) -> None:
        self.sent = Sent()
        self._store = store
        self._documents = documents
        self._id_file = id_file
        self._settings = settings
        self._lines = documents.survey()
        self._copies = Counter(sha256 for _, sha256 in self._lines)
        self._recorded = id_file.open()
        self._known: dict[str, Record] = {}  # by hash: what needs not be sent

    @property
    def progress(self) -> str:
        """What was done, for the user of a run that ended early."""
        return (
            f"documents registered by this run: {self.sent.documents:,}; the same command goes on "
            f"from {self._id_file.path}"
        )

    def run(self, batch_size: int) -> None:
        """Register what the server does not know yet, equal documents once, and write the ids.

        Raises:
            InputError: the server refused a document, or the file was changed meanwhile.
            ApeRequestError: the server refused something else.
            requests.RequestException: it did not answer.
            OSError: a file cannot be read or written.
        """
        self._resume()
        missing = self._copies.keys() - self._known.keys()
        left = sum(self._copies[sha256] for sha256 in missing)
        bar = tqdm(
            total=len(self._lines),
            initial=len(self._lines) - left,
            unit=" documents",
            disable=None,  # where it would go into a log
        )
        with bar:
            for batch in self._batches(missing, batch_size):
                self._send(batch)
                bar.set_postfix(tokens=self.sent.tokens, cached=self.sent.cached_tokens)
                bar.update(sum(self._copies[document.sha256] for document in batch))
        if missing:
            raise InputError(f"{self._documents.path} was changed while it was read")
        self._id_file.rewrite(self._records())

    def summary(self) -> list[str]:
        """Lines for the user, with what the server holds now; after :meth:`run`."""
        records, sent = self._records(), self.sent
        cached = {one["id"]: one["cached_tokens"] for one in self._listed()}
        tokens = sum(record.tokens for record in records)
        cached_tokens = sum(cached.get(record.id, 0) for record in records)
        whole = sum(cached.get(record.id, 0) >= record.tokens for record in records)
        forgotten = sum(record.id not in cached for record in records)
        lines = [
            f"documents   {len(records):,}, of which {sent.documents:,} were sent",
            f"tokens      {tokens:,}, of which {sent.tokens:,} were sent",
            f"  computed  {sent.tokens - sent.cached_tokens:,}",
            f"  cached    {sent.cached_tokens:,} already",
            f"cached now  {whole:,} documents; {cached_tokens:,} tokens",
            f"ids         {self._id_file.path}",
        ]
        if whole < len(records):
            lines.append(
                f"Documents not, or not wholly, cached now: {len(records) - whole:,}; the KV pool "
                "has no room for all of them, or they were evicted since. Requests compute what is "
                "missing."
            )
        if forgotten:
            lines.append(
                f"Documents no longer known, whose ids requests cannot use: {forgotten:,}; the "
                "store has no room for all of them (--ape-store-max-tokens)."
            )
        return lines

    def _resume(self) -> None:
        """Take over what earlier runs registered in the same way, if the server still knows it."""
        digest, pin = self._settings.digest, self._settings.pin
        mine = [record for record in self._recorded if record.settings == digest]
        if mine:
            known = {one["id"] for one in self._listed() if one["pinned"] or not pin}
            self._known = {record.sha256: record for record in mine if record.id in known}

    def _batches(self, missing: set[str], size: int) -> Iterator[list[Document]]:
        """The missing documents, in order; each is taken out of ``missing``."""
        batch: list[Document] = []
        for document in self._documents:
            if document.sha256 in missing:
                missing.remove(document.sha256)
                batch.append(document)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _send(self, batch: Sequence[Document]) -> None:
        """Register a batch, and then write down its ids."""
        contexts = [document.context for document in batch]
        settings = self._settings
        try:
            answers = self._store.register(
                contexts, pin=settings.pin, **settings.before, **settings.tenant
            )
        except ApeRequestError as error:
            document = _blamed(error, batch)
            if document is None:
                raise
            raise InputError(f"{self._documents.path}, line {document.line}: {error}") from error
        records = [
            Record(document.line, document.sha256, one["id"], one["tokens"], settings.digest)
            for document, one in zip(batch, answers, strict=True)
        ]
        self._id_file.append(records)
        self._known.update((record.sha256, record) for record in records)
        self.sent.documents += len(batch)
        self.sent.tokens += sum(one["tokens"] for one in answers)
        self.sent.cached_tokens += sum(one["cached_tokens"] for one in answers)

    def _listed(self) -> Iterator[dict[str, Any]]:
        return self._store.contexts(**self._settings.tenant)

    def _records(self) -> list[Record]:
        """One for each document, in order."""
        return [self._known[sha256]._replace(line=number) for number, sha256 in self._lines]


def _blamed(error: ApeRequestError, batch: Sequence[Document]) -> Document | None:
    """The document that a refusal names as ``contexts[3]``, if it names one."""
    found = re.match(r"contexts\[(\d+)\]", error.param or "")
    return batch[int(found[1])] if found else None


##### The command


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = _parser().parse_args(argv)
    try:
        preload = _prepared(args)
    except (InputError, ApeRequestError, OSError, UnicodeDecodeError) as error:
        return _ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _ended("interrupted, nothing was sent", 130)
    try:
        preload.run(args.batch_size)
        summary = preload.summary()
    except KeyboardInterrupt:
        return _ended(f"interrupted: {preload.progress}", 130)
    except (InputError, ApeRequestError, OSError) as error:  # OSError: also those of requests
        return _ended(f"error: {_explained(error, args)}\n{preload.progress}", 1)
    print(*summary, f"time        {time.monotonic() - started:.1f} s", sep="\n")
    return 0


def _prepared(args: argparse.Namespace) -> Preload:
    api_key = args.api_key or os.environ.get(API_KEY_VARIABLE) or None
    store = ContextStore(args.url, api_key, timeout=args.timeout)
    ids = args.ids or args.documents.with_name(f"{args.documents.name}.ids.jsonl")
    tenant = {"lora_path": args.lora_path, "extra_key": args.extra_key}
    settings = Settings(
        _before(args), {name: text for name, text in tenant.items() if text is not None}, args.pin
    )
    return Preload(store, Documents(args.documents, args.text_field), IdFile(ids), settings)


def _before(args: argparse.Namespace) -> dict[str, Any]:
    if args.system is not None:
        return {"messages": [{"role": "system", "content": args.system}]}
    if args.prefix_file is not None:
        return {"prefix": args.prefix_file.read_bytes().decode()}  # line ends as they are
    return {} if args.prefix is None else {"prefix": args.prefix}


def _ended(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """In one line."""
    if isinstance(error, requests.ReadTimeout):
        return f"{args.url} did not answer within {args.timeout:g} s (--timeout)"
    message = " ".join(str(error).split())
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {args.url}: {message}"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ape.preload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("documents", type=Path, metavar="FILE", help="the documents, in JSON lines")
    add("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    add("--text-field", default="text", metavar="NAME", help="field of a text (default: text)")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--prefix", metavar="TEXT", help="the text before each document")
    before.add_argument("--prefix-file", type=Path, metavar="FILE", help="a file with that text")
    before.add_argument(
        "--system", metavar="TEXT", help="for chats: the system message that they will have"
    )
    add("--pin", action="store_true", help="keep the documents from being evicted")
    add("--lora-path", metavar="NAME", help="name of the adapter that will use them")
    add("--extra-key", metavar="KEY", help="SGLang's namespace of cached prompts")
    add(
        "--api-key",
        metavar="KEY",
        help=f"of the server (default: ${API_KEY_VARIABLE}, which other users of the machine do "
        "not see)",
    )
    add(
        "--ids",
        type=Path,
        metavar="FILE",
        help="where the ids go (default: FILE.ids.jsonl, beside the documents); one file for each "
        "prefix, adapter and key",
    )
    add("--batch-size", type=_positive(int), default=32, metavar="N", help="documents a call")
    add(
        "--timeout",
        type=_positive(float),
        default=600.0,
        metavar="SECONDS",
        help="how long a call may take (default: 600)",
    )
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parsed.__name__ = f"positive {kind.__name__}"
    return parsed


if __name__ == "__main__":
    sys.exit(main())
