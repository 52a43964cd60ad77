"""A batch as the two levels of a cascade: which rows read which columns of which page-table line.

Level 0 are the contexts (read as a whole, with a temperature), level 1 is each row's path (causal).
Everything is host arithmetic on int32 arrays; the layout is the one that
``flashinfer_ext.ApeCascadeAttentionWrapper.plan`` takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from sglang_ape.attention.plan import Path, RequestPlan, plan_request
from sglang_ape.attention.rectangles import Cover
from sglang_ape.spec import ApeSpec


class Bias(NamedTuple):
    """What is added to the logits of contexts, back to back as they stand in the contexts level."""

    value: np.ndarray  # (contexts,) fp32, natural logarithm
    indptr: np.ndarray  # (contexts + 1,) int32, place among the KV indices


NO_BIAS = Bias(np.empty(0, np.float32), np.zeros(1, np.int32))
"""Of a level without contexts."""


class Levels(NamedTuple):
    """Two levels over the new rows of a batch, in batch order.

    Segments are runs of page-table columns; back to back they are the KV indices of the contexts
    level and behind them those of the path level.
    """

    segment_row: np.ndarray  # (segments,) int32, index of the request in the batch
    segment_start: np.ndarray  # (segments,) int32, first column
    segment_indptr: np.ndarray  # (segments + 1,) int32, place among the KV indices
    qo_indptr: tuple[np.ndarray, np.ndarray]  # for each level (groups + 1,) int32
    kv_indptr: tuple[np.ndarray, np.ndarray]  # for each level (groups + 1,) int32, from 0
    temperature: np.ndarray  # (groups of the contexts level,) fp32; 1 where there are no contexts
    scale: np.ndarray  # likewise
    # The row at each place of the contexts level where that is a cover by rectangles; temperature
    # and scale are then (rows,).
    contexts_rows: np.ndarray | None = None
    path_groups: np.ndarray | None = None  # (groups of the contexts level,) bool: of the paths
    rows_bias: np.ndarray | None = None  # fp32 like contexts_rows: added to log-sum-exps
    bias: Bias | None = None  # without contexts_rows; None where no request has any


def decode_levels(
    specs: Sequence[ApeSpec | None],
    seq_lens: np.ndarray,
    context_sets: Sequence[Hashable | None],
) -> Levels:
    """One new row for each request: the last of its ``seq_lens`` (batch,) rows.

    Neighbours in the batch with equal ``context_sets`` are one group of the contexts level: the
    contexts of the first are read once for all of them. A plain request has one path, its whole
    row, and no contexts; so has a padding row.
    """
    batch = len(specs)
    prefix, end = _bounds(specs)
    own = seq_lens.astype(np.int32) - end
    requests = np.arange(batch, dtype=np.int32)
    first = [
        i
        for i, key in enumerate(context_sets)
        if i == 0 or key is None or key != context_sets[i - 1]
    ]
    leaders = requests[first]
    groups = len(leaders)

    start = np.concatenate([prefix[leaders], _interleave(np.zeros_like(end), end)])
    indptr = _indptr(np.concatenate([(end - prefix)[leaders], _interleave(prefix, own)]))
    return Levels(
        np.concatenate([leaders, np.repeat(requests, 2)]),
        start,
        indptr,
        (np.append(leaders, np.int32(batch)), np.arange(batch + 1, dtype=np.int32)),
        (indptr[: groups + 1], indptr[groups::2] - indptr[groups]),
        np.array([spec.temperature if (spec := specs[i]) else 1 for i in first], np.float32),
        np.array([spec.scale if (spec := specs[i]) else 1 for i in first], np.float32),
        bias=_bias([specs[i] for i in first]),
    )


def rectangle_levels(specs: Sequence[ApeSpec | None], seq_lens: np.ndarray, cover: Cover) -> Levels:
    """As :func:`decode_levels`, with the contexts level of a cover.

    The first rows of the batch are those that the cover was made for; any others have no contexts.
    """
    batch = len(specs)
    prefix, end = _bounds(specs)
    requests = np.arange(batch + 1, dtype=np.int32)
    own = seq_lens.astype(np.int32) - end
    prefix[cover.rows[np.repeat(cover.is_prefix, np.diff(cover.qo_indptr))]] = 0  # not in the path
    indptr = _indptr(np.concatenate([cover.segment_length, _interleave(prefix, own)]))
    segments = len(cover.segment_length)
    return Levels(
        np.concatenate([cover.segment_row, np.repeat(requests[:-1], 2)]),
        np.concatenate([cover.segment_start, _interleave(np.zeros_like(end), end)]),
        indptr,
        (cover.qo_indptr, requests),
        (cover.kv_indptr, indptr[segments::2] - indptr[segments]),
        np.array([spec.temperature if spec else 1 for spec in specs], np.float32),
        np.array([spec.scale if spec else 1 for spec in specs], np.float32),
        cover.rows,
        cover.is_prefix,
        cover.bias,
    )


def _bias(specs: Sequence[ApeSpec | None]) -> Bias | None:
    """Of the contexts of these requests, which are groups of the contexts level in this order."""
    if not any(spec and spec.bias for spec in specs):
        return None
    lens, bias = zip(*(spec.lens_and_bias for spec in specs if spec), strict=True)
    return Bias(np.concatenate(bias), _indptr(np.concatenate(lens)))


def _bounds(specs: Sequence[ApeSpec | None]) -> tuple[np.ndarray, np.ndarray]:
    """Where the contexts of each request begin and end; int32, 0 for a plain one."""
    batch = len(specs)
    return (
        np.fromiter((spec.prefix_len if spec else 0 for spec in specs), np.int32, batch),
        np.fromiter((spec.context_end if spec else 0 for spec in specs), np.int32, batch),
    )


def extend_levels(
    specs: Sequence[ApeSpec | None],
    starts: Sequence[int],
    stops: Sequence[int],
    groups: Sequence[Sequence[int]] | None = None,
) -> Levels:
    """New rows [start, stop) for each request, whose earlier rows are in the KV pool already.

    Args:
        groups: requests whose query rows read the contexts of the first of them, all that have any;
            None for a group of the contexts level for each request. Not for requests with a bias.
    """
    paths = _Level()
    plans: list[RequestPlan | None] = []
    for request, (spec, start, stop) in enumerate(zip(specs, starts, stops, strict=True)):
        plans.append(plan_request(spec, start, stop) if spec else None)
        of_request = plans[-1].paths if plans[-1] else (Path((start, stop), ((0, stop),)),)
        for path in of_request:
            paths.add(request, path)
    if groups is not None:
        return _with_groups(specs, starts, stops, plans, paths, groups)
    contexts = _Level()
    settings: list[tuple[float, float]] = []  # T and S of each group
    readers: list[ApeSpec | None] = []
    for request, (plan, start, stop) in enumerate(zip(plans, starts, stops, strict=True)):
        query_start = plan.query_rows[0] if plan and plan.query_rows else stop
        if query_start > start or plan is None:
            contexts.add(request, Path((start, query_start), ()))
            settings.append((1.0, 1.0))
        if plan and plan.query_rows:
            contexts.add(request, Path(plan.query_rows, (plan.contexts,)))
            settings.append(_settings_of(specs[request]))
            readers.append(specs[request])
    return _joined(contexts, paths, np.array(settings))._replace(bias=_bias(readers))


def _with_groups(
    specs: Sequence[ApeSpec | None],
    starts: Sequence[int],
    stops: Sequence[int],
    plans: Sequence[RequestPlan | None],
    paths: _Level,
    groups: Sequence[Sequence[int]],
) -> Levels:
    lens = [stop - start for start, stop in zip(starts, stops, strict=True)]
    first = _indptr(lens)  # row of the batch where each request begins
    contexts, rows = _Level(), []
    for group in groups:
        leader = plans[group[0]]
        assert leader is not None
        of_group = [_query_rows(plans[i], starts[i], first[i]) for i in group]
        rows += of_group
        contexts.add(group[0], Path((0, sum(map(len, of_group))), (leader.contexts,)))
    settings = np.repeat([_settings_of(spec) for spec in specs], lens, axis=0)
    return _joined(contexts, paths, settings, np.concatenate(rows))


def _joined(
    contexts: _Level, paths: _Level, settings: np.ndarray, contexts_rows: np.ndarray | None = None
) -> Levels:
    """Both levels; ``settings`` are T and S, of each group or of each row."""
    temperature, scale = np.ascontiguousarray(settings.reshape(-1, 2).T, np.float32)
    return Levels(
        np.array(contexts.row + paths.row, np.int32),
        np.array(contexts.start + paths.start, np.int32),
        _indptr(contexts.length + paths.length),
        (_indptr(contexts.rows), _indptr(paths.rows)),
        (_indptr(contexts.kv_len), _indptr(paths.kv_len)),
        temperature,
        scale,
        contexts_rows,
    )


def _query_rows(plan: RequestPlan | None, start: int, first: int) -> np.ndarray:
    """Rows of the batch that see the contexts of a request."""
    assert plan is not None and plan.query_rows is not None
    begin, end = plan.query_rows
    return np.arange(first + begin - start, first + end - start, dtype=np.int32)


def _settings_of(spec: ApeSpec | None) -> tuple[float, float]:
    """T and S."""
    return (spec.temperature, spec.scale) if spec else (1.0, 1.0)


class _Level:
    """Groups of one level, collected one by one."""

    def __init__(self) -> None:
        self.rows: list[int] = []  # of each group
        self.kv_len: list[int] = []  # of each group
        self.row: list[int] = []  # of each segment, as start and length
        self.start: list[int] = []
        self.length: list[int] = []

    def add(self, request: int, group: Path) -> None:
        self.rows.append(group.rows[1] - group.rows[0])
        self.kv_len.append(sum(stop - start for start, stop in group.kv))
        for start, stop in group.kv:
            self.row.append(request)
            self.start.append(start)
            self.length.append(stop - start)


def _interleave(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).ravel()


def _indptr(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    indptr = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=indptr[1:])
    return indptr
