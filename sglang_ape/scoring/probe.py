"""The row that measures how much a query attends to each context."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ape.entry.call import Ids
from sglang_ape.entry.expand import joined_ids
from sglang_ape.scoring.rows import ScoreRow
from sglang_ape.spec import MOST_NULL_TOKENS, ProbeSpec

NULL_TEXT = "N/A"

TAIL = 5
"""Tokens at the end of Q that say nothing of the question: what a chat template puts behind it, or
a line break and "Answer:". The null query ends with them too, since each context gets attention
from them whatever is asked."""


def null_query(own: Ids, query: Ids) -> Ids:
    """A query that asks for nothing, in the form of ``query``.

    Args:
        own: ``NULL_TEXT`` in tokens.
        query: Q; of a short one, the tail is its second half.
    """
    tail = min(TAIL, len(query) // 2)
    return own[: MOST_NULL_TOKENS - TAIL] + query[len(query) - tail :]


def probe_row(prefix: Ids, contexts: Sequence[Ids], query: Ids, own: Ids) -> ScoreRow:
    """The row ``P + C_1 + ... + C_N + Q + null``.

    Args:
        prefix: P.
        contexts: of the request, all of them.
        query: Q.
        own: ``NULL_TEXT`` in tokens.
    """
    null = null_query(own, query)
    spec = ProbeSpec.of(len(prefix), [len(one) for one in contexts], len(query), len(null))
    ids = joined_ids(prefix, *contexts, query, null)
    return ScoreRow(ids, spec, tuple(range(len(contexts))))
