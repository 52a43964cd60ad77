"""What the server knows of contexts that were registered: their tokens, by id.

Plain bookkeeping in the main process. It knows nothing of the KV cache: an entry may be cached,
partly cached or evicted, and stays known.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from sglang_ape.entry.call import Ids
from sglang_ape.errors import ApeRequestError

ENTRY_TOKENS = 256
"""What the bookkeeping of one context costs, in tokens of 4 bytes."""

_FULL = 507  # HTTP: insufficient storage


class Tenant(NamedTuple):
    """Whose KV it is: requests share nothing across tenants."""

    lora_path: str | None  # name of the adapter
    extra_key: str | None  # SGLang's namespace of cached prompts


@dataclass(slots=True, eq=False)
class SharedPrefix:
    """P of a tenant, kept once for all contexts after it."""

    ids: Ids
    digest: bytes
    contexts: int = 0
    pinned_contexts: int = 0


@dataclass(slots=True, eq=False)
class StoredContext:
    """One registered context.

    Attributes:
        id: ``ctx-`` and the hash of all that its KV depends on.
        number: counts registrations; the order of listings.
        ids: its tokens.
        pinned: whether the scheduler was told to keep its KV.
    """

    id: str
    number: int
    tenant: Tenant
    prefix: SharedPrefix
    ids: Ids
    pinned: bool = False

    @property
    def cost(self) -> int:
        return len(self.ids) + ENTRY_TOKENS


def context_id(model: str, tenant: Tenant, prefix_digest: bytes, ids: Ids) -> str:
    """The id of a context: the same content has the same id, on every server."""
    whole = hashlib.sha256(repr((model, *tenant)).encode())
    whole.update(prefix_digest)
    whole.update(ids)
    return f"ctx-{whole.hexdigest()[:32]}"


def digest_of(ids: Ids) -> bytes:
    return hashlib.sha256(ids).digest()


class ContextStore:
    """Contexts by id, bounded: beyond ``max_tokens`` the least recently used are forgotten.

    Pinned contexts are never forgotten. A prefix counts once for each tenant that uses it.

    Args:
        model: name of the served model, a part of every id.
        max_tokens: what the store holds, :data:`ENTRY_TOKENS` for each context included.
        max_pinned_tokens: KV that pins may hold: pinned contexts, and their prefixes once each.
    """

    def __init__(self, model: str, max_tokens: int, max_pinned_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.max_pinned_tokens = max_pinned_tokens
        self.tokens = 0  # of contexts and prefixes, without the bookkeeping
        self.pinned_tokens = 0
        self._cost = 0
        self._pinned_cost = 0  # what cannot be forgotten
        self._registered = 0
        self._contexts: dict[str, StoredContext] = {}  # in order of registration
        self._recent: OrderedDict[str, None] = OrderedDict()  # not pinned, oldest use first
        self._prefixes: dict[tuple[Tenant, bytes], SharedPrefix] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def __iter__(self) -> Iterator[StoredContext]:
        return iter(self._contexts.values())

    def get(self, id: str) -> StoredContext | None:
        """The context of an id, without counting as use."""
        return self._contexts.get(id)

    def is_pinned(self, id: str) -> bool:
        context = self._contexts.get(id)
        return context is not None and context.pinned

    def use(self, id: str, tenant: Tenant) -> StoredContext | None:
        """The context of an id, if it is this tenant's; it counts as used now."""
        context = self._contexts.get(id)
        if context is None or context.tenant != tenant:
            return None
        self._mark_used(context)
        return context

    def add(
        self, tenant: Tenant, prefix: Ids, contexts: Sequence[Ids], pin: bool
    ) -> list[StoredContext]:
        """Register contexts, and reserve room for their pins; those known are found again.

        Returns:
            One for each that was given.

        Raises:
            ApeRequestError: 507, they do not fit into the store at once, or their pins are beyond
                the cap. Nothing was changed.
        """
        digest = digest_of(prefix)
        ids = [context_id(self.model, tenant, digest, own) for own in contexts]
        shared = self._prefixes.get((tenant, digest)) or SharedPrefix(prefix, digest)
        new = {id: own for id, own in zip(ids, contexts, strict=True) if id not in self._contexts}
        known = {id: self._contexts[id] for id in ids if id not in new}
        self._check_room(shared, new, known)
        if pin:
            self._check_pins(shared, new, known)
        for context in known.values():
            self._mark_used(context)
        for id, own in new.items():
            self._insert(StoredContext(id, self._registered, tenant, shared, own))
        while self._cost > self.max_tokens:
            self.remove(next(iter(self._recent)))
        if pin:
            for id in ids:
                self._pin(self._contexts[id])
        return [self._contexts[id] for id in ids]

    def remove(self, id: str) -> StoredContext | None:
        """Forget a context, and its pin."""
        context = self._contexts.get(id)
        if context is None:
            return None
        self._unpin(context)
        del self._contexts[id], self._recent[id]
        prefix = context.prefix
        self._cost -= context.cost
        self.tokens -= len(context.ids)
        prefix.contexts -= 1
        if not prefix.contexts:
            del self._prefixes[context.tenant, prefix.digest]
            self._cost -= len(prefix.ids)
            self.tokens -= len(prefix.ids)
        return context

    def pinned_part(self, tenant: Tenant, prefix: Ids, contexts: Iterable[Ids]) -> int:
        """How many of a row's tokens are pinned."""
        shared = self._prefixes.get((tenant, digest_of(prefix)))
        if shared is None or not shared.pinned_contexts:
            return 0
        ids = {context_id(self.model, tenant, shared.digest, own) for own in contexts}
        pinned = [self._contexts[id] for id in ids if id in self._contexts]
        return len(prefix) + sum(len(context.ids) for context in pinned if context.pinned)

    def page(self, after: int, limit: int, tenant: Tenant | None) -> list[StoredContext]:
        """Up to ``limit`` contexts registered after number ``after``, of one tenant or of all."""
        found = (
            context
            for context in self._contexts.values()
            if context.number > after and tenant in (None, context.tenant)
        )
        return list(islice(found, limit))

    def _check_room(
        self, prefix: SharedPrefix, new: Mapping[str, Ids], known: Mapping[str, StoredContext]
    ) -> None:
        kept = self._pinned_cost
        kept += sum(context.cost for context in known.values() if not context.pinned)
        added = sum(map(len, new.values())) + ENTRY_TOKENS * len(new)
        if not prefix.contexts:
            added += len(prefix.ids)
        elif not prefix.pinned_contexts:
            kept += len(prefix.ids)
        if kept + added > self.max_tokens:
            raise ApeRequestError(
                f"the contexts need {added} tokens of the store (each counts {ENTRY_TOKENS} more "
                f"than it holds); --ape-store-max-tokens {self.max_tokens} leaves "
                f"{max(self.max_tokens - kept, 0)}",
                "contexts",
                _FULL,
            )

    def _check_pins(
        self, prefix: SharedPrefix, new: Mapping[str, Ids], known: Mapping[str, StoredContext]
    ) -> None:
        tokens = 0 if prefix.pinned_contexts else len(prefix.ids)
        tokens += sum(map(len, new.values()))
        tokens += sum(len(context.ids) for context in known.values() if not context.pinned)
        if self.pinned_tokens + tokens > self.max_pinned_tokens:
            raise ApeRequestError(
                f"pin: {tokens} further tokens, beside {self.pinned_tokens} that are pinned, are "
                f"more than --ape-max-pinned-tokens {self.max_pinned_tokens}",
                "pin",
                _FULL,
            )

    def _insert(self, context: StoredContext) -> None:
        self._registered += 1
        self._contexts[context.id] = context
        self._recent[context.id] = None
        prefix = context.prefix
        self._cost += context.cost
        self.tokens += len(context.ids)
        if not prefix.contexts:
            self._prefixes[context.tenant, prefix.digest] = prefix
            self._cost += len(prefix.ids)
            self.tokens += len(prefix.ids)
        prefix.contexts += 1

    def _pin(self, context: StoredContext) -> None:
        if context.pinned:
            return
        context.pinned = True
        prefix = context.prefix
        tokens = 0 if prefix.pinned_contexts else len(prefix.ids)
        prefix.pinned_contexts += 1
        del self._recent[context.id]
        self._pinned_cost += context.cost + tokens
        self.pinned_tokens += len(context.ids) + tokens

    def _unpin(self, context: StoredContext) -> None:
        if not context.pinned:
            return
        context.pinned = False
        prefix = context.prefix
        prefix.pinned_contexts -= 1
        tokens = 0 if prefix.pinned_contexts else len(prefix.ids)
        self._recent[context.id] = None
        self._pinned_cost -= context.cost + tokens
        self.pinned_tokens -= len(context.ids) + tokens

    def _mark_used(self, context: StoredContext) -> None:
        if not context.pinned:
            self._recent.move_to_end(context.id)
