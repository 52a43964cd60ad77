"""SGLang's own fields beside contexts, checked before SGLang uses them.

SGLang 0.5.17 takes some of them as they come and fails on a wrong value later: with status 500, or
in the scheduler, which ends the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any, get_type_hints

import msgspec
import orjson

from sglang_ape.entry.call import CHAT, COMPLETIONS, Door
from sglang_ape.errors import ApeRequestError

MAX_CHOICES = 128
"""``n``. SGLang makes as many copies of a request before it looks at it."""
MAX_ITEMS = 16_384
"""Of a list beside contexts that has not one item for each query."""

# Written by SamplingParams itself.
_INTERNAL = frozenset(
    ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
)
_MAX_INT = 2**31 - 1  # most end in tensors of type int32
_MAX_FLOAT = 1e30  # and in tensors of type float32, whose sums must stay finite
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_LIST_FIELDS = (
    *("rid", "extra_key", "lora_path", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("return_sampling_mask", "return_hidden_states", "custom_logit_processor"),
)
_QUERY_TYPES: dict[str, set[type]] = {
    "text": {str},
    "input_ids": {int, list},
    "prompt": {str, int, list},
}
_OVERRIDES = "positional_embed_overrides"


def to_json(fields: Mapping[str, Any]) -> bytes:
    """The body that goes on to SGLang.

    Raises:
        ApeRequestError: it holds what no field of SGLang can take and not every parser reads: lone
            surrogates, numbers that are not finite or have more than 64 bits, deep nesting.
    """
    for name, value in fields.items():
        try:
            orjson.dumps({name: value})
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            shown = name.encode(errors="replace").decode()[:80]
            raise ApeRequestError(f"{shown}: {str(error)[:200]}", shown) from None
    return orjson.dumps(fields)


def check_sampling(params: Mapping[str, Any], door: Door) -> None:
    """Refuse sampling parameters that SGLang does not know, or of other types than it declares.

    Raises:
        ApeRequestError: with the name as the caller wrote it.
    """
    known = _known_params()
    for name, value in params.items():
        if name not in known:
            param = _param(name, door)
            raise ApeRequestError(f"{param[:80]} is no sampling parameter", param[:80])
        if value is not None and name != "custom_params":  # checked where they are extended
            _check_param(name, value, _param(name, door))


def _check_param(name: str, value: Any, param: str) -> None:
    try:
        msgspec.convert(value, _known_params()[name])
    except (msgspec.ValidationError, OverflowError) as error:
        raise ApeRequestError(f"{param}: {str(error)[:200]}", param) from None
    least, most = -_MAX_INT, _MAX_INT
    if name == "sampling_seed":
        least, most = _MIN_SEED, _MAX_SEED
    elif name == "n":
        least, most = 1, MAX_CHOICES
    elif name == "stream_interval":
        least = 1
    numbers = value.values() if name == "logit_bias" else [value]
    for number in numbers:
        if isinstance(number, int) and not least <= number <= most:
            raise ApeRequestError(f"{param} must be from {least} to {most}", param)
        if isinstance(number, float) and not abs(number) <= _MAX_FLOAT:
            raise ApeRequestError(f"{param} must be a number, got {number}", param)
    if name == "logit_bias" and not all(key.isdecimal() and len(key) < 10 for key in value):
        raise ApeRequestError(f"{param} must have token ids as keys", param)
    if name == "stop_regex":
        _check_regex([value] if isinstance(value, str) else value, param)


def _check_regex(patterns: list[str], param: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ApeRequestError(f"{param}: {str(error)[:200]}", param) from None


def check_fields(obj: Any, count: int, batched: bool, vocab_size: int, door: Door) -> None:
    """Refuse lists of another length than the batch, and numbers that the model cannot serve.

    Args:
        obj: a ``GenerateReqInput``, not yet normalised.
        count: requests of the call.
        batched: whether they came as a list.
        vocab_size: of the model.
        door: where the call came in.
    """
    if getattr(obj, _OVERRIDES, None) is not None:  # {} would end the scheduler
        raise ApeRequestError(f"{_OVERRIDES} cannot be given beside contexts", _OVERRIDES)
    for name in _LIST_FIELDS:
        value = getattr(obj, name, None)
        if isinstance(value, list) and (not batched or len(value) != count):
            raise ApeRequestError(f"{name} has {len(value)} values for {count} requests", name)
    tops = getattr(obj, "top_logprobs_num", None)
    for number in tops if isinstance(tops, list) else [tops]:
        if number is not None and not 0 <= number <= vocab_size:
            param = {COMPLETIONS: "logprobs", CHAT: "top_logprobs"}.get(door, "top_logprobs_num")
            raise ApeRequestError(f"{param} must be from 0 to {vocab_size}, got {number}", param)


@cache
def _known_params() -> dict[str, Any]:
    from sglang.srt.sampling.sampling_params import SamplingParams

    hints = get_type_hints(SamplingParams)
    return {name: hint for name, hint in hints.items() if name not in _INTERNAL}


def _param(name: str, door: Door) -> str:
    if door in (CHAT, COMPLETIONS):
        return _RENAMED.get(name, name)
    return f"sampling_params.{name}"


def check_lists(fields: Mapping[str, Any], count: int, door: Door) -> None:
    """Refuse long lists of the wrong types: SGLang describes every single error, and stands still.

    Args:
        fields: the body without the plugin's own.
        count: requests of the call.
        door: where the call came in.
    """
    for name, value in fields.items():
        if not isinstance(value, list):
            continue
        if name in _QUERY_TYPES and name in (door.text, door.ids):
            _check_queries(value, name, _QUERY_TYPES[name])
        elif len(value) > max(count, MAX_ITEMS):
            shown = name.encode(errors="replace").decode()[:80]
            raise ApeRequestError(f"{shown} has {len(value)} items, more than {MAX_ITEMS}", shown)


def _check_queries(queries: list[Any], name: str, kinds: set[type]) -> None:
    found = set(map(type, queries))
    inner = set(map(type, chain.from_iterable(queries))) if found == {list} else set()
    if len(found) > 1 or not found <= kinds or not inner <= {int}:
        names = {str: "texts", int: "token ids", list: "lists of token ids"}
        wanted = ", or ".join(names[kind] for kind in names if kind in kinds)
        raise ApeRequestError(f"{name} must be a list of {wanted}", name)


def check_response_format(value: Any) -> None:
    """Refuse what SGLang takes for objects without looking."""
    for path in ((), ("schema",), ("schema", "properties"), ("schema", "properties", "strict")):
        inner = value
        for key in path:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if not isinstance(inner, dict | None):
            param = ".".join(("response_format", *path))
            raise ApeRequestError(f"{param} must be an object", param)


def check_template_kwargs(value: Any) -> None:
    """Refuse names in ``chat_template_kwargs`` that SGLang gives to the renderer itself."""
    taken = _TEMPLATE_ARGUMENTS.intersection(value) if isinstance(value, dict) else ()
    if taken:
        raise ApeRequestError(
            f"chat_template_kwargs cannot hold {sorted(taken)[0]}", "chat_template_kwargs"
        )


# ``apply_chat_template`` of transformers 5; also what would replace the template itself.
_TEMPLATE_ARGUMENTS = frozenset(
    (
        *("conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("self", "messages"),
    )
)
