"""The last common point of all doors: ``TokenizerManager.generate_request``."""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ape import metrics
from sglang_ape.arguments import warm_items
from sglang_ape.entry import expand
from sglang_ape.entry.beside import check_fields, check_sampling
from sglang_ape.entry.call import ApeCall, ApeItem, Door, Ids, current_call, parse_ids
from sglang_ape.entry.chat import ContextMarker
from sglang_ape.entry.known import resolve
from sglang_ape.entry.report import RowParts, reported
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits, pin_cap
from sglang_ape.spec import CUSTOM_PARAM_KEYS
from sglang_ape.store.contexts import ContextStore, Tenant

if TYPE_CHECKING:
    from sglang_ape.store.register import Registry

logger = logging.getLogger(__name__)

_FORBIDDEN_BESIDE_CONTEXTS = (
    "image_data",
    "video_data",
    "audio_data",
    "input_embeds",
    "session_params",
    "session_id",
    "positional_embed_overrides",
    "multi_item_delimiter_indices",
    "http_worker_ipc",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "mm_data_mooncake",
    "encoder_urls",
)


class Entry(NamedTuple):
    """What the way in needs to know of the engine; made once and kept by its tokenizer manager."""

    tokenizer: Any  # None with skip_tokenizer_init
    limits: Limits
    defaults: expand.Defaults
    marker: ContextMarker | None  # only where there are chat routes
    store: ContextStore
    registry: Registry | None = None  # None without an engine behind
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
    from sglang_ape.store.register import Registry  # it imports SGLang

    args, config = manager.server_args, manager.model_config
    tokenizer = manager.tokenizer
    pinned = pin_cap(args.ape_max_pinned_tokens, pool_tokens, config.context_len)
    logger.info("APE: up to %d of %d KV tokens can be pinned", pinned, pool_tokens)
    store = ContextStore(args.served_model_name, args.ape_store_max_tokens, pinned)
    counted = metrics.entry_metrics(manager)
    return Entry(
        tokenizer=tokenizer,
        limits=Limits(
            window=config.context_len,
            context_tokens=args.ape_max_context_tokens,
            pool_tokens=pool_tokens,
            vocab_size=config.vocab_size,
            contexts=args.ape_max_contexts,
            body_bytes=args.ape_max_body_bytes,
            **_preferred(manager),
        ),
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
        metrics=counted,
        logs_requests=args.log_requests,
    )


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
        rows = apply_call(manager.ape_entry, call, obj)
    except ApeRequestError as error:
        if call is not None:
            call.error = error
        # After a stream SGLang aborts whatever of it still runs, and reads these, which it would
        # have set itself. Nothing runs.
        obj.is_single, obj.rid = False, []
        raise
    params = obj.sampling_params
    samples = (params[0] if isinstance(params, list) else params).get("n", 1)
    answers = original(manager, obj, request)
    return reported(answers, rows, samples, call, manager.ape_entry.metrics)


def apply_call(entry: Entry, call: ApeCall, obj: Any) -> list[RowParts]:
    """Replace the text or ids of ``obj`` (a ``GenerateReqInput``, not yet normalised) by rows.

    Returns:
        What each row is made of.

    Raises:
        ApeRequestError: the request cannot be served.
    """
    for name in _FORBIDDEN_BESIDE_CONTEXTS:
        if getattr(obj, name, None):
            raise ApeRequestError(f"{name} cannot be given beside contexts", name)
    if obj.text is not None and obj.input_ids is not None:
        raise ApeRequestError("give text or input_ids, not both", "input_ids")
    queries, batched = _queries(obj)
    name = call.door.text if obj.text is not None else call.door.ids
    if (call.batched and not batched) or len(queries) != len(call.items):
        wanted = f"{len(queries)} lists of contexts" if batched else "one list of contexts"
        got = "one list" if len(call.items) == 1 else f"{len(call.items)} lists"
        raise ApeRequestError(f"{name} needs {wanted}, got {got}", "contexts")

    check_fields(obj, len(queries), batched, entry.limits.vocab_size, call.door)
    sampling = _sampling_params(obj.sampling_params, len(queries))
    for params in sampling:
        check_sampling(params, call.door)
    rows, parts = [], []
    for i, (item, query, params) in enumerate(zip(call.items, queries, sampling, strict=True)):
        query_name = f"{name}[{i}]" if batched else name
        tenant = Tenant(*(_of_item(getattr(obj, own, None), i) for own in Tenant._fields))
        row, of_row = _row(entry, call.door, item, tenant, query, params, query_name)
        parts.append(of_row)
        if row.spec is not None:
            custom = params.get("custom_params") or {}
            if not isinstance(custom, dict):
                raise ApeRequestError("custom_params must be an object", "custom_params")
            sampling[i] = {**params, "custom_params": {**custom, **row.spec.to_custom_params()}}
        rows.append(row.input_ids)
    obj.text = None
    # SGLang turns a list of ids into such an array; where it copies requests it wants lists.
    as_lists = batched or sampling[0].get("n", 1) != 1 or entry.logs_requests
    ids = [row.tolist() for row in rows] if as_lists else rows
    obj.input_ids = ids if batched else ids[0]
    obj.sampling_params = sampling if batched else sampling[0]
    return parts


