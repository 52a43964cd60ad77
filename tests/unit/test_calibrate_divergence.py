"""The divergence against dense distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape.calibrate.divergence import Target, at_tokens, divergence

VOCABULARY = 40


def distributions(seed: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of log-probabilities (positions, VOCABULARY)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, positions, VOCABULARY, generator=generator, dtype=torch.float64)
    one, other = logits.log_softmax(-1)
    return one, other


def known_part(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    top = p.topk(k)
    return divergence(top.values.numpy(), q.gather(1, top.indices).numpy())


@given(seed=st.integers(0, 10**6), positions=st.integers(1, 5), k=st.integers(1, VOCABULARY - 1))
def test_it_is_the_dense_divergence_with_all_other_tokens_as_one(
    seed: int, positions: int, k: int
) -> None:
    p, q = distributions(seed, positions)
    indices = p.topk(k).indices
    rest = torch.ones_like(p).scatter(1, indices, 0.0)

    def merged(logs: torch.Tensor) -> torch.Tensor:
        others = (logs.exp() * rest).sum(1, keepdim=True)
        return torch.cat([logs.gather(1, indices).exp(), others], 1)

    expected = torch.nn.functional.kl_div(merged(q).log(), merged(p), reduction="batchmean").item()
    assert known_part(p, q, k) == pytest.approx(expected, abs=1e-5)


@given(seed=st.integers(0, 10**6), k=st.integers(1, VOCABULARY))
def test_it_is_never_more_than_the_whole_divergence_and_never_negative(seed: int, k: int) -> None:
    p, q = distributions(seed, 3)
    whole = (p.exp() * (p - q)).sum(1).mean().item()
    part = known_part(p, q, k)
    assert -1e-9 <= part <= whole + 1e-5
    assert known_part(p, q, VOCABULARY) == pytest.approx(whole, abs=1e-5)


@given(seed=st.integers(0, 10**6), k=st.integers(1, VOCABULARY))
def test_equal_distributions_are_at_no_distance(seed: int, k: int) -> None:
    p, _ = distributions(seed, 2)
    assert known_part(p, p, k) == pytest.approx(0, abs=1e-12)


def test_a_number_by_hand() -> None:
    expected = np.log([[0.5, 0.25]])
    actual = np.log([[0.25, 0.25]])
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(expected, actual) == pytest.approx(by_hand)


def test_the_support_is_the_union_over_positions_and_is_picked_by_position() -> None:
    ids = np.array([[7, 3], [3, 9]])
    target = Target("x", [7, 9], ids, np.zeros((2, 2)))
    assert target.support == [3, 7, 9]
    own = [{3: -1.0, 7: -2.0, 9: -3.0}, {3: -4.0, 7: -5.0, 9: -6.0}]
    assert at_tokens(ids, own).tolist() == [[-2.0, -1.0], [-4.0, -6.0]]
