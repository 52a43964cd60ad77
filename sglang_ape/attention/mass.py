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
from typing import NamedTuple

import torch

from sglang_ape.spec import ApeSpec, ProbeSpec

LEAST = 1e-12
"""Added to the mean of squares: a score is at least its logarithm, -27.6."""

MOST_FINISHED = 4096

MOST_SHARES = 1 << 24
"""Computed at once; as fp32, a few times 64 MB."""


def shares(lse: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """The softmax weight of each context.

    Args:
        lse: (rows, num_qo_heads), fp32, base 2: of what else the rows attend to.
        lses: (rows, num_qo_heads, contexts), likewise: of each context.

    Returns:
        As ``lses``.
    """
    logs = torch.cat([lse.unsqueeze(-1), lses], -1) * math.log(2)
    return torch.softmax(logs, -1)[..., 1:]


class AttentionMass:
    """Collects the shares of one request layer by layer, over as many passes as its rows take.

    Args:
        query_rows: of Q.
        null_rows: of the null query.
    """

    def __init__(self, query_rows: int, null_rows: int) -> None:
        self._rows = (query_rows, null_rows)
        self._sums: dict[int, list[torch.Tensor]] = {}  # by layer: of Q and of the null query
        self._squares: torch.Tensor | None = None
        self._heads = 0

    def add(self, layer: int, which: int, shares: torch.Tensor) -> None:
        """Add rows of Q (0) or of the null query (1).

        Args:
            layer: whose they are.
            which: of the two.
            shares: (rows, heads, contexts), fp32.
        """
        summed = shares.sum(0)
        if layer not in self._sums:
            self._sums[layer] = [torch.zeros_like(summed) for _ in self._rows]
        self._sums[layer][which] += summed

    def close(self) -> None:
        """All rows of all layers were added: keep a number for each context, not for each head."""
        if self._squares is not None:
            return
        by_query = zip(*self._sums.values(), strict=True)
        query, null = (torch.stack(a) / n for a, n in zip(by_query, self._rows, strict=True))
        self._squares = (query - null).clamp_min(0).square().sum((0, 1))
        self._heads = query.shape[0] * query.shape[1]
        self._sums.clear()

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
    rows: slice  # of the batch's new tokens
    queries: tuple[tuple[int, slice], ...]  # 0 for Q, 1 for the null query; parts of ``rows``
    contexts: int

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
        step = max(MOST_SHARES // (heads * self.contexts), 1)
        for first in range(0, rows, step):
            block = slice(first, min(first + step, rows))
            weights = shares(lse[block], of_contexts(q[block]))
            for which, own in self.queries:
                begin, end = max(own.start, block.start), min(own.stop, block.stop)
                if begin < end:
                    self.mass.add(layer, which, weights[begin - first : end - first])


def measured_rows(
    rid: str, spec: ApeSpec | None, mass: AttentionMass | None, start: int, stop: int, offset: int
) -> Measured | None:
    """What a pass measures of a request; of one that it ends, the scores can be taken after it.

    Args:
        rid: of the request.
        spec: of the request.
        mass: what is collected of it; None if nothing is.
        start: its first new row.
        stop: behind its last one.
        offset: of its first new row among the batch's.
    """
    if mass is None or not isinstance(spec, ProbeSpec):
        return None
    first = max(start, spec.context_end)
    if first >= stop:
        return None
    if stop == spec.row_len:
        finished.put(rid, mass, spec.places)
    queries = tuple(
        (which, slice(begin - first, end - first))
        for which, begin, end in spec.queries(first, stop)
    )
    rows = slice(first - start + offset, stop - start + offset)
    return Measured(mass, rows, queries, len(spec.context_lens))


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
