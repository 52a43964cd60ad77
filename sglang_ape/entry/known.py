"""Contexts given by id: their tokens, and the prefix that comes with them."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ape.entry.call import ContextId, Ids
from sglang_ape.errors import ApeRequestError
from sglang_ape.store.contexts import ContextStore, StoredContext, Tenant


def resolve(
    store: ContextStore,
    tenant: Tenant,
    prefix: Ids | None,
    contexts: Sequence[Ids | ContextId],
    at: str,
) -> tuple[Ids | None, list[Ids]]:
    """Put tokens in the place of ids.

    An id stands for a context after one prefix. A request that gives no prefix has theirs.

    Args:
        store: what is known.
        tenant: whose request it is; ids of others are unknown to it.
        prefix: P as the request gives it, None if it does not.
        contexts: of the request.
        at: the index of the request in a batch, for error messages.

    Returns:
        P, None if neither the request nor an id gives it; and the contexts.

    Raises:
        ApeRequestError: an id is not known, or was registered after another prefix.
    """
    found: list[Ids] = []
    for i, context in enumerate(contexts):
        if not isinstance(context, ContextId):
            found.append(context)
            continue
        stored = _find(store, tenant, context, f"contexts{at}[{i}].id")
        if prefix is None:
            prefix = stored.prefix.ids
        elif prefix is not stored.prefix.ids and prefix != stored.prefix.ids:
            raise ApeRequestError(
                f"contexts{at}[{i}].id: {context.id} was registered after another prefix than "
                "this request has; register it after this one",
                f"contexts{at}[{i}].id",
            )
        found.append(stored.ids)
    return prefix, found


def _find(store: ContextStore, tenant: Tenant, context: ContextId, param: str) -> StoredContext:
    stored = store.use(context.id, tenant)
    if stored is None:
        whose = f" for {_shown(tenant)}" if tenant != Tenant(None, None) else ""
        raise ApeRequestError(
            f"{param}: no context is known as {context.id[:80]!r}{whose}; register it with "
            "POST /ape/contexts",
            param,
        )
    return stored


def _shown(tenant: Tenant) -> str:
    given = {name: value for name, value in tenant._asdict().items() if value is not None}
    return ", ".join(f"{name} {value[:80]!r}" for name, value in given.items())
