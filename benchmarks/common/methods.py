"""The ways to encode contexts that are compared, as bodies of ``POST /generate``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

from benchmarks.common.client import Body
from benchmarks.common.prompts import Prompt


class Method(StrEnum):
    """Its value is its name in tables and files."""

    NONE = "none"  # P and Q alone
    SEQUENTIAL = "sequential"  # one ordinary prompt
    HALF = "sequential, half"  # the same with half of the contexts
    ONE_CONTEXT = "one context"  # all text in one context, T = S = 1: must equal SEQUENTIAL
    PARALLEL = "parallel"  # T = S = 1
    APE = "ape"

    @property
    def is_control(self) -> bool:
        return self is Method.ONE_CONTEXT


def body_of(
    method: Method,
    prompt: Prompt,
    half: Sequence[int],
    options: dict[str, float],
    sampling: dict[str, Any],
) -> Body:
    """The request that one method makes of a question.

    Args:
        method: how its contexts are encoded.
        prompt: the question, with all contexts.
        half: indices of the contexts that :attr:`Method.HALF` keeps.
        options: the field ``ape`` of :attr:`Method.APE`.
        sampling: SGLang's sampling parameters.
    """
    body: Body = {"sampling_params": sampling}
    if method is Method.NONE:
        return body | {"input_ids": prompt.with_contexts([]).sequence}
    if method is Method.SEQUENTIAL:
        return body | {"input_ids": prompt.sequence}
    if method is Method.HALF:
        return body | {"input_ids": prompt.with_contexts(half).sequence}
    contexts = prompt.contexts
    if method is Method.ONE_CONTEXT:
        contexts = (list(chain.from_iterable(contexts)),)
    return body | {
        "prefix_ids": prompt.prefix,
        "contexts": [{"input_ids": ids} for ids in contexts],
        "input_ids": prompt.query,
        "ape": options if method is Method.APE else {"temperature": 1.0, "scale": 1.0},
    }
