"""From checked requests, and scores of their contexts, to the token rows that SGLang gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_ape.entry import expand
from sglang_ape.entry.prepare import Asked, queries_of, sampling_params_of
from sglang_ape.entry.report import RowParts
from sglang_ape.scoring.choice import biases, highest
from sglang_ape.scoring.question import Scores
from sglang_ape.store.contexts import context_id, digest_of

if TYPE_CHECKING:
    from sglang_ape.entry.tokenizer_manager import Entry


def lay_out(
    entry: Entry,
    obj: Any,
    asked: Sequence[Asked],
    scores: Sequence[Scores | None] | None = None,
) -> list[RowParts]:
    """Replace the text or ids of ``obj`` by rows.

    Args:
        entry: of the engine.
        obj: as it was prepared.
        asked: its requests.
        scores: of those that want them.

    Returns:
        What each row is made of.
    """
    batched = queries_of(obj)[1]
    sampling = sampling_params_of(obj.sampling_params, len(asked))
    rows, parts = [], []
    for i, (one, found) in enumerate(zip(asked, scores or [None] * len(asked), strict=True)):
        row, of_row = _row(entry, one, found)
        parts.append(of_row)
        if row.spec is not None:
            custom = sampling[i].get("custom_params") or {}
            sampling[i]["custom_params"] = {**custom, **row.spec.to_custom_params()}
        rows.append(row.input_ids)
    obj.text = None
    # SGLang turns a list of ids into such an array; where it copies requests it wants lists.
    as_lists = batched or sampling[0].get("n", 1) != 1 or entry.logs_requests
    ids = [row.tolist() for row in rows] if as_lists else rows
    obj.input_ids = ids if batched else ids[0]
    obj.sampling_params = sampling if batched else sampling[0]
    return parts


def _row(entry: Entry, asked: Asked, scores: Scores | None) -> tuple[expand.Row, RowParts]:
    prefix, contexts, query, reading = asked.prefix, asked.contexts, asked.query, asked.reading
    parts = RowParts(len(prefix), (), bool(reading.refine))
    bias: tuple[float, ...] = ()
    if scores is not None:
        parts = parts._replace(
            scores=_told(entry.store.model, asked, scores.by_context),
            scored_tokens=scores.scored_tokens,
            encoded_tokens=scores.encoded_tokens,
        )
        if reading.refine:
            contexts = [contexts[i] for i in highest(scores.by_context, reading.refine)]
        else:
            bias = biases(scores.by_context, reading.soft)
    parts = parts._replace(contexts=tuple(map(len, contexts)))
    if reading.refine:
        return expand.Row(expand.joined_ids(prefix, *contexts, query), None), parts
    return expand.build_row(prefix, contexts, query, reading, bias), parts


def _told(model: str, asked: Asked, scores: Sequence[float]) -> tuple[dict[str, Any], ...]:
    digest = digest_of(asked.prefix)
    return tuple(
        {"id": context_id(model, asked.tenant, digest, context), "score": score}
        for context, score in zip(asked.contexts, scores, strict=True)
    )
