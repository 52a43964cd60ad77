"""The soak in short: requests of every kind and fate get the oracle's answer and leave nothing."""

from pathlib import Path

import pytest

from tests.campaigns.soak import Plan, Tally, run
from tests.campaigns.soak_requests import Fate, Kind

PLAN = Plan(seed=1, requests=150, concurrency=16, jobs=50)


@pytest.fixture(scope="module")
def tally(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tally:
    tally = run(PLAN, tiny_llama, tmp_path_factory.mktemp("soak"))
    print(tally)
    return tally


def test_answers_are_the_oracles_and_nothing_is_left_over(tally: Tally) -> None:
    assert not tally.faults, str(tally)
    assert tally.outcomes.total() == PLAN.requests


def test_requests_of_every_kind_are_completed(tally: Tally) -> None:
    completed = {kind for kind, _, label in tally.kinds if label == "completed and equal"}
    assert completed == set(Kind)
    sorts = {sort for _, sort, label in tally.kinds if label == "completed and equal"}
    with_contexts = {"contexts", "soft or refine"}
    assert sorts == {"plain", *with_contexts, *(f"{sort}, some by id" for sort in with_contexts)}


def test_clients_end_requests_at_every_stage(tally: Tally) -> None:
    ends = {fate.value for fate in Fate} - {Fate.WAIT, Fate.ABORT}
    assert ends <= set(tally.outcomes)
    assert any(label.startswith("aborted") for label in tally.outcomes)


def test_the_pool_is_too_small_and_requests_are_retracted(tally: Tally) -> None:
    assert tally.seen["evicted contexts"] > 0
    assert tally.seen["retracted requests"] > 0


def test_contexts_are_scored_again_and_again(tally: Tally) -> None:
    assert tally.seen["tokens to score and to refine"] > 0
    assert tally.beside["POST /flush_cache: 400"] > 0


def test_contexts_are_pinned_and_deleted_beside(tally: Tally) -> None:
    assert tally.beside["POST /ape/contexts: done, pinned"] > 0
    assert tally.beside["DELETE /ape/contexts/ID: 200"] > 0
