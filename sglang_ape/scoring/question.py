"""What is asked of a scorer, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_ape.entry.call import Ids
from sglang_ape.store.contexts import Tenant


class Question(NamedTuple):
    """The contexts of one request, and the query they are scored by."""

    tenant: Tenant
    prefix: Ids
    contexts: Sequence[Ids]
    query: Ids
    rid: str | None  # of the request, as its caller names it
    priority: int | None


class Scores(NamedTuple):
    """What scoring found, and what it took."""

    by_context: tuple[float, ...]  # log P(Q | P, C) in nats
    scored_tokens: int = 0  # of copies of the query, that were computed
    encoded_tokens: int = 0  # of P and the contexts, likewise: they are cached now
