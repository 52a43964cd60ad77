"""The attention that a query would give to each context."""

import math
import multiprocessing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_ext.reference import attention_state, context_lse
from sglang_ape.attention.mass import (
    LEAST,
    MOST_SHARES,
    AttentionMass,
    Finished,
    Queries,
    finished,
    measured_rows,
    most_held,
    shares,
)
from sglang_ape.spec import ApeSpec, ProbeSpec

fast = settings(deadline=None, max_examples=40)
ROWS, KV_HEADS, GROUP, DIM = 5, 2, 3, 8
HEADS = KV_HEADS * GROUP


@fast
@given(lens=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_shares_are_the_softmax_weights_of_the_contexts_tokens(lens: list[int], seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, HEADS, DIM, generator=drawn)
    path = torch.randn(ROWS + 2, KV_HEADS, DIM, generator=drawn)
    cache = torch.randn(sum(lens) + 7, KV_HEADS, DIM, generator=drawn)
    slots = torch.randperm(len(cache), generator=drawn)[: sum(lens)]
    _, lse = attention_state(q, path, path, 0.3, causal=True)
    indptr = torch.tensor([0, *lens]).cumsum(0)
    found = shares(lse, context_lse(q, cache, slots, indptr, 0.3))
    for row in range(ROWS):
        for head in range(HEADS):
            visible = torch.cat([path[: row + 3], cache[slots]])[:, head // GROUP]
            weights = (visible @ q[row, head] * 0.3).softmax(0)[row + 3 :]
            expected = torch.stack([part.sum() for part in weights.split(lens)])
            assert torch.allclose(found[row, head], expected, atol=1e-5)


BOTH = ((0, slice(0, 4)), (1, slice(4, 6)))  # four rows of Q, two of the null query


def _logs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    lse = torch.randn(rows, HEADS, generator=drawn)
    return lse, torch.randn(rows, HEADS, 4, generator=drawn)


def _cut(start: int, stop: int) -> Queries:
    """Parts of rows ``start`` to ``stop`` of both queries."""
    bounds = ((which, max(own.start, start), min(own.stop, stop)) for which, own in BOTH)
    return tuple((which, slice(a - start, b - start)) for which, a, b in bounds if a < b)


@pytest.mark.parametrize("most", [1, 5 * HEADS * 4, 1 << 24])
@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (4,), (5,)])
def test_scores_do_not_depend_on_how_the_rows_were_cut_or_held(
    cuts: tuple[int, ...], most: int
) -> None:
    layers = {layer: _logs(6, layer) for layer in (0, 1, 7)}
    mass = AttentionMass(4, 2)
    for start, stop in pairwise((0, *cuts, 6)):
        for layer, (lse, lses) in layers.items():
            mass.add(layer, lse[start:stop], lses[start:stop], _cut(start, stop), most)
    weights = torch.stack([shares(*logs) for logs in layers.values()])
    above = (weights[:, :4].mean(1) - weights[:, 4:].mean(1)).clamp(min=0)
    expected = (above.square().mean((0, 1)) + LEAST).log()
    assert mass.scores() == pytest.approx(expected.tolist(), abs=1e-5)


def test_no_more_is_held_back_than_may_be() -> None:
    mass = AttentionMass(4, 2)
    for layer in range(9):
        mass.add(layer, *_logs(6, layer), BOTH, 3 * 6 * HEADS * 4)
        assert len(mass._held) == layer % 3 + 1


def test_measured_requests_of_a_batch_hold_back_no_more_than_one_may() -> None:
    mass = AttentionMass(1, 1)
    assert most_held([None, mass]) == MOST_SHARES
    assert 3 * most_held([mass, None, mass, mass]) <= MOST_SHARES


def _mass(query: Sequence[float], null: Sequence[float]) -> AttentionMass:
    """Of one row of each in one head of one layer."""
    mass = AttentionMass(1, 1)
    weights = torch.tensor([[query], [null]])
    logs = (1 - weights.sum(-1)).log2(), weights.log2()
    mass.add(0, *logs, ((0, slice(0, 1)), (1, slice(1, 2))), 100)
    return mass


def test_a_context_with_no_more_attention_than_the_null_query_gives_has_the_least_score() -> None:
    least, high = _mass((0.2, 0.5), (0.3, 0.1)).scores()
    assert least == pytest.approx(math.log(LEAST))
    assert high == pytest.approx(math.log(0.16))


