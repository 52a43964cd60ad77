"""What an APE request is to the engine: segments of one token row, and T and S.

An APE request is one ordinary request whose row is ``P + C_1 + ... + C_N + Q``; generated tokens
continue Q. Everything here is arithmetic on lengths: no torch, no SGLang.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

PREFIX_LEN = "ape_prefix_len"
CONTEXT_LENS = "ape_context_lens"
TEMPERATURE = "ape_temperature"
SCALE = "ape_scale"
NAMESPACE = "ape_namespace"
CUSTOM_PARAM_KEYS = frozenset({PREFIX_LEN, CONTEXT_LENS, TEMPERATURE, SCALE, NAMESPACE})


class Segment(NamedTuple):
    """A half-open range of rows inside one context."""

    context: int  # its index
    start: int
    stop: int


@dataclass(frozen=True)
class ApeSpec:
    """The segments of one row and how the query attends to them.

    Args:
        prefix_len: tokens of P, may be 0.
        context_lens: tokens of each context in row order, all positive.
        temperature: T > 0, divides the logits of the contexts pass.
        scale: S >= 0; the contexts' log-sum-exp is multiplied by S * T before the merge.
        namespace: names the set of contexts with T and S, whatever their order; the KV of Q and
            of the answer depends on all of it and is cached under this name.

    Source: APE paper, section 4; positions and merge as in the terms of docs/how-it-works.md.
    """

    prefix_len: int
    context_lens: tuple[int, ...]
    temperature: float
    scale: float
    namespace: str

    @cached_property
    def context_starts(self) -> tuple[int, ...]:
        """Row index of each context's first token."""
        return tuple(accumulate(self.context_lens[:-1], initial=self.prefix_len))

    @cached_property
    def context_stops(self) -> tuple[int, ...]:
        """Row index behind each context's last token."""
        return tuple(accumulate(self.context_lens, initial=self.prefix_len))[1:]

    @cached_property
    def context_end(self) -> int:
        """Row index of the query's first token."""
        return self.context_stops[-1]

    @cached_property
    def hidden_tokens(self) -> int:
        """How much longer the row is than the positions it uses: sum less max of the contexts."""
        return sum(self.context_lens) - max(self.context_lens)

    def context_segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The parts of contexts that rows [start, stop) cover, in row order."""
        start = max(start, self.prefix_len)
        stop = min(stop, self.context_end)
        if start >= stop:
            return
        first = bisect_right(self.context_starts, start) - 1
        for index in range(first, len(self.context_lens)):
            begin = self.context_starts[index]
            if begin >= stop:
                return
            yield Segment(index, max(begin, start), min(self.context_stops[index], stop))

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions of rows [start, stop), int64 of shape (stop - start,).

        P counts from 0, every context from ``prefix_len``, Q from ``prefix_len`` plus the longest
        context.
        """
        out = np.arange(start, stop, dtype=np.int64)
        for context, begin, end in self.context_segments(start, stop):
            shift = self.context_starts[context] - self.prefix_len
            out[begin - start : end - start] -= shift
        out[max(self.context_end - start, 0) :] -= self.hidden_tokens
        return out

    def reordered(self, order: Sequence[int]) -> ApeSpec:
        """The same request with context ``order[k]`` at place k."""
        return replace(self, context_lens=tuple(self.context_lens[i] for i in order))

    def to_custom_params(self) -> dict[str, Any]:
        """Flat scalars and lists, the form that survives both of SGLang's IPC encodings."""
        return {
            PREFIX_LEN: self.prefix_len,
            CONTEXT_LENS: list(self.context_lens),
            TEMPERATURE: self.temperature,
            SCALE: self.scale,
            NAMESPACE: self.namespace,
        }

    @classmethod
    def from_custom_params(cls, params: Any) -> ApeSpec | None:
        """The inverse of :meth:`to_custom_params`; None for a plain request.

        The values are trusted: no other writer of these keys gets past the tokenizer manager
        (``entry.tokenizer_manager``).
        """
        if not isinstance(params, dict) or CONTEXT_LENS not in params:
            return None
        return cls(
            prefix_len=params[PREFIX_LEN],
            context_lens=tuple(params[CONTEXT_LENS]),
            temperature=params[TEMPERATURE],
            scale=params[SCALE],
            namespace=params[NAMESPACE],
        )
