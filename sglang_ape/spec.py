"""What an APE request is to the engine: segments of one token row, T and S, and a bias.

An APE request is one ordinary request whose row is ``P + C_1 + ... + C_N + Q``; generated tokens
continue Q. A scoring request has a copy of Q for each context in the place of Q, or Q and a null
query that read no context. Everything here is arithmetic on lengths: no torch, no SGLang.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np

PREFIX_LEN = "ape_prefix_len"
CONTEXT_LENS = "ape_context_lens"
TEMPERATURE = "ape_temperature"
SCALE = "ape_scale"
NAMESPACE = "ape_namespace"
BIAS = "ape_bias"
COPY_LEN = "ape_copy_len"
PROBE_LENS = "ape_probe_lens"
CUSTOM_PARAM_KEYS = frozenset(
    {PREFIX_LEN, CONTEXT_LENS, TEMPERATURE, SCALE, NAMESPACE, BIAS, COPY_LEN, PROBE_LENS}
)


MOST_NULL_TOKENS = 16
"""Of the null query of a ProbeSpec; the page table has room for them."""


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
        namespace: names the set of contexts with T, S and the bias, whatever their order; the KV
            of Q and of the answer depends on all of it and is cached under this name.
        bias: for each context what is added to its log-sum-exp (natural, after T) before the
            contexts are joined; at most 0, and 0 for one of them. Empty: none.

    Source: APE paper, section 4; positions and merge as in the terms of docs/how-it-works.md.
    """

    prefix_len: int
    context_lens: tuple[int, ...]
    temperature: float
    scale: float
    namespace: str
    bias: tuple[float, ...] = ()

    @cached_property
    def row_len(self) -> int | None:
        """Rows of a request that only asks for scores; None for one that generates."""
        return None

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
    def context_indptr(self) -> np.ndarray:
        """(contexts + 1,) int32: where each context begins, counted from the first one's start."""
        return np.array([0, *accumulate(self.context_lens)], np.int32)

    @cached_property
    def lens_and_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32) and bias (fp32, 0 where there is none) of each context."""
        count = len(self.context_lens)
        bias = np.array(self.bias or (0.0,) * count, np.float32)
        return np.array(self.context_lens, np.int32), bias

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
        return replace(
            self,
            context_lens=tuple(self.context_lens[i] for i in order),
            bias=tuple(self.bias[i] for i in order) if self.bias else (),
        )

    def cacheable(self, stop: int) -> int:
        """How many of rows [0, stop) may go to the cache."""
        return stop

    def to_custom_params(self) -> dict[str, Any]:
        """Flat scalars and lists, the form that survives both of SGLang's IPC encodings."""
        params = {
            PREFIX_LEN: self.prefix_len,
            CONTEXT_LENS: list(self.context_lens),
            TEMPERATURE: self.temperature,
            SCALE: self.scale,
            NAMESPACE: self.namespace,
        }
        return {**params, BIAS: list(self.bias)} if self.bias else params

    @classmethod
    def from_custom_params(cls, params: Any) -> ApeSpec | None:
        """The inverse of :meth:`to_custom_params`; None for a plain request.

        The values are trusted: no other writer of these keys gets past the tokenizer manager
        (``entry.tokenizer_manager``).
        """
        if not isinstance(params, dict) or CONTEXT_LENS not in params:
            return None
        if COPY_LEN in params:
            return ScoreSpec.of(params[PREFIX_LEN], params[CONTEXT_LENS], params[COPY_LEN])
        if PROBE_LENS in params:
            return ProbeSpec.of(params[PREFIX_LEN], params[CONTEXT_LENS], *params[PROBE_LENS])
        return cls(
            prefix_len=params[PREFIX_LEN],
            context_lens=tuple(params[CONTEXT_LENS]),
            temperature=params[TEMPERATURE],
            scale=params[SCALE],
            namespace=params[NAMESPACE],
            bias=tuple(params.get(BIAS, ())),
        )


@dataclass(frozen=True)
class AskingSpec(ApeSpec):
    """A row that asks for scores of its contexts. What stands behind them is never cached, and
    stays where it is when contexts change places; the request generates nothing.

    Args:
        places: where the contexts stand in the row, in the order in which they were sent.
    """

    places: tuple[int, ...] = ()

    def reordered(self, order: Sequence[int]) -> Self:
        new_place = {place: k for k, place in enumerate(order)}
        return replace(
            self,
            context_lens=tuple(self.context_lens[i] for i in order),
            places=tuple(new_place[place] for place in self.places),
        )

    def cacheable(self, stop: int) -> int:
        return min(stop, self.context_end)


