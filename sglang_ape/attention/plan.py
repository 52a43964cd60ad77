"""Cut the new rows of a request into the sub-sequences of the path pass and the contexts pass.

The *path* pass is causal over a token's own past: P and its own context for context tokens, P and
Q for query and generated tokens, P and one context for a copy of Q that is being scored, P and
itself for a query whose attention is being measured. The *contexts* pass lets query and generated
tokens see every context, in no order. Only row ranges are handled here: no torch, no slots.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_ape.spec import ApeSpec, ProbeSpec, ScoreSpec

RowRange = tuple[int, int]  # half-open


class Path(NamedTuple):
    """Rows that share a causal past; bottom-right aligned to the end of ``kv``."""

    rows: RowRange
    kv: tuple[RowRange, ...]  # concatenated, the last one ends with ``rows``


class RequestPlan(NamedTuple):
    """What the new rows of one request read."""

    paths: tuple[Path, ...]  # in row order; together they cover the new rows exactly once
    query_rows: RowRange | None  # the rows that also take the contexts pass
    contexts: RowRange  # the rows they read there


def plan_request(spec: ApeSpec, start: int, stop: int) -> RequestPlan:
    """Plan rows [start, stop) of a request whose rows [0, start) are already in the KV pool."""
    prefix: RowRange = (0, spec.prefix_len)
    paths = []
    if start < spec.prefix_len:
        end = min(stop, spec.prefix_len)
        paths.append(Path((start, end), ((0, end),)))
    for index, begin, end in spec.context_segments(start, stop):
        paths.append(Path((begin, end), (prefix, (spec.context_starts[index], end))))
    query_rows = None
    if isinstance(spec, ScoreSpec):
        paths += _paths_of_copies(spec, start, stop)
    elif isinstance(spec, ProbeSpec):
        paths += _paths_of_queries(spec, start, stop)
    elif stop > spec.context_end:
        query_rows = (max(start, spec.context_end), stop)
        paths.append(Path(query_rows, (prefix, (spec.context_end, stop))))
    return RequestPlan(tuple(paths), query_rows, (spec.prefix_len, spec.context_end))


def _paths_of_copies(spec: ScoreSpec, start: int, stop: int) -> list[Path]:
    paths = []
    for place, begin, end in spec.copies(start, stop):
        first = begin - (begin - spec.context_end) % spec.copy_len  # of the copy
        context = (spec.context_starts[place], spec.context_stops[place] - 1)
        paths.append(Path((begin, end), ((0, spec.prefix_len), context, (first, end))))
    return paths


def _paths_of_queries(spec: ProbeSpec, start: int, stop: int) -> list[Path]:
    paths = []
    for which, begin, end in spec.queries(start, stop):
        first = spec.context_end + which * spec.query_len
        paths.append(Path((begin, end), ((0, spec.prefix_len), (first, end))))
    return paths
