"""Lengths: an APE row holds more tokens than it uses positions.

The model's window bounds positions, the page table bounds tokens. SGLang's three length checks
take a row's length for both, so for APE requests they are asked about positions, and the page
table is made wider by what the contexts may add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sglang_ape.request import spec_of
from sglang_ape.spec import ApeSpec


class Limits(NamedTuple):
    """What a request must fit into."""

    window: int  # positions of the model, generated tokens included
    context_tokens: int  # tokens of all contexts of one request
    pool_tokens: int  # tokens that the KV pool holds
    vocab_size: int


def extra_row_tokens(extra: int, server_args: Any) -> int:
    """AFTER hook on ``get_req_to_token_extra_context_len``: widen the page table's rows.

    A row within the window holds at most ``window`` tokens beside the hidden ones, and those are
    fewer than the contexts' total.
    """
    return extra + server_args.ape_max_context_tokens if server_args.enable_ape else extra


def around_validate_one_request(
    original: Callable[..., None], manager: Any, obj: Any, input_ids: Sequence[int]
) -> None:
    """AROUND hook on ``TokenizerManager._validate_one_request``."""
    spec = _spec_of_input(obj)
    positions = input_ids if spec is None else input_ids[spec.hidden_tokens :]
    original(manager, obj, positions)


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
    """AROUND hook on ``managers.utils.validate_input_length``; an APE row is never truncated."""
    spec = spec_of(req)
    if spec is None:
        return original(req, max_req_input_len, allow_auto_truncate)
    return original(req, max_req_input_len + spec.hidden_tokens, False)


def _spec_of_input(obj: Any) -> ApeSpec | None:
    params = obj.sampling_params
    return ApeSpec.from_custom_params(params.get("custom_params")) if params else None