def _row(
    entry: Entry,
    door: Door,
    item: ApeItem,
    tenant: Tenant,
    query: Any,
    params: Mapping[str, Any],
    query_name: str,
) -> tuple[expand.Row, RowParts]:
    own_prefix = None
    prefix_name = item.prefix_name
    if door.chat:
        assert entry.marker is not None  # the HTTP door marked the messages with it
        own_prefix, query = (array("I", ids) for ids in entry.marker.split(query))
        own_prefix = expand.with_warm(own_prefix, entry.defaults)
        prefix_name = door.text
    else:
        if item.prefix is not None:
            own_prefix = expand.encode_prefix(entry.tokenizer, item.prefix, item.prefix_name)
        if isinstance(query, str):
            query = expand.encode_text(entry.tokenizer, query, query_name)
        else:
            query = parse_ids(query, query_name, allow_empty=True)
    encoded = expand.encode_contexts(entry.tokenizer, item.contexts, item.at)
    prefix, contexts = resolve(entry.store, tenant, own_prefix, encoded, item.at)
    if prefix is None:
        prefix = expand.server_prefix(entry.tokenizer, entry.defaults, item.prefix_name)
    names = expand.Names(prefix_name, f"contexts{item.at}", query_name, door.new_tokens)
    given = params.get("max_new_tokens")
    new_tokens = given if isinstance(given, int) else None
    expand.check_row(prefix, contexts, query, new_tokens, entry.limits, names)
    if entry.store.pinned_tokens:
        asked = entry.limits.asked_new_tokens(params)
        _check_beside_pins(entry, tenant, prefix, contexts, query, asked, names)
    parts = RowParts(len(prefix), tuple(map(len, contexts)))
    return expand.build_row(prefix, contexts, query, item, entry.defaults), parts


def _check_beside_pins(
    entry: Entry,
    tenant: Tenant,
    prefix: Ids,
    contexts: list[Ids],
    query: Ids,
    max_new_tokens: int | None,
    names: expand.Names,
) -> None:
    """Refuse a row that would wait forever for memory that pins keep."""
    lens = list(map(len, contexts))
    positions = len(prefix) + max(lens) + len(query)
    tokens = len(prefix) + sum(lens) + len(query)
    room = entry.limits.room_beside(entry.store.pinned_tokens)
    need = tokens + entry.limits.new_tokens(positions, max_new_tokens)
    if need <= room:
        return
    need -= entry.store.pinned_part(tenant, prefix, contexts)
    if need > room:
        raise ApeRequestError(
            f"the request may come to hold {need} tokens that are not pinned; beside the pinned "
            f"{entry.store.pinned_tokens} the KV pool has room for {room}",
            names.contexts,
        )


def _of_item(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, list) else value


def _queries(obj: Any) -> tuple[list[Any], bool]:
    """The query of each request, and whether there is a batch."""
    value = obj.text if obj.text is not None else obj.input_ids
    if value is None:
        raise ApeRequestError("give text or input_ids beside contexts", "text")
    if isinstance(value, str):
        return [value], False
    if value and isinstance(value[0], str | list):
        return list(value), True
    return [value], False


def _sampling_params(value: Any, count: int) -> list[dict[str, Any]]:
    if isinstance(value, list):
        if len(value) != count:
            raise ApeRequestError(
                f"sampling_params has {len(value)} values for {count} requests", "sampling_params"
            )
        return [dict(params or {}) for params in value]
    return [dict(value or {}) for _ in range(count)]


def _refuse_reserved_params(obj: Any) -> None:
    """Only :func:`apply_call` writes the flat APE parameters: the scheduler trusts them."""
    value = getattr(obj, "sampling_params", None)
    for params in value if isinstance(value, list) else [value]:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        if isinstance(custom, dict) and not CUSTOM_PARAM_KEYS.isdisjoint(custom):
            name = sorted(CUSTOM_PARAM_KEYS & custom.keys())[0]
            raise ApeRequestError(
                f"custom_params.{name} is reserved; use contexts", "custom_params"
            )
