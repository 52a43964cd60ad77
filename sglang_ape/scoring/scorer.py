"""Asking the engine how well each context fits a query: by the query's likelihood after the context
alone, or by its attention to the context."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_ape.concurrency import gather_or_cancel
from sglang_ape.entry.call import Ids
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.scoring.known import KnownScores, score_keys
from sglang_ape.scoring.probe import probe_row
from sglang_ape.scoring.question import Question, Scores
from sglang_ape.scoring.rows import Room, ScoreRow, likelihoods, score_rows
from sglang_ape.spec import ScoreSpec
from sglang_ape.store.contexts import Tenant

COPY_TOKENS = 4096
"""Tokens of all copies in one scoring request. More would make its row longer without need; fewer
would make more requests."""

CLIENT_CLOSED_REQUEST = 499
"""HTTP: SGLang's own answer to a request that is aborted while its prompt is being prepared."""

Generate = Callable[[GenerateReqInput, Any], AsyncGenerator[Any, None]]


class Attention(NamedTuple):
    """What scoring by attention needs."""

    null: Ids  # ``probe.NULL_TEXT`` in tokens
    take: Callable[[str], Awaitable[list[float]]]  # of ``channel.ScoresChannel``
    pinned_part: Callable[[Tenant, Ids, Sequence[Ids]], int]  # of ``store.contexts.ContextStore``


class Scorer:
    """Scores contexts through the engine's ordinary scheduler.

    Args:
        manager: the engine's ``TokenizerManager``.
        limits: of the engine.
        pinned_tokens: tells how many tokens of the KV pool are pinned now.
        attention: if contexts are scored by it.
    """

    def __init__(
        self,
        manager: Any,
        limits: Limits,
        pinned_tokens: Callable[[], int],
        attention: Attention | None = None,
    ) -> None:
        self.known = KnownScores()
        self._attention = attention
        self._manager = manager
        self._limits = limits
        self._pinned_tokens = pinned_tokens
        self._logs_requests = manager.server_args.log_requests
        self._asked: dict[str, set[str]] = {}  # by a caller's rid, those of its scoring requests

    async def score(self, question: Question, generate: Generate, request: Any) -> Scores:
        """Score every context; those known already cost nothing.

        Args:
            question: what to score.
            generate: ``TokenizerManager.generate_request`` without the hook on it.
            request: of the client, by whose going away the engine ends the work.

        Raises:
            ApeRequestError: 499, the request was aborted meanwhile.
            ValueError: the engine refused it, or the client went away.
        """
        keys = self._keys(question)
        found = {key: score for key in keys if (score := self.known.get(key)) is not None}
        places = {key: i for i, key in enumerate(keys) if key not in found}  # equal ones once
        age, encoded = self.known.age, 0
        rows = list(self._rows(question, sorted(places.values()))) if places else []
        for row, (scores, computed) in zip(
            rows, await self._ask_all(rows, question, generate, request), strict=True
        ):
            encoded += computed
            for i, score in zip(row.contexts, scores, strict=True):
                found[keys[i]] = score
                self.known.add(keys[i], score, age)
        scored = sum(row.scored_tokens for row in rows)
        return Scores(tuple(found[key] for key in keys), scored, encoded)

    def abort(self, rid: str, abort: Callable[[str], None]) -> None:
        """Abort what is being scored for a caller's request.

        Args:
            rid: the caller's.
            abort: ``TokenizerManager.abort_request`` without the hook on it.
        """
        for own in list(self._asked.get(rid, ())):
            abort(own)

    def _keys(self, question: Question) -> list[bytes]:
        lora_path, extra_key = question.tenant
        adapter = lora_path
        if lora_path is not None:
            loaded = self._manager.lora_registry.get_all_adapters().get(lora_path)
            # An adapter that is yet to be loaded has no id: no score is found under this name.
            adapter = loaded.lora_id if loaded is not None else uuid.uuid4().hex
        of_set = self._attention is not None  # how much is left for one depends on the others
        given = question.prefix, question.contexts, question.query
        return score_keys((adapter, extra_key), *given, of_set)

    def _rows(self, question: Question, wanted: Sequence[int]) -> Iterator[ScoreRow]:
        tokens = self._limits.room_beside(self._pinned_tokens())
        if self._attention is not None:
            yield _probe_row(question, self._attention, tokens)
            return
        window = self._limits.window - len(question.prefix)
        room = Room(copies=min(COPY_TOKENS, window), tokens=tokens)
        yield from score_rows(question.prefix, question.contexts, question.query, wanted, room)

    async def _ask_all(
        self, rows: Sequence[ScoreRow], question: Question, generate: Generate, request: Any
    ) -> list[tuple[list[float], int]]:
        objs = [_request_of(row, question, self._logs_requests) for row in rows]
        asked = self._asked.setdefault(question.rid, set()) if question.rid else set()
        asked.update(obj.rid for obj in objs)
        try:  # what is cancelled, SGLang aborts
            return await gather_or_cancel(
                *(
                    _ask(row, obj, generate, request, self._attention)
                    for row, obj in zip(rows, objs, strict=True)
                )
            )
        finally:
            asked.difference_update(obj.rid for obj in objs)
            if question.rid and not asked:
                self._asked.pop(question.rid, None)


def _probe_row(question: Question, attention: Attention, room: int) -> ScoreRow:
    row = probe_row(question.prefix, question.contexts, question.query, attention.null)
    need = len(row.input_ids)
    if need > room:
        need -= attention.pinned_part(question.tenant, question.prefix, question.contexts)
    if need > room:
        raise ApeRequestError(
            f"scoring these contexts takes {need} tokens that are not pinned; the KV pool has room "
            f"for {room}",
            "contexts",
        )
    return row


async def _ask(
    row: ScoreRow,
    obj: GenerateReqInput,
    generate: Generate,
    request: Any,
    attention: Attention | None,
) -> tuple[list[float], int]:
    """The scores of a row, and the tokens of P and contexts that had to be computed for it."""
    async with aclosing(generate(obj, request)) as answers:
        async for answer in answers:
            info = answer["meta_info"]
    if (info.get("finish_reason") or {}).get("type") == "abort":
        message = "the request was aborted while its contexts were scored"
        raise ApeRequestError(message, None, CLIENT_CLOSED_REQUEST)
    computed = max(row.spec.context_end - info["cached_tokens"], 0)
    if attention is None:
        scores = likelihoods(row, info["input_token_logprobs"])
    else:
        scores = await attention.take(obj.rid)
    if not all(map(math.isfinite, scores)):
        raise RuntimeError(f"scores of contexts that are no numbers: {scores[:8]}")
    return scores, computed


def _request_of(row: ScoreRow, question: Question, is_logged: bool) -> GenerateReqInput:
    """An ordinary request that asks for no token, but for log-probabilities of its copies if it has
    any.

    SGLang turns a list of ids into such an array, but its log shortens lists alone.
    """
    return GenerateReqInput(
        rid=uuid.uuid4().hex,
        input_ids=row.input_ids.tolist() if is_logged else row.input_ids,
        # Greedy: a batch of greedy requests is not slowed down, or disturbed, by sampling for it.
        sampling_params={
            "max_new_tokens": 0,
            "temperature": 0,
            "custom_params": row.spec.to_custom_params(),
        },
        return_logprob=isinstance(row.spec, ScoreSpec),
        logprob_start_len=row.spec.context_end if isinstance(row.spec, ScoreSpec) else -1,
        lora_path=question.tenant.lora_path,
        extra_key=question.tenant.extra_key,
        priority=question.priority,
        log_metrics=False,
    )
