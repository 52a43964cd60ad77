"""The contexts of one program: checked, and put into the bodies of its requests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sglang_ape.arguments import MAX_SCALE, MAX_TEMPERATURE
from sglang_ape.errors import ApeRequestError

Document = str | dict[str, str]  # {"id": ...}: a context that the server knows


@dataclass(frozen=True)
class Contexts:
    """What ``sgl.parallel_contexts`` was called with.

    Attributes:
        documents: one or more texts, none of them empty, or ids of stored contexts.
        options: the field ``ape`` of a request; empty where the server's defaults hold.
    """

    documents: list[Document]
    options: dict[str, float | int]


def check_contexts(
    documents: Any,
    temperature: Any = None,
    scale: Any = None,
    soft: Any = None,
    refine: Any = None,
) -> Contexts:
    """Refuse early, in the program, what the server would refuse.

    Raises:
        ApeRequestError: an argument is malformed or out of range.
    """
    if not isinstance(documents, list | tuple):
        raise _error("documents", f"must be a list, got {type(documents).__name__}")
    if not documents:
        raise _error("documents", "must not be empty")
    for i, document in enumerate(documents):
        _check_document(document, f"documents[{i}]")
    options: dict[str, float | int] = {}
    if temperature is not None:
        options["temperature"] = _number("temperature", temperature)
        if not 0 < options["temperature"] <= MAX_TEMPERATURE:
            raise _error("temperature", f"must be in (0, {MAX_TEMPERATURE:g}], got {temperature}")
    if scale is not None:
        options["scale"] = _number("scale", scale)
        if not 0 <= options["scale"] <= MAX_SCALE:
            raise _error("scale", f"must be in [0, {MAX_SCALE:g}], got {scale}")
    if soft is not None:
        options["soft"] = _number("soft", soft)
        if not 0 <= options["soft"] < math.inf:
            raise _error("soft", f"must be a number from 0 on, got {soft}")
    if refine is not None:
        if not isinstance(refine, Integral) or isinstance(refine, bool) or refine < 0:
            raise _error("refine", f"must be a whole number from 0 on, got {refine!r}")
        options["refine"] = int(refine)
    if soft and refine:
        raise _error("soft", "has nothing to act on beside refine")
    return Contexts(list(documents), options)


def _check_document(document: Any, name: str) -> None:
    if isinstance(document, dict):
        if document.keys() != {"id"} or not isinstance(document["id"], str):
            raise _error(name, 'must be a string or {"id": "ctx-..."}')
        document = document["id"]
    if not isinstance(document, str):
        raise _error(
            name, f'must be a string or {{"id": "ctx-..."}}, got {type(document).__name__}'
        )
    if not document:
        raise _error(name, "must not be empty")


def request_fields(contexts: Contexts, prefix: str, text: str | list[str]) -> dict[str, Any]:
    """The fields of a ``/generate`` body that take the place of ``text``.

    Args:
        contexts: the contexts of the program.
        prefix: the program's text where they stand, P. The server has a default for an empty one.
        text: the program's whole text, or several that begin alike (``select``).

    Raises:
        ApeRequestError: nothing follows the contexts, or the text before them has changed.
    """
    texts = [text] if isinstance(text, str) else text
    queries = [_query(prefix, one) for one in texts]
    fields: dict[str, Any] = {"text": queries, "contexts": [contexts.documents] * len(queries)}
    if isinstance(text, str):
        fields = {"text": queries[0], "contexts": contexts.documents}
    if prefix:
        fields["prefix"] = prefix
    if contexts.options:
        fields["ape"] = contexts.options
    return fields


def _query(prefix: str, text: str) -> str:
    if not text.startswith(prefix):
        raise ApeRequestError(
            "the text before parallel_contexts has changed since they were placed", "prefix"
        )
    if len(text) == len(prefix):
        raise ApeRequestError(
            "nothing follows parallel_contexts: the program needs some text, such as the "
            "question, between it and the next gen or select",
            "text",
        )
    return text[len(prefix) :]


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _error(name, f"must be a number, got {type(value).__name__}")
    return float(value)


def _error(argument: str, problem: str) -> ApeRequestError:
    return ApeRequestError(f"parallel_contexts: {argument} {problem}", argument)
