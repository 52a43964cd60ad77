"""``Engine.generate`` and ``Engine.async_generate`` with contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_ape.entry.call import ENGINE, FIELDS, ApeCall, current_call, parse_call
from sglang_ape.entry.tokenizer_manager import Entry, make_entry
from sglang_ape.errors import ApeRequestError


def around_generate(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on ``Engine.generate``: takes ``contexts``, ``prefix``, ``prefix_ids``, ``ape``.

    Raises:
        ApeRequestError: (a ValueError) the fields are wrong, or the engine runs without APE.
    """
    call = _take_call(engine, kwargs)
    with _during(call):
        return original(engine, *args, **kwargs)


async def around_async_generate(
    original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND hook on ``Engine.async_generate``; as :func:`around_generate`."""
    call = _take_call(engine, kwargs)
    with _during(call):
        return await original(engine, *args, **kwargs)


def _take_call(engine: Any, kwargs: dict[str, Any]) -> ApeCall | None:
    fields = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
    if not fields:
        return None
    if not engine.server_args.enable_ape:
        name = next(iter(fields))
        raise ApeRequestError(f"{name} needs an engine made with enable_ape=True", name)
    return parse_call(fields, ENGINE, entry_of(engine).limits.contexts)


def entry_of(engine: Any) -> Entry:
    """The entry of a running engine with APE, made on first use."""
    manager = engine.tokenizer_manager
    if not hasattr(manager, "ape_entry"):
        info = engine._scheduler_init_result.scheduler_infos[0]
        manager.ape_entry = make_entry(manager, info["max_total_num_tokens"], with_chat=False)
    return manager.ape_entry


@contextmanager
def _during(call: ApeCall | None) -> Iterator[None]:
    token = current_call.set(call)
    try:
        yield
    finally:
        current_call.reset(token)
