"""The last common point of all doors: ``TokenizerManager.generate_request``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ape import metrics
from sglang_ape.arguments import ATTENTION, warm_items
from sglang_ape.concurrency import gather_or_cancel
from sglang_ape.entry import expand
from sglang_ape.entry.call import ApeCall, current_call
from sglang_ape.entry.chat import ContextMarker
from sglang_ape.entry.layout import lay_out
from sglang_ape.entry.prepare import Asked, prepare_call
from sglang_ape.entry.report import RowParts, reported
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits, pin_cap
from sglang_ape.scoring.probe import NULL_TEXT
from sglang_ape.scoring.question import Question, Scores
from sglang_ape.spec import CUSTOM_PARAM_KEYS
from sglang_ape.store.contexts import ContextStore

if TYPE_CHECKING:
    from sglang_ape.scoring.scorer import Attention, Scorer
    from sglang_ape.store.register import Registry

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What the way in needs to know of the engine; made once and kept by its tokenizer manager."""

    tokenizer: Any  # None with skip_tokenizer_init
    limits: Limits
    defaults: expand.Defaults
    marker: ContextMarker | None  # only where there are chat routes
    store: ContextStore
    registry: Registry | None = None  # None without an engine behind
    scorer: Scorer | None = None  # likewise
    metrics: metrics.EntryMetrics | None = None
    logs_requests: bool = False  # SGLang's log shortens lists, and prints arrays whole


def make_entry(manager: Any, pool_tokens: int, with_chat: bool) -> Entry:
    """Describe a running engine.

    Args:
        manager: its ``TokenizerManager``.
        pool_tokens: tokens of the scheduler's KV pool.
        with_chat: whether chat templates will be rendered.

    Raises:
        ValueError: a flag does not fit the size of the pool.
    """
    from sglang_ape.scoring.scorer import Scorer  # they import SGLang
    from sglang_ape.store.register import Registry

    args, config = manager.server_args, manager.model_config
    tokenizer = manager.tokenizer
    pinned = pin_cap(args.ape_max_pinned_tokens, pool_tokens, config.context_len)
    logger.info("APE: up to %d of %d KV tokens can be pinned", pinned, pool_tokens)
    store = ContextStore(args.served_model_name, args.ape_store_max_tokens, pinned)
    counted = metrics.entry_metrics(manager)
    limits = Limits(
        window=config.context_len,
        context_tokens=args.ape_max_context_tokens,
        pool_tokens=pool_tokens,
        vocab_size=config.vocab_size,
        contexts=args.ape_max_contexts,
        body_bytes=args.ape_max_body_bytes,
        **_preferred(manager),
    )
    return Entry(
        tokenizer=tokenizer,
        limits=limits,
        defaults=expand.Defaults(
            args.ape_temperature,
            args.ape_scale,
            args.ape_prefix,
            args.ape_soft,
            args.ape_refine,
            expand.encode_warm(tokenizer, warm_items(args), config.context_len),
        ),
        marker=ContextMarker(tokenizer) if with_chat and tokenizer is not None else None,
        store=store,
        registry=Registry(manager, store, counted),
        scorer=Scorer(manager, limits, lambda: store.pinned_tokens, _attention(manager, store)),
        metrics=counted,
        logs_requests=args.log_requests,
    )


def _attention(manager: Any, store: ContextStore) -> Attention | None:
    if manager.server_args.ape_scorer != ATTENTION:
        return None
    from sglang_ape.scoring.channel import ScoresChannel
    from sglang_ape.scoring.scorer import Attention

    null = expand.encode_text(manager.tokenizer, NULL_TEXT, "--ape-scorer")
    return Attention(null, ScoresChannel(manager).take, store.pinned_part)


def _preferred(manager: Any) -> dict[str, int]:
    """``max_new_tokens`` of ``--preferred-sampling-params``, which requests may leave out."""
    given = (manager.preferred_sampling_params or {}).get("max_new_tokens")
    return {} if given is None else {"default_new_tokens": given}


