"""Encoding contexts ahead of time, and telling what is cached of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_ape.entry.call import Ids, current_call
from sglang_ape.entry.expand import joined_ids
from sglang_ape.errors import ApeRequestError
from sglang_ape.metrics import EntryMetrics, Usage
from sglang_ape.store.channel import CachedPath, SchedulerChannel
from sglang_ape.store.contexts import ContextStore, StoredContext, Tenant

# Requests that are served meanwhile queue up behind no more than this.
_ENCODED_AT_ONCE = 16


class Registered(NamedTuple):
    """The answer to a registration, for one context."""

    context: StoredContext
    cached_tokens: int  # of the context, that this call had not to compute


class Registry:
    """The context store of a running engine, with the engine behind it.

    Args:
        manager: the engine's ``TokenizerManager``.
        store: what is known.
        metrics: where registrations are counted, if they are.
    """

    def __init__(self, manager: Any, store: ContextStore, metrics: EntryMetrics | None) -> None:
        self.store = store
        self._manager = manager
        self._metrics = metrics
        self._channel = SchedulerChannel(manager)
        self._caches = not manager.server_args.disable_radix_cache
        self._logs_requests = manager.server_args.log_requests
        self._encoding: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_ENCODED_AT_ONCE)
        self._observe_store()

    async def register(
        self, tenant: Tenant, prefix: Ids, contexts: Sequence[Ids], pin: bool
    ) -> list[Registered]:
        """Make contexts known, encode what is not cached, and pin them if asked to.

        Args:
            tenant: whose they are.
            prefix: P; may be empty.
            contexts: at least one, none empty, checked against the engine's limits.
            pin: whether their KV is kept until they are deleted.

        Raises:
            ApeRequestError: 507, beyond what the store or the pins may hold; 400, no such adapter,
                or no KV cache to pin anything in.
            ValueError: the engine refused to encode one. The contexts stay known, and pinned if
                that was asked for; the same call again goes on where this one ended.
        """
        if pin and not self._caches:
            raise ApeRequestError("pin: the server runs with --disable-radix-cache", "pin")
        self._check_adapter(tenant)
        found = self.store.add(tenant, prefix, contexts, pin)
        try:
            reused = await self._encode_all(found, pin) if self._caches else [0] * len(found)
        finally:
            self._observe_store()
        if self._metrics is not None:
            tokens = sum(len(context.ids) for context in found)
            self._metrics.observe_registration(Usage(len(found), tokens, sum(reused)))
        return [Registered(*pair) for pair in zip(found, reused, strict=True)]

    async def cached_tokens(self, contexts: Sequence[StoredContext]) -> list[int]:
        """How many tokens of each context are cached now, its prefix not counted."""
        return self._own_part(contexts, await self._ask(self._channel.look, contexts))

    async def forget(self, id: str) -> bool:
        """Forget a context and its pin. Requests that use it now are not affected.

        Returns:
            Whether it was known.
        """
        context = self.store.get(id)
        if context is None:
            return False
        pinned = context.pinned
        self.store.remove(id)
        if pinned:
            await self._channel.unpin([id])
        self._observe_store()
        return True

    async def _encode_all(self, contexts: Sequence[StoredContext], pin: bool) -> list[int]:
        """Returns the tokens of each that this call had not to compute."""
        if pin:
            await self._pin(contexts)
        paths = await self._ask(self._channel.touch, contexts)
        cached = self._own_part(contexts, paths)
        missing = self._missing(contexts, paths)
        if not missing:
            return cached
        computed: set[str] = set()
        if min(paths) < len(contexts[0].prefix.ids):
            # The first brings the prefix, which the others then find.
            computed |= await self._encode_some(missing[:1])
            missing = await self._touch_missing(contexts)
        computed |= await self._encode_some(missing)
        if pin:
            await self._pin(contexts)  # once more: encoding loads an adapter that was not loaded
        missing = await self._touch_missing(contexts)  # they count as contexts from now on
        computed |= await self._encode_some(missing if pin else [])
        reused = []
        for context, tokens in zip(contexts, cached, strict=True):
            reused.append(tokens if context.id in computed else len(context.ids))
            computed.discard(context.id)  # given twice, it was computed once
        return reused

    async def _pin(self, contexts: Sequence[StoredContext]) -> None:
        """Have the scheduler keep what is cached, and what is not as soon as it is."""
        paths = self._paths([context for context in contexts if context.pinned])
        try:
            await self._channel.pin(list(paths.values()))
        finally:  # what was forgotten while this call was under way, nobody else will unpin
            await self._channel.unpin([c.id for c in contexts if not self.store.is_pinned(c.id)])

    async def _encode_some(self, contexts: Sequence[StoredContext]) -> set[str]:
        """Returns the ids of those that this call encoded; others did the rest."""
        mine = await asyncio.gather(*map(self._encode_once, contexts))
        return {context.id for context, own in zip(contexts, mine, strict=True) if own}

    async def _encode_once(self, context: StoredContext) -> bool:
        """Encode a context, or wait for a call that does so already.

        Returns:
            Whether this call did.
        """
        task = self._encoding.get(context.id)
        mine = task is None
        if task is None:
            task = asyncio.create_task(self._encode(context))
            self._encoding[context.id] = task
            task.add_done_callback(lambda _: self._encoding.pop(context.id, None))
        await asyncio.shield(task)  # others may wait for it too
        return mine

    async def _encode(self, context: StoredContext) -> None:
        """Prefill P + C as an ordinary prompt that asks for no token."""
        current_call.set(None)  # of this task alone: the request is a plain one
        ids = joined_ids(context.prefix.ids, context.ids)
        async with self._slots:
            request = GenerateReqInput(
                input_ids=ids.tolist() if self._logs_requests else ids,
                sampling_params={"max_new_tokens": 0},
                lora_path=context.tenant.lora_path,
                extra_key=context.tenant.extra_key,
            )
            request.ape_encodes = True  # read by limits.py
            async for _ in self._manager.generate_request(request):
                pass

    def _check_adapter(self, tenant: Tenant) -> None:
        name = tenant.lora_path
        if name is not None and name not in self._manager.lora_ref_cache:
            raise ApeRequestError(f"lora_path: no adapter is known as {name[:80]!r}", "lora_path")

    async def _ask(self, question: Any, contexts: Sequence[StoredContext]) -> list[int]:
        """Cached tokens of each path, 0 where its adapter is not loaded."""
        cached = [0] * len(contexts)
        if self._caches:
            paths = self._paths(contexts)
            for i, tokens in zip(paths, await question(list(paths.values())), strict=True):
                cached[i] = tokens
        return cached

    def _paths(self, contexts: Sequence[StoredContext]) -> dict[int, CachedPath]:
        """Where the tree has each context, by its index; not those of unloaded adapters."""
        paths = {}
        for i, context in enumerate(contexts):
            extra_key, lora_path = context.tenant.extra_key, context.tenant.lora_path
            if lora_path is not None:
                adapter = self._manager.lora_registry.get_all_adapters().get(lora_path)
                if adapter is None:
                    continue
                extra_key = (extra_key or "") + adapter.lora_id
            ids = joined_ids(context.prefix.ids, context.ids)
            paths[i] = CachedPath(context.id, ids, extra_key)
        return paths

    async def _touch_missing(self, contexts: Sequence[StoredContext]) -> list[StoredContext]:
        return self._missing(contexts, await self._ask(self._channel.touch, contexts))

    def _missing(
        self, contexts: Sequence[StoredContext], paths: Sequence[int]
    ) -> list[StoredContext]:
        """The contexts whose paths are not cached whole, each once."""
        missing = {
            context.id: context
            for context, cached in zip(contexts, paths, strict=True)
            if cached < len(context.prefix.ids) + len(context.ids)
        }
        return list(missing.values())

    def _own_part(self, contexts: Sequence[StoredContext], paths: Sequence[int]) -> list[int]:
        return [
            max(0, cached - len(context.prefix.ids))
            for context, cached in zip(contexts, paths, strict=True)
        ]

    def _observe_store(self) -> None:
        if self._metrics is not None:
            store = self.store
            self._metrics.observe_store(len(store), store.tokens, store.pinned_tokens)