def _rank(rank: int, store: str, found: Any) -> None:
    """One of two processes, which measured different heads."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mass = _mass(*(((0.4, 0.2), (0.1, 0.0)) if rank == 0 else ((0.6, 0.1), (0.1, 0.3))))
    own = Finished()
    own.put("a", mass, (1, 0))
    found.put(own.take("a", dist.all_reduce))
    dist.destroy_process_group()


def test_the_heads_of_all_processes_are_counted_in_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "store"), found))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    answers = [found.get(timeout=50) for _ in ranks]
    for rank in ranks:
        rank.join()
    expected = [math.log(0.04 / 2), math.log((0.09 + 0.25) / 2)]
    assert answers == [pytest.approx(expected)] * 2


@pytest.mark.parametrize(("ranks", "summed"), [(1, 0), (2, 1)])
def test_a_scheduler_asks_the_others_of_its_group_if_there_are_any(
    ranks: int, summed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_ape.scoring.channel import ApeScoresReqInput, answer  # imports SGLang

    groups: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: groups.append(group))
    scheduler = SimpleNamespace(server_args=SimpleNamespace(tp_size=ranks), tp_cpu_group="gloo")
    finished.put("a", _mass((0.2,), (0.0,)), (0,))
    told = answer(scheduler, ApeScoresReqInput(measured="a"))
    assert told.scores == pytest.approx([math.log(0.04)])
    assert groups == ["gloo"] * summed


def test_scores_are_taken_once_in_the_order_in_which_the_contexts_were_sent() -> None:
    mass = _mass((0.1, 0.2, 0.3), (0.0, 0.0, 0.0))
    first, second, third = mass.scores()
    found = Finished(most=2)
    for rid in ("a", "b", "c"):
        found.put(rid, mass, (2, 0, 1))
    assert found.take("a") is None, "the oldest is dropped"
    assert found.take("b") == [third, first, second]
    assert found.take("b") is None


def test_what_a_pass_completes_is_put_before_it_and_closed_before_the_next() -> None:
    found, mass = Finished(), _mass((0.1, 0.2), (0.0, 0.0))
    found.put("a", mass, (0, 1))
    found.begin_pass()
    assert not mass._held and mass._sums == ({}, {}), "one number for each context is kept"
    assert found.take("a") == pytest.approx([math.log(0.01), math.log(0.04)])


specs = st.builds(
    ProbeSpec.of,
    prefix_len=st.integers(0, 4),
    context_lens=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    query_len=st.integers(1, 5),
    null_len=st.integers(1, 3),
)


@fast
@given(spec=specs, cuts=st.sets(st.integers(1, 20), max_size=4), offset=st.integers(0, 9))
def test_every_row_of_both_queries_is_measured_once(
    spec: ProbeSpec, cuts: set[int], offset: int
) -> None:
    mass = AttentionMass(spec.query_len, spec.null_len)
    found: list[list[int]] = [[], []]
    ends = sorted({*(cut for cut in cuts if cut < spec.row_len), spec.row_len})
    for start, stop in pairwise([0, *ends]):
        assert finished.take("rid") is None, "no pass before the last one completes it"
        measured = measured_rows("rid", spec, mass, start, stop, offset, 100)
        rows = list(range(start, stop))
        if measured is None:
            assert stop <= spec.context_end
            continue
        own = rows[measured.rows.start - offset : measured.rows.stop - offset]
        for which, part in measured.queries(slice(0, len(own))):
            found[which] += own[part]
    middle = spec.context_end + spec.query_len
    assert found == [
        list(range(spec.context_end, middle)),
        list(range(middle, spec.row_len)),
    ]
    lse, lses = torch.zeros(2, 1), torch.zeros(2, 1, len(spec.context_lens))
    mass.add(0, lse, lses, ((0, slice(0, 1)), (1, slice(1, 2))), 100)
    assert finished.take("rid") is not None


def test_nothing_is_measured_of_other_requests() -> None:
    mass = AttentionMass(1, 1)
    assert measured_rows("a", ApeSpec(1, (2,), 1, 1, ""), mass, 0, 5, 0, 100) is None
    assert measured_rows("a", None, None, 0, 5, 0, 100) is None
    assert measured_rows("a", ProbeSpec.of(1, (2,), 2, 1), None, 0, 6, 0, 100) is None
