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
from collections.abc import Sequence

import torch

LEAST = 1e-12
"""Added to the mean of squares: a score is at least its logarithm, -27.6."""

MOST_FINISHED = 4096


def context_shares(
    q: torch.Tensor, k: torch.Tensor, sm_scale: float, lens: Sequence[int], lse: torch.Tensor
) -> torch.Tensor:
    """The softmax weight of each context, in fp32.

    Args:
        q: (rows, num_qo_heads, head_dim), any float dtype.
        k: (sum of lens, num_kv_heads, head_dim), the keys of all contexts.
        sm_scale: multiplies the logits.
        lens: tokens of each context.
        lse: (rows, num_qo_heads), fp32, base 2: of what else the rows attend to.

    Returns:
        (rows, num_qo_heads, contexts).
    """
    rows, heads, _ = q.shape
    grouped = q.float().view(rows, k.shape[1], heads // k.shape[1], -1)
    lses = [lse * math.log(2)]
    for own in k.split(list(lens)):
        logits = torch.einsum("nkgd,skd->nkgs", grouped, own.float()) * sm_scale
        lses.append(torch.logsumexp(logits, -1).view(rows, heads))
    return torch.softmax(torch.stack(lses, -1), -1)[..., 1:]


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
        sums = self._sums.setdefault(layer, [torch.zeros_like(summed) for _ in self._rows])
        sums[which] += summed

    def close(self, layer: int) -> None:
        """All rows of a layer were added."""
        query, null = (a / n for a, n in zip(self._sums.pop(layer), self._rows, strict=True))
        squares = (query - null).clamp_min(0).square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares
        self._heads += query.shape[0]

    def scores(self) -> torch.Tensor:
        """(contexts,), fp32, in the order of the row, of the layers that were closed."""
        assert self._squares is not None
        return torch.log(self._squares / self._heads + LEAST)


class Finished:
    """Measured requests by id until somebody asks; beyond ``most`` the oldest are dropped."""

    def __init__(self, most: int = MOST_FINISHED) -> None:
        self._most = most
        self._masses: OrderedDict[str, tuple[AttentionMass, Sequence[int]]] = OrderedDict()

    def put(self, rid: str, mass: AttentionMass, places: Sequence[int]) -> None:
        """Keep what was collected; ``places``: where each context stands in the row."""
        self._masses[rid] = (mass, places)
        if len(self._masses) > self._most:
            self._masses.popitem(last=False)

    def take(self, rid: str) -> list[float] | None:
        """The scores of the contexts as they were sent."""
        if rid not in self._masses:
            return None
        mass, places = self._masses.pop(rid)
        in_row = mass.scores().tolist()
        return [in_row[place] for place in places]


finished = Finished()
"""Of this process, whose attention backend puts them here."""