@dataclass(frozen=True)
class ScoreSpec(AskingSpec):
    """A row that asks how likely Q is after each context alone: ``P + C_1 + ... + C_N + tail``.

    The tail has a *copy* for each context: its last token once more, and Q. Copy k attends to P, to
    the context at ``places[k]`` without its last token, and to its own past, at the positions that
    follow. So the log-probabilities of a copy are those of the ordinary request ``P + C_i + Q``.

    Args:
        copy_len: tokens of a copy, 1 + len(Q).
    """

    copy_len: int = 0

    @classmethod
    def of(cls, prefix_len: int, context_lens: Sequence[int], copy_len: int) -> ScoreSpec:
        """The spec of a row as it is sent: its copies in the order of the contexts."""
        lens = tuple(context_lens)
        return cls(prefix_len, lens, 1.0, 1.0, "", (), tuple(range(len(lens))), copy_len)

    @cached_property
    def row_len(self) -> int:
        return self.context_end + len(self.places) * self.copy_len

    @cached_property
    def hidden_tokens(self) -> int:
        """Rows less positions: the copy of the longest context uses the last one."""
        copies = (len(self.places) - 1) * self.copy_len
        return sum(self.context_lens) - max(self.context_lens) + copies + 1

    def copies(self, start: int, stop: int) -> Iterator[Segment]:
        """The parts of copies that rows [start, stop) cover, with their contexts' places."""
        start = max(start, self.context_end)
        for k in range((start - self.context_end) // self.copy_len, len(self.places)):
            begin = self.context_end + k * self.copy_len
            if begin >= stop:
                return
            yield Segment(self.places[k], max(begin, start), min(begin + self.copy_len, stop))

    def positions(self, start: int, stop: int) -> np.ndarray:
        out = super().positions(start, stop)
        for place, begin, end in self.copies(start, stop):
            first = self.prefix_len + self.context_lens[place] - 1
            offset = (begin - self.context_end) % self.copy_len
            out[begin - start : end - start] = np.arange(end - begin) + first + offset
        return out

    def to_custom_params(self) -> dict[str, Any]:
        return {**super().to_custom_params(), COPY_LEN: self.copy_len}


@dataclass(frozen=True)
class ProbeSpec(AskingSpec):
    """A row that asks how much Q attends to each context: ``P + C_1 + ... + C_N + Q + null``.

    Q, and a null query behind it, attend to P and to their own past alone, at the positions that Q
    has. How much attention they would give to each context is measured beside that
    (``attention.mass``).

    Args:
        query_len: tokens of Q.
        null_len: tokens of the null query.
    """

    query_len: int = 0
    null_len: int = 0

    @classmethod
    def of(
        cls, prefix_len: int, context_lens: Sequence[int], query_len: int, null_len: int
    ) -> ProbeSpec:
        """The spec of a row as it is sent."""
        lens = tuple(context_lens)
        places = tuple(range(len(lens)))
        return cls(prefix_len, lens, 1.0, 1.0, "", (), places, query_len, null_len)

    @cached_property
    def row_len(self) -> int:
        return self.context_end + self.query_len + self.null_len

    @cached_property
    def hidden_tokens(self) -> int:
        shorter = min(self.query_len, self.null_len)
        return sum(self.context_lens) - max(self.context_lens) + shorter

    def queries(self, start: int, stop: int) -> Iterator[Segment]:
        """The parts of Q (0) and of the null query (1) that rows [start, stop) cover."""
        middle = self.context_end + self.query_len
        for which, begin, end in ((0, self.context_end, middle), (1, middle, self.row_len)):
            if max(begin, start) < min(end, stop):
                yield Segment(which, max(begin, start), min(end, stop))

    def positions(self, start: int, stop: int) -> np.ndarray:
        out = super().positions(start, stop)
        for which, begin, end in self.queries(start, stop):
            first = self.context_end + which * self.query_len
            at = self.prefix_len + max(self.context_lens) - first
            out[begin - start : end - start] = np.arange(begin + at, end + at)
        return out

    def to_custom_params(self) -> dict[str, Any]:
        return {**super().to_custom_params(), PROBE_LENS: [self.query_len, self.null_len]}
