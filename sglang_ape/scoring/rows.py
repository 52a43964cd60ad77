"""The rows that score contexts, and how their answers are read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sglang_ape.entry.call import Ids
from sglang_ape.entry.expand import joined_ids
from sglang_ape.spec import ProbeSpec, ScoreSpec


class Room(NamedTuple):
    """What one scoring row may hold."""

    copies: int  # tokens of all copies of the query
    tokens: int  # in all


class ScoreRow(NamedTuple):
    """One scoring request."""

    input_ids: array  # of type "q"
    spec: ScoreSpec | ProbeSpec
    contexts: tuple[int, ...]  # which ones it scores; one for each copy of a ScoreSpec

    @property
    def scored_tokens(self) -> int:
        """Those behind the contexts."""
        return len(self.input_ids) - self.spec.context_end


def score_rows(
    prefix: Ids, contexts: Sequence[Ids], query: Ids, wanted: Sequence[int], room: Room
) -> Iterator[ScoreRow]:
    """Lay out rows that score some contexts of a request; each has at least one.

    Args:
        prefix: P.
        contexts: of the request.
        query: Q.
        wanted: indices of those to score.
        room: of one row.
    """
    chosen: list[int] = []
    copies, tokens = 0, len(prefix)
    for i in wanted:
        copy = 1 + len(query)
        more = copy + len(contexts[i])
        if chosen and (copies + copy > room.copies or tokens + more > room.tokens):
            yield _row(prefix, contexts, query, chosen)
            chosen, copies, tokens = [], 0, len(prefix)
        chosen.append(i)
        copies, tokens = copies + copy, tokens + more
    if chosen:
        yield _row(prefix, contexts, query, chosen)


def likelihoods(row: ScoreRow, logprobs: Sequence[Sequence[Any]]) -> list[float]:
    """log P(Q | P, C) of each context of a row, in nats.

    Args:
        row: as it was asked.
        logprobs: SGLang's ``input_token_logprobs`` from the first copy on: pairs that begin with
            the log-probability of a token.

    Raises:
        RuntimeError: their number is not that of the copies' tokens.
    """
    assert isinstance(row.spec, ScoreSpec)
    size, count = row.spec.copy_len, len(row.contexts)
    if len(logprobs) != size * count:
        raise RuntimeError(f"{len(logprobs)} log-probabilities for {count} copies of {size} tokens")
    # The first token of a copy is the last of its context, which nothing is asked of.
    return [
        math.fsum(one[0] for one in logprobs[k * size + 1 : (k + 1) * size]) for k in range(count)
    ]


def _row(prefix: Ids, contexts: Sequence[Ids], query: Ids, chosen: Sequence[int]) -> ScoreRow:
    own = [contexts[i] for i in chosen]
    copies = [part for context in own for part in (context[-1:], query)]
    spec = ScoreSpec.of(len(prefix), [len(context) for context in own], 1 + len(query))
    return ScoreRow(joined_ids(prefix, *own, *copies), spec, tuple(chosen))
