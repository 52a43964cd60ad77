"""From the fields of a call to checked token ids, one request at a time."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_ape.entry import expand
from sglang_ape.entry.beside import check_fields, check_sampling
from sglang_ape.entry.call import ApeCall, ApeItem, Door, Ids, parse_ids
from sglang_ape.entry.known import resolve
from sglang_ape.errors import ApeRequestError
from sglang_ape.store.contexts import Tenant

if TYPE_CHECKING:
    from sglang_ape.entry.tokenizer_manager import Entry

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


class Asked(NamedTuple):
    """One request, checked, in token ids."""

    tenant: Tenant
    prefix: Ids
    contexts: list[Ids]
    query: Ids
    reading: expand.Reading
    rid: str | None
    priority: int | None

    @property
    def wants_scores(self) -> bool:
        """Not where the answer does not depend on them."""
        count = len(self.contexts)
        if self.reading.refine:
            return self.reading.refine < count
        return self.reading.soft > 0 and count > 1


def prepare_call(entry: Entry, call: ApeCall, obj: Any) -> list[Asked]:
    """Check and tokenise ``obj`` (a ``GenerateReqInput``, not yet normalised); nothing is changed.

    Raises:
        ApeRequestError: the request cannot be served.
    """
    for name in _FORBIDDEN_BESIDE_CONTEXTS:
        if getattr(obj, name, None):
            raise ApeRequestError(f"{name} cannot be given beside contexts", name)
    if obj.text is not None and obj.input_ids is not None:
        raise ApeRequestError("give text or input_ids, not both", "input_ids")
    queries, batched = queries_of(obj)
    name = call.door.text if obj.text is not None else call.door.ids
    if (call.batched and not batched) or len(queries) != len(call.items):
        wanted = f"{len(queries)} lists of contexts" if batched else "one list of contexts"
        got = "one list" if len(call.items) == 1 else f"{len(call.items)} lists"
        raise ApeRequestError(f"{name} needs {wanted}, got {got}", "contexts")

    check_fields(obj, len(queries), batched, entry.limits.vocab_size, call.door)
    asked = []
    sampling = sampling_params_of(obj.sampling_params, len(queries))
    for i, (item, query, params) in enumerate(zip(call.items, queries, sampling, strict=True)):
        check_sampling(params, call.door)
        if not isinstance(params.get("custom_params") or {}, dict):
            raise ApeRequestError("custom_params must be an object", "custom_params")
        query_name = f"{name}[{i}]" if batched else name
        asked.append(_asked(entry, call.door, item, obj, i, query, params, query_name))
    return asked


def _asked(
    entry: Entry,
    door: Door,
    item: ApeItem,
    obj: Any,
    i: int,
    query: Any,
    params: Mapping[str, Any],
    query_name: str,
) -> Asked:
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
    tenant = Tenant(*(_of_item(getattr(obj, own, None), i) for own in Tenant._fields))
    encoded = expand.encode_contexts(entry.tokenizer, item.contexts, item.at)
    prefix, contexts = resolve(entry.store, tenant, own_prefix, encoded, item.at)
    if prefix is None:
        prefix = expand.server_prefix(entry.tokenizer, entry.defaults, item.prefix_name)
    names = expand.Names(prefix_name, f"contexts{item.at}", query_name, door.new_tokens)
    given = params.get("max_new_tokens")
    new_tokens = given if isinstance(given, int) else None
    expand.check_row(prefix, contexts, query, new_tokens, entry.limits, names)
    reading = expand.reading_of(item.options, entry.defaults)
    if reading.refine:
        name = f"ape{item.at}.refine"
        limits = entry.limits
        expand.check_refined(prefix, contexts, query, new_tokens, reading.refine, limits, name)
    if entry.store.pinned_tokens:
        asked = entry.limits.asked_new_tokens(params)
        _check_beside_pins(entry, tenant, prefix, contexts, query, asked, names)
    rid, priority = (_of_item(getattr(obj, own, None), i) for own in ("rid", "priority"))
    return Asked(tenant, prefix, contexts, query, reading, rid, priority)


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


def queries_of(obj: Any) -> tuple[list[Any], bool]:
    """The query of each request, and whether there is a batch."""
    value = obj.text if obj.text is not None else obj.input_ids
    if value is None:
        raise ApeRequestError("give text or input_ids beside contexts", "text")
    if isinstance(value, str):
        return [value], False
    if value and isinstance(value[0], str | list):
        return list(value), True
    return [value], False


def sampling_params_of(value: Any, count: int) -> list[dict[str, Any]]:
    if isinstance(value, list):
        if len(value) != count:
            raise ApeRequestError(
                f"sampling_params has {len(value)} values for {count} requests", "sampling_params"
            )
        return [dict(params or {}) for params in value]
    return [dict(value or {}) for _ in range(count)]
