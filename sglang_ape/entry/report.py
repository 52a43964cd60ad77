"""What a request had of its contexts, told in its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import orjson

from sglang_ape.entry.call import ApeCall
from sglang_ape.metrics import EntryMetrics, RequestUsage, Usage

_EVENT = b"data: "


class RowParts(NamedTuple):
    """What a row is made of, and what was spent on it before it was asked."""

    prefix: int  # tokens of P
    contexts: tuple[int, ...]  # tokens of each
    is_refined: bool = False  # the contexts are one sequence
    scores: tuple[dict[str, Any], ...] = ()  # "id" and "score" of all contexts that were given
    scored_tokens: int = 0
    encoded_tokens: int = 0  # of P and contexts, which scoring brought into the cache


async def reported(
    answers: AsyncGenerator[Any, None],
    rows: Sequence[RowParts],
    samples: int,
    call: ApeCall,
    metrics: EntryMetrics | None,
) -> AsyncGenerator[Any, None]:
    """Add ``ape``, and ``contexts`` if they were scored, to the ``meta_info`` of each answer.

    Each request is counted once.

    Args:
        answers: of ``TokenizerManager.generate_request``.
        rows: of the call's items.
        samples: answers to each item (``n``).
        call: gets the usage, for routes that answer without ``meta_info``.
        metrics: where requests are counted, if they are.
    """
    counted: set[int] = set()
    async with aclosing(answers):
        async for answer in answers:
            for index, info in _meta_infos(answer):
                item = index // samples
                usage = usage_of(rows[item], info.get("cached_tokens", 0))
                info["cached_tokens"] = usage.cached_tokens
                info["ape"] = usage.contexts.to_dict()
                if usage.scores:
                    info["contexts"] = list(usage.scores)
                if (info.get("finish_reason") or {}).get("type") == "abort":
                    # SGLang's streams read it where logprobs are asked for; its aborts lack it.
                    info.setdefault("output_token_logprobs_length", 0)
                if index % samples == 0:
                    call.usage[item] = usage
                if metrics and info.get("finish_reason") and item not in counted:
                    counted.add(item)
                    metrics.observe_request(usage.contexts)
            yield answer


def usage_of(row: RowParts, cached_tokens: int) -> RequestUsage:
    """The cached tokens of a row are its first ones: P, then contexts.

    What its own scoring brought into the cache was computed for it.
    """
    cached_tokens = max(cached_tokens - row.encoded_tokens, 0)
    tokens = sum(row.contexts)
    cached = min(max(cached_tokens - row.prefix, 0), tokens)
    refined = tokens - cached if row.is_refined else 0
    usage = Usage(len(row.contexts), tokens, cached, row.scored_tokens, refined)
    return RequestUsage(usage, cached_tokens, row.scores)


def with_usage(body: bytes, usage: Mapping[int, RequestUsage]) -> bytes:
    """The body of an OpenAI answer, or of some events of a stream, with the contexts' usage.

    It goes to ``usage.prompt_tokens_details``, summed over the prompts of the call. Scores go to
    ``usage.contexts``; of several prompts, to a list for each.
    """
    if b'"usage"' not in body or not usage:
        return body
    if not body.startswith(_EVENT):
        return _add_details(body, usage)
    events = body.split(b"\n\n")
    return b"\n\n".join(
        _EVENT + _add_details(event[len(_EVENT) :], usage)
        if event.startswith(_EVENT + b"{")
        else event
        for event in events
    )


def _add_details(body: bytes, usage: Mapping[int, RequestUsage]) -> bytes:
    answer = orjson.loads(body)
    if not answer.get("usage"):
        return body
    details = answer["usage"].get("prompt_tokens_details") or {}
    details["cached_tokens"] = sum(one.cached_tokens for one in usage.values())
    for one in usage.values():
        for name, value in one.contexts.to_dict().items():
            details[name] = details.get(name, 0) + value
    answer["usage"]["prompt_tokens_details"] = details
    scores = [list(usage[i].scores) for i in sorted(usage)]
    if any(scores):
        answer["usage"]["contexts"] = scores if len(scores) > 1 else scores[0]
    return orjson.dumps(answer)


def _meta_infos(answer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    if isinstance(answer, list):
        for index, one in enumerate(answer):
            yield index, one["meta_info"]
    else:
        yield answer.get("index", 0), answer["meta_info"]
