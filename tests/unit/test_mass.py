"""The attention that a query would give to each context."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_ext.reference import attention_state
from sglang_ape.attention.mass import LEAST, AttentionMass, Finished, context_shares

fast = settings(deadline=None, max_examples=40)
ROWS, KV_HEADS, GROUP, DIM = 5, 2, 3, 8
HEADS = KV_HEADS * GROUP


@fast
@given(lens=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_shares_are_the_softmax_weights_of_the_contexts_tokens(lens: list[int], seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, HEADS, DIM, generator=drawn)
    path = torch.randn(ROWS + 2, KV_HEADS, DIM, generator=drawn)
    k = torch.randn(sum(lens), KV_HEADS, DIM, generator=drawn)
    _, lse = attention_state(q, path, path, 0.3, causal=True)
    shares = context_shares(q, k, 0.3, lens, lse)
    for row in range(ROWS):
        for head in range(HEADS):
            visible = torch.cat([path[: row + 3], k])[:, head // GROUP]
            weights = (visible @ q[row, head] * 0.3).softmax(0)[row + 3 :]
            expected = torch.stack([part.sum() for part in weights.split(lens)])
            assert torch.allclose(shares[row, head], expected, atol=1e-5)


def _shares(rows: int, seed: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(rows, HEADS, 4, generator=drawn)


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3)])
def test_scores_do_not_depend_on_how_the_rows_were_cut(cuts: tuple[int, ...]) -> None:
    layers = {layer: (_shares(4, layer), _shares(2, 50 + layer)) for layer in (0, 1, 7)}
    mass = AttentionMass(4, 2)
    for start, stop in zip((0, *cuts), (*cuts, 4), strict=True):
        for layer, (query, _) in layers.items():
            mass.add(layer, 0, query[start:stop])
    for layer, (_, null) in layers.items():
        mass.add(layer, 1, null)
        mass.close(layer)
    above = torch.stack([q.mean(0) - n.mean(0) for q, n in layers.values()]).clamp(min=0)
    expected = (above.square().mean((0, 1)) + LEAST).log()
    assert torch.allclose(mass.scores(), expected, atol=1e-5)


def test_a_context_with_no_more_attention_than_the_null_query_gives_has_the_least_score() -> None:
    mass = AttentionMass(1, 1)
    mass.add(0, 0, torch.tensor([[[0.2, 0.5]]]))
    mass.add(0, 1, torch.tensor([[[0.3, 0.1]]]))
    mass.close(0)
    least, high = mass.scores().tolist()
    assert least == pytest.approx(torch.tensor(LEAST).log().item())
    assert high == pytest.approx(torch.tensor(0.16).log().item())


def test_scores_are_taken_once_in_the_order_in_which_the_contexts_were_sent() -> None:
    mass = AttentionMass(1, 1)
    mass.add(0, 0, torch.tensor([[[0.1, 0.2, 0.3]]]))
    mass.add(0, 1, torch.zeros(1, 1, 3))
    mass.close(0)
    first, second, third = mass.scores().tolist()
    finished = Finished(most=2)
    for rid in ("a", "b", "c"):
        finished.put(rid, mass, (2, 0, 1))
    assert finished.take("a") is None, "the oldest is dropped"
    assert finished.take("b") == [third, first, second]
    assert finished.take("b") is None
