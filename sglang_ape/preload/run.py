"""One run: what is missing goes to the server, batch after batch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sglang_ape.client import ContextStore
from sglang_ape.errors import ApeRequestError
from sglang_ape.preload.documents import Document, Documents, InputError
from sglang_ape.preload.id_file import IdFile, Record


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
