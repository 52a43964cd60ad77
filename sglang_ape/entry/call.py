"""The fields ``contexts``, ``prefix``, ``prefix_ids`` and ``ape`` of a request, checked.

Every door (HTTP routes, Engine) brings the same fields here; every error names the field as the
caller wrote it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_ape.arguments import MAX_CONTEXTS, MAX_SCALE, MAX_TEMPERATURE
from sglang_ape.errors import ApeRequestError
from sglang_ape.metrics import RequestUsage

FIELDS = ("contexts", "prefix", "prefix_ids", "ape")

Ids = array  # of type "I": contexts are checked, joined and hashed without touching every id
Text = str | Ids  # a text still to be tokenised, or its ids


class ContextId(NamedTuple):
    """A context that the server knows: its tokens come from the context store."""

    id: str


Context = Text | ContextId


class ApeOptions(BaseModel):
    """The ``ape`` field: what a request overrides of the server's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: Annotated[float, Field(gt=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] | None = (
        None
    )
    scale: Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)] | None = None
    soft: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    refine: Annotated[int, Field(ge=0)] | None = None


class ApeItem(NamedTuple):
    """One APE request as its caller gave it; ``at`` is the index in a batch, as in ``[2]``."""

    contexts: Sequence[Context]
    prefix: Text | None  # None: that of contexts given by id, the chat template's, or the default
    prefix_name: str  # as the caller wrote it
    options: ApeOptions
    at: str


class Door(NamedTuple):
    """What callers of one entry point call the query and the answer's length."""

    text: str
    ids: str
    new_tokens: str
    chat: bool = False  # P and Q come out of the chat template


NATIVE = Door("text", "input_ids", "sampling_params.max_new_tokens")
COMPLETIONS = Door("prompt", "prompt", "max_tokens")
CHAT = Door("messages", "messages", "max_tokens", chat=True)
ENGINE = Door("prompt", "input_ids", "sampling_params.max_new_tokens")


class ApeCall:
    """The APE fields of one call, on their way from the door to the tokenizer manager.

    Attributes:
        items: one a request of the batch, or a single one.
        batched: whether ``contexts`` was a list of lists.
        door: where the call came in.
        error: set when the call was refused after it had left the door.
        usage: of each item that has been answered so far, by its index.
    """

    def __init__(self, items: list[ApeItem], batched: bool, door: Door) -> None:
        self.items = items
        self.batched = batched
        self.door = door
        self.error: ApeRequestError | None = None
        self.usage: dict[int, RequestUsage] = {}


current_call: ContextVar[ApeCall | None] = ContextVar("ape_call", default=None)
"""Set around one call of the engine; tasks started for the call inherit it."""


def parse_call(
    fields: Mapping[str, Any], door: Door, max_contexts: int = MAX_CONTEXTS
) -> ApeCall | None:
    """Check the APE fields of a call.

    Args:
        fields: the body or keyword arguments; of keys other than :data:`FIELDS`, only the queries
            are looked at, to be counted. None counts as not given.
        door: where the call came in; in a chat, P comes from the messages.
        max_contexts: that each request may have.

    Returns:
        None when the call has no APE field.

    Raises:
        ApeRequestError: a field is malformed, out of range or without effect.
    """
    given = [name for name in FIELDS if fields.get(name) is not None]
    if not given:
        return None
    if "contexts" not in given:
        raise ApeRequestError(f"{given[0]} has no effect without contexts", given[0])
    if door.chat and ("prefix" in given or "prefix_ids" in given):
        name = "prefix" if "prefix" in given else "prefix_ids"
        raise ApeRequestError(f"{name} cannot be given here: the messages hold the prefix", name)
    contexts = fields["contexts"]
    if not isinstance(contexts, list | tuple):
        raise ApeRequestError(f"contexts must be a list, got {_kind(contexts)}", "contexts")
    if not contexts:
        raise ApeRequestError("contexts must not be empty", "contexts")
    is_batch = isinstance(contexts[0], list | tuple)
    _check_count(fields, door, len(contexts) if is_batch else None)
    if not is_batch:
        item = _parse_item(fields, contexts, None, max_contexts)
        return ApeCall([item], batched=False, door=door)
    items = []
    for i, own in enumerate(contexts):
        if not isinstance(own, list | tuple) or not own:
            raise ApeRequestError(
                f"contexts[{i}] must be a list of contexts that is not empty, as contexts[0] is; "
                'token ids are given as {"input_ids": [...]}',
                f"contexts[{i}]",
            )
        items.append(_parse_item(fields, own, i, max_contexts))
    return ApeCall(items, batched=True, door=door)


def _check_count(fields: Mapping[str, Any], door: Door, lists: int | None) -> None:
    """Refuse another number of lists than of queries before any of them is parsed or tokenised.

    Queries that are not among the fields, as in the Engine, are counted when the call is applied.
    """
    queries = fields.get(door.text) or fields.get(door.ids)
    if not queries:
        return
    is_batch = not door.chat and isinstance(queries, list) and isinstance(queries[0], str | list)
    count = len(queries) if is_batch else 1
    if (lists is not None and not is_batch) or (lists or 1) != count:
        name = door.text if fields.get(door.text) else door.ids
        wanted = f"{count} lists of contexts" if is_batch else "one list of contexts"
        got = "one list" if lists is None else f"{lists} lists"
        raise ApeRequestError(f"{name} needs {wanted}, got {got}", "contexts")


def _parse_item(
    fields: Mapping[str, Any], contexts: Sequence[Any], index: int | None, max_contexts: int
) -> ApeItem:
    at = "" if index is None else f"[{index}]"
    parsed = parse_contexts(contexts, max_contexts, at)
    prefix, prefix_name = parse_prefix(fields, index)
    return ApeItem(parsed, prefix, prefix_name, _parse_options(fields, index), at)