def around_generate_request(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND hook on ``TokenizerManager.generate_request``: turn an APE call into token rows."""
    if not manager.server_args.enable_ape:
        return original(manager, obj, request)
    call = current_call.get()
    try:
        _refuse_reserved_params(obj)
        if call is None:
            return original(manager, obj, request)
        asked = prepare_call(manager.ape_entry, call, obj)
    except ApeRequestError as error:
        _refused(call, obj, error)
        raise
    if any(one.wants_scores for one in asked):
        return _scored_answers(original, manager, obj, request, call, asked)
    return _answers(original, manager, obj, request, call, lay_out(manager.ape_entry, obj, asked))


async def _scored_answers(
    original: Callable[..., Any],
    manager: Any,
    obj: Any,
    request: Any,
    call: ApeCall,
    asked: Sequence[Asked],
) -> AsyncIterator[Any]:
    """Score contexts first, which the answers then depend on."""
    entry = manager.ape_entry
    # SGLang reads it should the client of a stream go away meanwhile, and sets it itself later.
    obj.is_single = True
    try:
        scores = await gather_or_cancel(
            *(_scores_of(entry.scorer, one, original, manager, request) for one in asked)
        )
        rows = lay_out(entry, obj, asked, scores)
    except ApeRequestError as error:
        _refused(call, obj, error)
        raise
    async with aclosing(_answers(original, manager, obj, request, call, rows)) as answers:
        async for answer in answers:
            yield answer


async def _scores_of(
    scorer: Scorer, asked: Asked, original: Callable[..., Any], manager: Any, request: Any
) -> Scores | None:
    if not asked.wants_scores:
        return None
    question = Question(
        asked.tenant, asked.prefix, asked.contexts, asked.query, asked.rid, asked.priority
    )
    return await scorer.score(question, partial(original, manager), request)


def _answers(
    original: Callable[..., Any],
    manager: Any,
    obj: Any,
    request: Any,
    call: ApeCall,
    rows: Sequence[RowParts],
) -> AsyncGenerator[Any, None]:
    params = obj.sampling_params
    samples = (params[0] if isinstance(params, list) else params).get("n", 1)
    answers = original(manager, obj, request)
    return reported(answers, rows, samples, call, manager.ape_entry.metrics)


def _refused(call: ApeCall | None, obj: Any, error: ApeRequestError) -> None:
    if call is not None:
        call.error = error
    # After a stream SGLang aborts whatever of it still runs, and reads these, which it would have
    # set itself. Nothing runs.
    obj.is_single, obj.rid = False, []


def around_abort_request(
    original: Callable[..., None], manager: Any, rid: str = "", abort_all: bool = False
) -> None:
    """AROUND hook on ``TokenizerManager.abort_request``: end what is scored for a request, too."""
    entry = getattr(manager, "ape_entry", None)
    if entry is not None and rid and not abort_all:
        entry.scorer.abort(rid, partial(original, manager))
    original(manager, rid, abort_all)


async def around_change_of_weights(
    original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND hook on what changes the model or empties the cache: scores are forgotten with it."""
    try:
        return await original(manager, *args, **kwargs)
    finally:
        entry = getattr(manager, "ape_entry", None)
        if entry is not None:
            entry.scorer.known.forget()


def _refuse_reserved_params(obj: Any) -> None:
    """Only ``lay_out`` and the scorer write the flat APE parameters: the scheduler trusts them."""
    value = getattr(obj, "sampling_params", None)
    for params in value if isinstance(value, list) else [value]:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        if isinstance(custom, dict) and not CUSTOM_PARAM_KEYS.isdisjoint(custom):
            name = sorted(CUSTOM_PARAM_KEYS & custom.keys())[0]
            raise ApeRequestError(
                f"custom_params.{name} is reserved; use contexts", "custom_params"
            )
