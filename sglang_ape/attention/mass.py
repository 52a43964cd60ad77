"""How much attention a query would give to each context, more than a null query does.

For a layer and a head, the *mass* of a context is the mean over the rows of Q of the softmax
weight that its tokens get if each row reads P, its own past and all contexts, at T = 1. The same
for the null query is what the context gets whatever is asked. A context's score is

    log( mean over layers and heads of max(mass(Q) - mass(null), 0) ** 2 ),

natural log: the square lets the few heads that look things up count. Q itself reads no context on
its way through the layers, so that its rows need no contexts pass.

Weights come from log-sum-exps alone; no values are read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from sglang_ape.spec import ApeSpec, ProbeSpec

LEAST = 1e-12
"""Added to the mean of squares: a score is at least its logarithm, -27.6."""

MOST_FINISHED = 4096

MOST_SHARES = 1 << 24
"""Held back in a pass and then computed at once; as fp32, a few times 64 MB."""

Queries: TypeAlias = tuple[tuple[int, slice], ...]
"""Parts of some rows: 0 with those of Q, 1 with those of the null query."""


def shares(lse: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """The softmax weight of each context.

    Args:
        lse: (..., rows, num_qo_heads), fp32, base 2: of what else the rows attend to.
        lses: (..., rows, num_qo_heads, contexts), likewise: of each context.

    Returns:
        As ``lses``.
    """
    logs = torch.cat([lse.unsqueeze(-1), lses], -1) * math.log(2)
    return torch.softmax(logs, -1)[..., 1:]


class AttentionMass:
    """Collects the shares of one request layer by layer, over as many passes as its rows take.

    Log-sum-exps are held back until there are many, because on a GPU an operation on those of one
    layer takes longer to launch than to run.

    Args:
        query_rows: of Q.
        null_rows: of the null query.
    """

    def __init__(self, query_rows: int, null_rows: int) -> None:
        self._rows = (query_rows, null_rows)
        self._held: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # layer, lse, lses
        self._held_queries: Queries = ()  # the same for all that is held
        self._sums: tuple[dict[int, torch.Tensor], ...] = ({}, {})  # of each query, by layer
        self._squares: torch.Tensor | None = None
        self._heads = 0

    def add(
        self, layer: int, lse: torch.Tensor, lses: torch.Tensor, queries: Queries, most: int
    ) -> None:
        """Add rows of a layer.

        Args:
            layer: whose they are.
            lse: (rows, heads), see :func:`shares`.
            lses: (rows, heads, contexts), likewise.
            queries: which of the rows are whose.
            most: shares that may be held back.
        """
        if queries != self._held_queries or (len(self._held) + 1) * lses.numel() > most:
            self._add_held()
        self._held_queries = queries
        self._held.append((layer, lse, lses))

    def _add_held(self) -> None:
        if not self._held:
            return
        layers, lse, lses = zip(*self._held, strict=True)
        self._held.clear()
        weights = shares(torch.stack(lse), torch.stack(lses))
        for which, rows in self._held_queries:
            sums = self._sums[which]
            for layer, summed in zip(layers, weights[:, rows].sum(1), strict=True):
                sums[layer] = sums[layer] + summed if layer in sums else summed

    def close(self) -> None:
        """All rows of all layers were added: keep a number for each context, not for each head."""
        if self._squares is not None:
            return
        self._add_held()
        query, null = (
            torch.stack([sums[layer] for layer in self._sums[0]]) / rows
            for sums, rows in zip(self._sums, self._rows, strict=True)
        )
        self._squares = (query - null).clamp_min(0).square().sum((0, 1))
        self._heads = query.shape[0] * query.shape[1]
        self._sums = ({}, {})

    def scores(self, all_reduce: Callable[[torch.Tensor], object] | None = None) -> list[float]:
        """The scores of the contexts, in the order of the row.

        Args:
            all_reduce: adds up a CPU tensor of this process and of those with the other heads.
        """
        self.close()
        assert self._squares is not None
        total = torch.tensor([*self._squares.tolist(), self._heads], dtype=torch.float64)
        if all_reduce is not None:
            all_reduce(total)
        return torch.log(total[:-1] / total[-1] + LEAST).tolist()


class Measured(NamedTuple):
    """The rows of a pass that are added to what is collected of a request."""

    mass: AttentionMass
    spec: ProbeSpec
    first: int  # row of the request
    rows: slice  # the same and those behind it, among the batch's new tokens
    most: int  # shares that may be held back

    def add(
        self,
        layer: int,
        q: torch.Tensor,
        lse: torch.Tensor,
        of_contexts: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add a layer.

        Args:
            layer: which one.
            q: (``rows``, num_qo_heads, head_dim), the queries of these rows.
            lse: (``rows``, num_qo_heads), see :func:`shares`.
            of_contexts: log-sum-exps of some rows of ``q``, see :func:`shares`; not called for so
                many at once that they would take much memory beside the pool.
        """
        rows, heads, _ = q.shape
        step = max(self.most // (heads * len(self.spec.context_lens)), 1)
        for begin in range(0, rows, step):
            block = slice(begin, min(begin + step, rows))
            queries = self.queries(block)
            self.mass.add(layer, lse[block], of_contexts(q[block]), queries, self.most)

    def queries(self, block: slice) -> Queries:
        """Whose the rows of a part of ``rows`` are."""
        first = self.first + block.start
        return tuple(
            (which, slice(begin - first, end - first))
            for which, begin, end in self.spec.queries(first, self.first + block.stop)
        )


def most_held(masses: Sequence[AttentionMass | None]) -> int:
    """Shares that each measured request of a batch may hold back."""
    return MOST_SHARES // max(sum(mass is not None for mass in masses), 1)


def measured_rows(
    rid: str,
    spec: ApeSpec | None,
    mass: AttentionMass | None,
    start: int,
    stop: int,
    offset: int,
    most: int,
) -> Measured | None:
    """What a pass measures of a request; of one that it ends, the scores can be taken after it.

    Args:
        rid: of the request.
        spec: of the request.
        mass: what is collected of it; None if nothing is.
        start: its first new row.
        stop: behind its last one.
        offset: of its first new row among the batch's.
        most: see :func:`most_held`.
    """
    if mass is None or not isinstance(spec, ProbeSpec):
        return None
    first = max(start, spec.context_end)
    if first >= stop:
        return None
    if stop == spec.row_len:
        finished.put(rid, mass, spec.places)
    return Measured(mass, spec, first, slice(first - start + offset, stop - start + offset), most)


class Finished:
    """Measured requests by id until somebody asks; beyond ``most`` the oldest are dropped."""

    def __init__(self, most: int = MOST_FINISHED) -> None:
        self._most = most
        self._masses: OrderedDict[str, tuple[AttentionMass, Sequence[int]]] = OrderedDict()
        self._in_pass: list[AttentionMass] = []

    def begin_pass(self) -> None:
        """Whatever was put before is complete: its pass was launched."""
        for mass in self._in_pass:
            mass.close()
        self._in_pass.clear()

    def put(self, rid: str, mass: AttentionMass, places: Sequence[int]) -> None:
        """Keep what the pass that is being planned completes.

        Args:
            rid: of the request.
            mass: what was and will be collected of it.
            places: where each context stands in the row.
        """
        self._in_pass.append(mass)
        self._masses[rid] = (mass, places)
        if len(self._masses) > self._most:
            self._masses.popitem(last=False)

    def take(
        self, rid: str, all_reduce: Callable[[torch.Tensor], object] | None = None
    ) -> list[float] | None:
        """The scores of the contexts as they were sent; ``all_reduce`` as in ``AttentionMass``."""
        if rid not in self._masses:
            return None
        mass, places = self._masses.pop(rid)
        in_row = mass.scores(all_reduce)
        return [in_row[place] for place in places]


finished = Finished()
"""Of this process, whose attention backend puts them here."""