def parse_contexts(
    contexts: Sequence[Any], max_contexts: int = MAX_CONTEXTS, at: str = ""
) -> list[Context]:
    """The contexts of one request, in any of their forms; ``at`` is its index in a batch."""
    if len(contexts) > max_contexts:
        raise ApeRequestError(
            f"contexts{at} has {len(contexts)} contexts, more than the {max_contexts} of "
            "--ape-max-contexts",
            f"contexts{at}",
        )
    return [_parse_context(value, f"contexts{at}[{i}]") for i, value in enumerate(contexts)]


def _parse_context(value: Any, param: str) -> Context:
    if isinstance(value, str):
        return _parse_text(value, param)
    if not isinstance(value, dict):
        raise ApeRequestError(
            f'{param} must be a string, {{"text": ...}}, {{"input_ids": [...]}} or {{"id": ...}}, '
            f"got {_kind(value)}",
            param,
        )
    if len(value) != 1 or not value.keys() <= {"text", "input_ids", "id"}:
        keys = ", ".join(repr(key) for key in list(value)[:5]) or "no key"
        raise ApeRequestError(
            f"{param} must have exactly one of the keys text, input_ids and id, got {keys}", param
        )
    if "text" in value:
        return _parse_text(value["text"], f"{param}.text")
    if "input_ids" in value:
        return parse_ids(value["input_ids"], f"{param}.input_ids")
    if not isinstance(value["id"], str):
        raise ApeRequestError(
            f"{param}.id must be a string, got {_kind(value['id'])}", f"{param}.id"
        )
    return ContextId(check_text(value["id"], f"{param}.id"))


def _parse_text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise ApeRequestError(f"{param} must be a string, got {_kind(value)}", param)
    if not value:
        raise ApeRequestError(f"{param} must not be empty", param)
    return check_text(value, param)


def check_text(value: str, param: str) -> str:
    """Refuse a lone surrogate, which JSON can carry but no tokenizer can read."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApeRequestError(f"{param} is not valid Unicode text: {error.reason}", param) from None
    return value


def parse_ids(value: Any, param: str, allow_empty: bool = False) -> Ids:
    """Token ids as the caller gave them.

    Raises:
        ApeRequestError: not a list, empty, or with anything but integers.
    """
    if not isinstance(value, list | tuple | array):
        raise ApeRequestError(f"{param} must be a list of token ids, got {_kind(value)}", param)
    if not value and not allow_empty:
        raise ApeRequestError(f"{param} must not be empty", param)
    try:
        ids = array("I", value)
    except OverflowError:
        wrong = next(int(token) for token in value if not 0 <= token < 2**32)
        raise ApeRequestError(
            f"{param} holds token id {_shown(wrong)}, outside any vocabulary", param
        ) from None
    except TypeError:
        ids = None
    # An array takes True and False for 1 and 0; to look at the type of every id would take longer
    # than all else that is done to it.
    if ids is None or (ids and numbers_of(ids).min() < 2 and bool in map(type, value)):
        wrong = next(t for t in value if isinstance(t, bool) or not hasattr(t, "__index__"))
        raise ApeRequestError(f"{param} must hold integers only, got {_kind(wrong)}", param)
    return ids


def numbers_of(ids: Ids) -> np.ndarray:
    """The same memory as a NumPy array."""
    return np.frombuffer(ids, np.uint32)


def parse_prefix(fields: Mapping[str, Any], index: int | None = None) -> tuple[Text | None, str]:
    """P as it was given, None if it was not, and the name of its field."""
    text, ids = fields.get("prefix"), fields.get("prefix_ids")
    if text is not None and ids is not None:
        raise ApeRequestError("give prefix or prefix_ids, not both", "prefix_ids")
    if text is not None:
        text, param = _of_item(fields, "prefix", index)
        if not isinstance(text, str):
            raise ApeRequestError(f"{param} must be a string, got {_kind(text)}", param)
        return check_text(text, param), param
    if ids is not None:
        nested = isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], list | tuple)
        ids, param = _of_item(fields, "prefix_ids", index) if nested else (ids, "prefix_ids")
        return parse_ids(ids, param, allow_empty=True), param
    return None, "prefix_ids"


def _parse_options(fields: Mapping[str, Any], index: int | None) -> ApeOptions:
    if fields.get("ape") is None:
        return ApeOptions()
    value, param = _of_item(fields, "ape", index)
    if not isinstance(value, dict):
        raise ApeRequestError(f"{param} must be an object, got {_kind(value)}", param)
    try:
        options = ApeOptions.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join([param, *map(str, first["loc"])])
        raise ApeRequestError(
            f"{name}: {first['msg']}, got {_shown(first['input'])}", name
        ) from None
    if options.soft and options.refine:
        name = f"{param}.soft"
        raise ApeRequestError(f"{name} has nothing to act on beside {param}.refine", name)
    return options


def _of_item(fields: Mapping[str, Any], name: str, index: int | None) -> tuple[Any, str]:
    """A field's value for one request of a batch: a list has one value a request."""
    value = fields[name]
    if index is None or not isinstance(value, list | tuple):
        return value, name
    size = len(fields["contexts"])
    if len(value) != size:
        raise ApeRequestError(f"{name} has {len(value)} values for a batch of {size}", name)
    return value[index], f"{name}[{index}]"


def _shown(value: Any) -> str:
    """A scalar as it was given, cut short; of anything else its type.

    Python refuses to print integers of thousands of digits.
    """
    if isinstance(value, str | float | None):
        return repr(value)[:80]
    if isinstance(value, int) and value.bit_length() <= 64:
        return repr(value)
    return f"a {_kind(value)}"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
