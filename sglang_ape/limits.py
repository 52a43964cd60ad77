"""Lengths: an APE row holds more tokens than it uses positions.

The model's window bounds positions, the page table bounds tokens. SGLang's three length checks
take a row's length for both, so for APE requests they are asked about positions, and the page
table is made wider by what the contexts may add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sglang_ape.arguments import MAX_BODY_BYTES, MAX_CONTEXTS
from sglang_ape.request import spec_of
from sglang_ape.spec import MOST_NULL_TOKENS, ApeSpec


class Limits(NamedTuple):
    """What a request must fit into."""

    window: int  # positions of the model, generated tokens included
    context_tokens: int  # tokens of all contexts of one request
    pool_tokens: int  # tokens that the KV pool holds
    vocab_size: int
    default_new_tokens: int = 128  # sampling/sampling_params.py: SamplingParams
    contexts: int = MAX_CONTEXTS  # of one request or registration
    body_bytes: int = MAX_BODY_BYTES

    @property
    def usable_pool_tokens(self) -> int:
        """Of the pool, what one request can have."""
        return self.pool_tokens - POOL_MARGIN

    def room_beside(self, pinned_tokens: int) -> int:
        return self.usable_pool_tokens - pinned_tokens

    def asked_new_tokens(self, params: Mapping[str, Any]) -> int | None:
        """``max_new_tokens`` of a request as SGLang reads it; None for up to the window."""
        given = params.get("max_new_tokens", self.default_new_tokens)
        return given if isinstance(given, int) else None

    def new_tokens(self, positions: int, max_new_tokens: int | None) -> int:
        """How many tokens an input of so many positions may get as an answer."""
        left = max(self.window - positions, 0)
        return left if max_new_tokens is None else min(max_new_tokens, left)


# SGLang keeps 6 tokens of the pool back from the longest prompt (managers/tp_worker.py:
# get_worker_info), and admits a request only with room for a page and one new token.
POOL_MARGIN = 8


def pin_cap(given: int | None, pool_tokens: int, window: int) -> int:
    """How many KV tokens may be pinned.

    Raises:
        ValueError: ``--ape-max-pinned-tokens`` leaves nothing of the pool.
    """
    if given is None:
        return max(0, min(pool_tokens // 2, pool_tokens - window - POOL_MARGIN))
    if given >= pool_tokens - POOL_MARGIN:
        raise ValueError(
            f"--ape-max-pinned-tokens {given} leaves nothing of the KV pool of {pool_tokens} tokens"
        )
    return given


def extra_row_tokens(extra: int, server_args: Any) -> int:
    """AFTER hook on ``get_req_to_token_extra_context_len``: widen the page table's rows.

    A row within the window holds at most ``window`` tokens beside the hidden ones, and those are
    fewer than the contexts' total and, in a row that measures attention, a null query.
    """
    if not server_args.enable_ape:
        return extra
    return extra + server_args.ape_max_context_tokens + MOST_NULL_TOKENS


def around_validate_one_request(
    original: Callable[..., None], manager: Any, obj: Any, input_ids: Sequence[int]
) -> None:
    """AROUND hook on ``TokenizerManager._validate_one_request``."""
    spec = _spec_of_input(obj)
    if spec is None:
        _check_beside_pins(manager, obj, input_ids)
    positions = input_ids if spec is None else input_ids[spec.hidden_tokens :]
    original(manager, obj, positions)


def _check_beside_pins(manager: Any, obj: Any, input_ids: Sequence[int] | None) -> None:
    """Refuse a plain request that would wait forever for memory that pins keep.

    Possible only where ``--ape-max-pinned-tokens`` was set to leave less than a window. What
    encodes a context (``store/register.py``) may hold its own pin.
    """
    entry = getattr(manager, "ape_entry", None)
    if entry is None or not entry.store.pinned_tokens or input_ids is None:
        return
    if getattr(obj, "ape_encodes", False):
        return
    room = entry.limits.room_beside(entry.store.pinned_tokens)
    new_tokens = entry.limits.asked_new_tokens(obj.sampling_params or {})
    need = len(input_ids) + entry.limits.new_tokens(len(input_ids), new_tokens)
    if need > room:
        raise ValueError(
            f"The request may come to hold {need} tokens; beside the "
            f"{entry.store.pinned_tokens} tokens of pinned contexts the KV pool has room for {room}"
        )


def around_get_new_batch_prefill_raw(
    original: Callable[..., tuple[Any, Any]], scheduler: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """AROUND hook on ``Scheduler._get_new_batch_prefill_raw``: put-off pins take hold once
    there is room, and an empty batch is not full.

    SGLang calls the running batch full when a request finds no room, and looks again once something
    has ended. Where pins came after a large request was accepted, nothing may be running at that
    time: then nobody would ever look again.
    """
    pins = getattr(scheduler.tree_cache, "pins", None)
    if pins is None:
        return original(scheduler, *args, **kwargs)
    if pins.any_put_off:
        pins.lock_put_off()
    later: list[Any] = []
    if pins.any_put_off and scheduler.chunked_req is not None:
        # No other prompt is begun, or one long prompt after the other would put pins off for ever.
        later, scheduler.waiting_queue = scheduler.waiting_queue, later
    batch, running = original(scheduler, *args, **kwargs)
    if later:
        scheduler.waiting_queue = later + scheduler.waiting_queue
    if batch is None and running.batch_is_full and running.is_empty():
        running.batch_is_full = False
        _refuse_what_pins_keep_out(scheduler, pins)
    return batch, running


def _refuse_what_pins_keep_out(scheduler: Any, pins: Any) -> None:
    """Answer the request that found no room in an idle engine, at the second look, with 400.

    As ``Scheduler.abort_request`` does to one that waits. Others would wait behind it for as long
    as the pins last.
    """
    req = scheduler.waiting_queue[0]
    if not pins.any_held or scheduler.__dict__.get("ape_kept_out") != req.rid:
        scheduler.ape_kept_out = req.rid
        return
    from sglang.srt.managers.io_struct import AbortReq

    scheduler.waiting_queue.remove(req)
    message = "The request needs more KV tokens than contexts that were pinned since it came leave"
    reason = {"type": "abort", "status_code": 400, "message": message}
    refused = AbortReq(rid=req.rid, finished_reason=reason)
    scheduler.ipc_channels.send_to_tokenizer.send_output(refused, req)


def around_init_req_max_new_tokens(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """AROUND hook on ``Scheduler.init_req_max_new_tokens``; the pool's own bound stays as it is."""
    spec = spec_of(req)
    if spec is None:
        original(scheduler, req)
        return
    scheduler.max_req_len += spec.hidden_tokens
    try:
        original(scheduler, req)
    finally:
        scheduler.max_req_len -= spec.hidden_tokens


def around_validate_input_length(
    original: Callable[..., str | None], req: Any, max_req_input_len: int, allow_auto_truncate: bool
) -> str | None:
    """AROUND hook on ``managers.utils.validate_input_length``; an APE row is never truncated.

    A bias is refused here too where the attention backend has no kernel for it.
    """
    spec = spec_of(req)
    if spec is None:
        return original(req, max_req_input_len, allow_auto_truncate)
    if spec.bias and not _serves_bias():
        return "ape.soft: this server has no attention module for it, as its log says at start-up"
    return original(req, max_req_input_len + spec.hidden_tokens, False)


def _serves_bias() -> bool:
    from sglang_ape.attention.batch import serves_bias  # it imports torch

    return serves_bias()


def _spec_of_input(obj: Any) -> ApeSpec | None:
    params = obj.sampling_params
    return ApeSpec.from_custom_params(params.get("custom_params")) if params else None
