"""The context store as users see it: bodies in, answers out, over HTTP and in an Engine alike."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang_ape.entry import expand
from sglang_ape.entry.call import (
    Context,
    ContextId,
    Ids,
    check_text,
    parse_contexts,
    parse_prefix,
)
from sglang_ape.entry.known import resolve
from sglang_ape.entry.tokenizer_manager import Entry
from sglang_ape.errors import ApeRequestError
from sglang_ape.store.contexts import StoredContext, Tenant

_PREFIX_FIELDS = ("prefix", "prefix_ids", "messages")
_FIELDS = (*_PREFIX_FIELDS, "tools", "chat_template_kwargs", "contexts", "pin", *Tenant._fields)

DEFAULT_PAGE = 100
MAX_PAGE = 1000

RenderChat = Callable[[Mapping[str, Any]], list[int]]


class ContextService:
    """Registers, lists and forgets contexts.

    Args:
        entry: of the running engine.
        render: token ids of a chat's P from ``messages``, ``tools`` and ``chat_template_kwargs``;
            None where there are no chat templates.
    """

    def __init__(self, entry: Entry, render: RenderChat | None = None) -> None:
        assert entry.registry is not None
        self._entry = entry
        self._registry = entry.registry
        self._render = render

    @property
    def max_body_bytes(self) -> int:
        return self._entry.limits.body_bytes

    async def register(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /ape/contexts``.

        Returns:
            ``{"contexts": [{"id", "tokens", "cached_tokens", "pinned"}]}``, in the given order.

        Raises:
            ApeRequestError: a field is wrong, or there is no room (507).
            ValueError: the engine refused to encode a context.
        """
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise ApeRequestError(f"unknown field {unknown[0][:80]!r}", None)
        tenant = Tenant(*(_optional_text(fields, name) for name in Tenant._fields))
        pin = fields.get("pin", False)
        if not isinstance(pin, bool):
            raise ApeRequestError(f"pin must be a boolean, got {type(pin).__name__}", "pin")
        contexts = fields.get("contexts")
        if not isinstance(contexts, Sequence) or isinstance(contexts, str) or not contexts:
            raise ApeRequestError("contexts must be a list that is not empty", "contexts")
        parsed = parse_contexts(contexts, self._entry.limits.contexts)
        # Tokenising many documents would hold up every other request.
        given, encoded = await asyncio.to_thread(self._encode, fields, parsed)
        prefix, known = resolve(self._entry.store, tenant, given, encoded, "")
        if prefix is None:
            prefix = expand.server_prefix(self._entry.tokenizer, self._entry.defaults, "prefix")
        expand.check_contexts(prefix, known, self._entry.limits)
        registered = await self._registry.register(tenant, prefix, known, pin)
        return {
            "contexts": [
                {
                    "id": one.context.id,
                    "tokens": len(one.context.ids),
                    "cached_tokens": one.cached_tokens,
                    "pinned": one.context.pinned,
                }
                for one in registered
            ]
        }

    async def page(
        self, after: int = -1, limit: int = DEFAULT_PAGE, tenant: Tenant | None = None
    ) -> dict[str, Any]:
        """``GET /ape/contexts``: a page in order of registration.

        Args:
            after: ``next`` of the page before.
            limit: contexts of this page, up to :data:`MAX_PAGE`.
            tenant: list only theirs.

        Returns:
            ``contexts``; ``next``, None on the last page; and what the whole store holds.
        """
        store = self._entry.store
        found = store.page(after, limit + 1, tenant)
        shown, more = found[:limit], found[limit:]
        return {
            "contexts": await self._describe(shown),
            "next": shown[-1].number if more else None,
            "total": len(store),
            "tokens": store.tokens,
            "max_tokens": store.max_tokens,
            "pinned_tokens": store.pinned_tokens,
            "max_pinned_tokens": store.max_pinned_tokens,
        }

    async def get(self, id: str) -> dict[str, Any]:
        """``GET /ape/contexts/ID``.

        Raises:
            ApeRequestError: 404.
        """
        context = self._entry.store.get(id)
        if context is None:
            raise _unknown(id)
        return (await self._describe([context]))[0]

    async def forget(self, id: str) -> dict[str, Any]:
        """``DELETE /ape/contexts/ID``: its id is unknown from now on, its pin gone.

        Requests that use it are not affected, and its KV stays until it is evicted.

        Raises:
            ApeRequestError: 404.
        """
        if not await self._registry.forget(id):
            raise _unknown(id)
        return {"id": id, "deleted": True}

    async def _describe(self, contexts: Sequence[StoredContext]) -> list[dict[str, Any]]:
        cached = await self._registry.cached_tokens(contexts)
        return [
            {
                "id": context.id,
                "tokens": len(context.ids),
                "cached_tokens": tokens,
                "pinned": context.pinned,
                "prefix_tokens": len(context.prefix.ids),
                **context.tenant._asdict(),
            }
            for context, tokens in zip(contexts, cached, strict=True)
        ]

    def _encode(
        self, fields: Mapping[str, Any], contexts: Sequence[Context]
    ) -> tuple[Ids | None, list[Ids | ContextId]]:
        """P, None if it was not given, and the contexts, as token ids."""
        given = [name for name in _PREFIX_FIELDS if fields.get(name) is not None]
        if len(given) > 1:
            raise ApeRequestError(f"give {given[0]} or {given[1]}, not both", given[1])
        for name in ("tools", "chat_template_kwargs"):
            if fields.get(name) is not None and given != ["messages"]:
                raise ApeRequestError(f"{name} has no effect without messages", name)
        prefix: Ids | None = None
        if given == ["messages"]:
            if self._render is None:
                raise ApeRequestError("messages need a server with a chat template", "messages")
            prefix = expand.with_warm(array("I", self._render(fields)), self._entry.defaults)
        elif given:
            text, name = parse_prefix(fields)
            prefix = expand.encode_prefix(self._entry.tokenizer, text, name)
        return prefix, expand.encode_contexts(self._entry.tokenizer, contexts, "")


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ApeRequestError(f"{name} must be a string, got {type(value).__name__}", name)
    if value == "":  # SGLang's routes do not agree on what that means
        raise ApeRequestError(f"{name} must not be empty; leave it out", name)
    return None if value is None else check_text(value, name)


def _unknown(id: str) -> ApeRequestError:
    return ApeRequestError(f"no context is known as {id[:80]!r}", "id", 404)
