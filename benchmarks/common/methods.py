"""The ways to encode contexts that are compared, as bodies of ``POST /generate``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

from benchmarks.common.client import Body
from benchmarks.common.prompts import Prompt

LEAST_SOFT = 1e-9
"""Biases of this λ are lost in fp32's rounding, and yet contexts are scored and biased."""


class Method(StrEnum):
    """Its value is its name in tables and files."""

    NONE = "none"  # P and Q alone
    SEQUENTIAL = "sequential"  # one ordinary prompt
    HALF = "sequential, half"  # the same with half of the contexts
    ONE_CONTEXT = "one context"  # all text in one context, T = S = 1: must equal SEQUENTIAL
    PARALLEL = "parallel"  # T = S = 1
    APE = "ape"
    SOFT = "ape + soft"
    REFINE = "ape + refine"
    WARM = "ape + warm"
    WARM_SOFT = "ape + warm + soft"
    REFINE_ALL = "refine all"  # refine with m = N: must equal SEQUENTIAL
    LEAST_SOFT = "least soft"  # soft that moves nothing: must equal APE
    NO_SOFT = "soft 0"  # must equal APE

    @property
    def is_control(self) -> bool:
        return self is Method.ONE_CONTEXT


PLAIN = (
    Method.NONE,
    Method.SEQUENTIAL,
    Method.HALF,
    Method.ONE_CONTEXT,
    Method.PARALLEL,
    Method.APE,
)
LADDER = (
    Method.NONE,
    Method.SEQUENTIAL,
    Method.PARALLEL,
    Method.APE,
    Method.SOFT,
    Method.REFINE,
    Method.WARM,
    Method.WARM_SOFT,
)
_WARM = (Method.WARM, Method.WARM_SOFT)


class Rungs(NamedTuple):
    """What the methods above plain parallel encoding use."""

    temperature: float  # T
    scale: float  # S
    soft: float = 0.0  # λ of SOFT and WARM_SOFT
    refine: int = 0  # m of REFINE


def body_of(
    method: Method,
    prompt: Prompt,
    half: Sequence[int],
    rungs: Rungs | None,
    sampling: dict[str, Any],
) -> Body:
    """The request that one method makes of a question.

    Args:
        method: how its contexts are encoded.
        prompt: the question, with all contexts.
        half: indices of the contexts that :attr:`Method.HALF` keeps.
        rungs: settings of APE and its rungs; None leaves :attr:`Method.APE` to the server's.
        sampling: SGLang's sampling parameters.
    """
    body: Body = {"sampling_params": sampling}
    if method is Method.NONE:
        return body | {"input_ids": prompt.with_contexts([]).sequence}
    if method is Method.SEQUENTIAL:
        return body | {"input_ids": prompt.sequence}
    if method is Method.HALF:
        return body | {"input_ids": prompt.with_contexts(half).sequence}
    if method in _WARM:
        prompt = prompt.warmed
    contexts = prompt.contexts
    if method is Method.ONE_CONTEXT:
        contexts = (list(chain.from_iterable(contexts)),)
    return body | {
        "prefix_ids": prompt.prefix,
        "contexts": [{"input_ids": ids} for ids in contexts],
        "input_ids": prompt.query,
        "ape": _options(method, rungs, len(contexts)),
    }


def _options(method: Method, rungs: Rungs | None, count: int) -> dict[str, float]:
    """The field ``ape``; soft and refine are given too, so that no server's default counts."""
    if rungs is None:
        return {}
    soft, refine = 0.0, 0
    if method in (Method.SOFT, Method.WARM_SOFT):
        soft = rungs.soft
    elif method is Method.LEAST_SOFT:
        soft = LEAST_SOFT
    elif method is Method.REFINE:
        refine = rungs.refine
    elif method is Method.REFINE_ALL:
        refine = count
    is_plain = method in (Method.ONE_CONTEXT, Method.PARALLEL)
    temperature, scale = (1.0, 1.0) if is_plain else (rungs.temperature, rungs.scale)
    return {"temperature": temperature, "scale": scale, "soft": soft, "refine": refine}
