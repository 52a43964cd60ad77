"""Both attention backends measure what the formula says, over chunks of a batch with others."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ape.attention import mass as mass_module
from sglang_ape.attention.batch import ApeBatch
from sglang_ape.attention.flashinfer import ApeFlashInferBackend
from sglang_ape.attention.mass import LEAST, AttentionMass, finished
from sglang_ape.attention.torch_native import ApeTorchNativeBackend
from sglang_ape.spec import ApeSpec, ProbeSpec

LAYERS, HEADS, KV_HEADS, DIM = 3, 6, 2, 16
SPEC = ProbeSpec.of(4, (5, 3, 7), 6, 3)
OTHER = ApeSpec(2, (6,), 0.9, 0.9, "other")
OTHER_ROWS = 5  # new ones of the other request in each pass
SCALING = 0.3


class Rows:
    """A probe's row behind another request's, in a pool with random slots."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(7)
        slots = torch.randperm(200, generator=drawn).int()
        self.page_table = slots.view(2, 100)
        self.q = torch.randn(LAYERS, SPEC.row_len, HEADS, DIM, generator=drawn)
        self.keys, self.values = torch.randn(2, LAYERS, 200, KV_HEADS, DIM, generator=drawn)

    @property
    def pool(self) -> Any:
        return SimpleNamespace(
            get_key_buffer=lambda layer: self.keys[layer],
            get_value_buffer=lambda layer: self.values[layer],
            get_kv_buffer=lambda layer: (self.keys[layer], self.values[layer]),
        )

    def path_keys(self, layer: int, row: int) -> torch.Tensor:
        """What a row of Q or of the null query reads: P and its own past."""
        middle = SPEC.context_end + SPEC.query_len
        begin = middle if row >= middle else SPEC.context_end
        columns = [*range(SPEC.prefix_len), *range(begin, row + 1)]
        return self.keys[layer][self.page_table[1, columns].long()]

    def logits(self, layer: int, row: int, keys: torch.Tensor) -> torch.Tensor:
        """(heads, keys)"""
        heads = keys.repeat_interleave(HEADS // KV_HEADS, 1)
        return torch.einsum("hd,khd->hk", self.q[layer, row], heads) * SCALING

    def expected(self) -> list[float]:
        """The score of each context, written from the formula."""
        columns = self.page_table[1, SPEC.prefix_len : SPEC.context_end].long()
        squares = torch.zeros(len(SPEC.context_lens))
        for layer in range(LAYERS):
            mass = {}
            for which, begin, end in SPEC.queries(0, SPEC.row_len):
                weights = []
                for row in range(begin, end):
                    keys = torch.cat([self.path_keys(layer, row), self.keys[layer][columns]])
                    whole = self.logits(layer, row, keys).softmax(-1)[:, -len(columns) :]
                    weights.append(torch.stack([w.sum(-1) for w in whole.split((5, 3, 7), -1)], -1))
                mass[which] = torch.stack(weights).mean(0)
            squares += (mass[0] - mass[1]).clamp_min(0).square().sum(0)
        return (squares / (LAYERS * HEADS) + LEAST).log().tolist()


def forward_batch(rows: Rows, start: int, stop: int) -> Any:
    return SimpleNamespace(
        rids=["other", "probe"],
        req_pool_indices=torch.tensor([0, 1]),
        seq_lens=torch.tensor([20, stop]),
        extend_seq_lens_cpu=[OTHER_ROWS, stop - start],
        forward_mode=SimpleNamespace(is_decode=lambda: False),
        out_cache_loc=None,
    )


def layer_of(i: int) -> Any:
    return SimpleNamespace(
        layer_id=i, tp_q_head_num=HEADS, head_dim=DIM, qk_head_dim=DIM, v_head_dim=DIM,
        scaling=SCALING, k_scale_float=None, v_scale_float=None,
    )  # fmt: skip


def through_torch_native(rows: Rows, batch: ApeBatch, start: int, stop: int) -> None:
    backend: Any = object.__new__(ApeTorchNativeBackend)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=rows.page_table)
    backend.token_to_kv_pool = rows.pool
    given = forward_batch(rows, start, stop)
    backend._work = backend._plan(given, batch)
    for layer in range(LAYERS):
        q = torch.cat([torch.zeros(OTHER_ROWS, HEADS, DIM), rows.q[layer, start:stop]])
        backend._forward(q.view(len(q), -1), None, None, layer_of(layer), given, False)


class Cascade:
    """Stands in for the two launches: tells the log-sum-exps of the probe's paths."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self.rows, self.start, self.stop = rows, start, stop
        self.layer = 0

    def run(self, q: torch.Tensor, kv_cache: Any, return_lse: bool, **_: Any) -> Any:
        lse = torch.full(q.shape[:2], math.nan)
        for row in range(max(self.start, SPEC.context_end), self.stop):
            keys = self.rows.path_keys(self.layer, row)
            own = self.rows.logits(self.layer, row, keys).logsumexp(-1)
            lse[OTHER_ROWS + row - self.start] = own / math.log(2)
        self.layer += 1
        return (torch.zeros_like(q), lse) if return_lse else torch.zeros_like(q)


def through_flashinfer(rows: Rows, batch: ApeBatch, start: int, stop: int) -> None:
    backend: Any = object.__new__(ApeFlashInferBackend)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=rows.page_table)
    backend.token_to_kv_pool = rows.pool
    given = forward_batch(rows, start, stop)
    backend._probes = backend._plan_probes(given, batch, [15, start], [20, stop])
    cascade = Cascade(rows, start, stop)
    for layer in range(LAYERS):
        q = torch.cat([torch.zeros(OTHER_ROWS, HEADS, DIM), rows.q[layer, start:stop]])
        backend._attend(cascade, q, None, None, layer_of(layer), given, False)


@pytest.mark.parametrize("at_once", [1, 4, 1 << 24])
@pytest.mark.parametrize("through", [through_torch_native, through_flashinfer])
@pytest.mark.parametrize("cuts", [(), (8,), (SPEC.context_end,), (10, 21, 26)])
def test_scores_are_those_of_the_formula(
    through: Any, cuts: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mass_module, "MOST_SHARES", at_once * HEADS * len(SPEC.context_lens))
    rows, mass = Rows(), AttentionMass(SPEC.query_len, SPEC.null_len)
    batch = ApeBatch([OTHER, SPEC], [None, None], [], [None, mass])
    for start, stop in pairwise((0, *cuts, SPEC.row_len)):
        finished.begin_pass()
        through(rows, batch, start, stop)
    assert finished.take("probe") == pytest.approx(rows.expected(), abs=1e-4)
