"""Soft, refine and warm items in a calibration: what is tried, what it costs, what is chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from sglang_ape.calibrate import __main__ as command
from sglang_ape.calibrate import measure, profile
from sglang_ape.calibrate.ladder import (
    PLAIN_RUNG,
    Rung,
    Standing,
    best_within,
    frontier,
    rungs,
)
from sglang_ape.calibrate.measure import Measure, Options
from sglang_ape.calibrate.run import Calibration, Outcome, Plan
from sglang_ape.calibrate.tokens import Encoder
from tests.unit.test_calibrate_run import VALUES, Body, Engine, rows
from tests.unit.test_expand import CharTokenizer

ITEMS = ("first", "second")
LADDER: dict[str, Any] = {"softs": (0.1, 0.3), "refines": (1, 2), "warm": ITEMS}
WARM_TOKENS = len("".join(ITEMS))
standings = st.lists(
    st.builds(
        Standing,
        st.builds(Rung, soft=st.sampled_from([0.1, 0.2]), warm=st.booleans()),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        st.sampled_from([0.0, 1.5, 8.0]),
    )
)


@pytest.fixture(autouse=True, scope="module")
def no_progress() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_progress", lambda what, total: tqdm(total=total, disable=True))
        yield


# ---------------------------------------------------------------- pure parts


def test_the_plain_rung_comes_first_and_warm_ones_last() -> None:
    found = rungs((0.0, 0.1), (0, 2), warm=True)
    assert [rung.name for rung in found] == [
        *("plain", "soft 0.1", "refine 2"),
        *("warm", "warm + soft 0.1", "warm + refine 2"),
    ]
    assert rungs((), (), warm=False) == [PLAIN_RUNG]


@given(found=standings, budget=st.sampled_from([0.0, 2.0, math.inf]))
def test_the_choice_is_the_most_accurate_within_the_budget_and_then_the_cheapest(
    found: list[Standing], budget: float
) -> None:
    found = [Standing(PLAIN_RUNG, 0.25, 0.0), *found]
    best = best_within(found, budget)
    assert best.tokens <= budget
    for one in found:
        if one.tokens <= budget:
            assert (best.accuracy, -best.tokens) >= (one.accuracy, -one.tokens)


@given(found=standings)
def test_the_frontier_has_what_nothing_else_beats(found: list[Standing]) -> None:
    best = frontier(found)
    pairs = {(one.accuracy, one.tokens) for one in found}
    beaten = {
        (a, t) for a, t in pairs if any((b >= a and u <= t) and (b, u) != (a, t) for b, u in pairs)
    }
    assert {(one.accuracy, one.tokens) for one in best} == pairs - beaten
    assert len(best) == len(pairs - beaten)
    assert [one.tokens for one in best] == sorted(one.tokens for one in best)


def test_of_rungs_alike_in_both_the_first_is_chosen() -> None:
    warm = Standing(Rung(warm=True), 0.5, 0.0)
    plain = Standing(PLAIN_RUNG, 0.5, 0.0)
    assert best_within([plain, warm], math.inf) == plain
    assert frontier([plain, warm]) == [plain]


# ---------------------------------------------------------------- a whole search


class LadderEngine(Engine):
    """An engine that scores: the contexts in the order of their index, the last one best.

    Args:
        solves: whether the answer is the label, by soft, refine, and whether P has the items.
    """

    def __init__(self, solves: Callable[[float, int, bool], bool]) -> None:
        super().__init__()
        self._plain_prefix = len(Encoder(CharTokenizer()).prefix(None))
        self._solves = solves

    def _answer(self, body: Body, i: int) -> dict[str, Any]:
        answer = super()._answer(body, i)
        if "contexts" not in body or "token_ids_logprob" in body:
            return answer
        ape, prefix = body["ape"][i], len(body["prefix_ids"][i])
        assert prefix in (self._plain_prefix, self._plain_prefix + WARM_TOKENS)
        soft, refine = ape["soft"], ape["refine"]
        right = self._solves(soft, refine, prefix > self._plain_prefix)
        lengths = [len(context["input_ids"]) for context in body["contexts"][i]]
        scored = soft > 0 or 0 < refine < len(lengths)
        # As if all were cached and known from before.
        info: dict[str, Any] = {"ape": {"scored_tokens": 0, "refined_tokens": 0}}
        if scored:
            info["contexts"] = [{"id": f"ctx-{n}", "score": float(n)} for n in range(len(lengths))]
        return {"text": "A label." if right else "nothing", "meta_info": info}


def calibrate(engine: Engine, labelled: bool = True, **changes: Any) -> Outcome:
    plan = Plan("match", "greedy", "span", VALUES, VALUES, ())._replace(**changes)
    encoder = Encoder(CharTokenizer())
    asks = Measure(engine, Options(4, (), 2, 3), {}, encoder.warm(plan.warm))
    found = rows(5, labelled)
    return Calibration(plan, asks, lambda row: True).run(found[:3], found[3:])


def test_without_rungs_to_try_nothing_more_is_asked() -> None:
    engine = LadderEngine(lambda soft, refine, warm: True)
    outcome = calibrate(engine)
    assert (outcome.ladder, outcome.held_out_ladder) == ([], [])
    assert outcome.chosen.rung == PLAIN_RUNG
    options = {
        (one["soft"], one["refine"]) for body in engine.bodies for one in body.get("ape", ())
    }
    assert options == {(0.0, 0)}, "given, for the server's own defaults may be others"


def test_every_rung_is_tried_at_the_chosen_setting_and_the_choice_once_more() -> None:
    engine = LadderEngine(lambda soft, refine, warm: refine == 2)
    outcome = calibrate(engine, **LADDER)
    chosen = outcome.chosen
    assert [step.rung for step in outcome.ladder] == rungs((0.1, 0.3), (1, 2), True)
    assert [step.rung for step in outcome.held_out_ladder] == [PLAIN_RUNG, chosen.rung]
    assert {step.accuracy.rows for step in outcome.held_out_ladder} == {2}
    with_rung = [
        one for body in engine.bodies for one in body.get("ape", ()) if one["soft"] or one["refine"]
    ]
    assert {(one["temperature"], one["scale"]) for one in with_rung} == {tuple(chosen.point)}
    assert {bool(one["soft"] and one["refine"]) for one in with_rung} == {False}


def test_costs_are_those_of_a_new_question_over_cached_contexts() -> None:
    outcome = calibrate(LadderEngine(lambda soft, refine, warm: True), **LADDER)
    tokens = {step.rung: step.tokens for step in outcome.ladder}
    score = 2 * (1 + 1)  # two contexts, a query of one character
    second = 2  # characters of the second context of each row, which stands after the first
    expected = {(0.0, 0): 0, (0.1, 0): score, (0.3, 0): score, (0.0, 1): score, (0.0, 2): second}
    for (soft, refine), cost in expected.items():
        for warm in (False, True):
            assert tokens[Rung(soft, refine, warm)] == cost


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [(math.inf, Rung(soft=0.3)), (4, Rung(soft=0.3)), (3.9, PLAIN_RUNG), (0, PLAIN_RUNG)],
)
def test_the_budget_bounds_what_is_chosen(budget: float, chosen: Rung) -> None:
    engine = LadderEngine(lambda soft, refine, warm: soft == 0.3)
    assert calibrate(engine, **LADDER, budget=budget).chosen.rung == chosen


def test_of_rungs_equally_right_the_cheaper_is_chosen() -> None:
    engine = LadderEngine(lambda soft, refine, warm: soft == 0.3 or refine == 2)
    assert calibrate(engine, **LADDER).chosen.rung == Rung(refine=2)


def test_a_rung_that_gains_nothing_is_not_chosen() -> None:
    outcome = calibrate(LadderEngine(lambda soft, refine, warm: True), **LADDER)
    assert outcome.chosen.rung == PLAIN_RUNG
    assert len(outcome.held_out_ladder) == 1


def test_warm_items_cost_nothing_and_go_before_what_costs() -> None:
    outcome = calibrate(LadderEngine(lambda soft, refine, warm: warm or soft > 0), **LADDER)
    assert outcome.chosen.rung == Rung(warm=True)


def test_the_same_ladder_gives_the_same_choice() -> None:
    def solves(soft: float, refine: int, warm: bool) -> bool:
        return soft == 0.1

    assert calibrate(LadderEngine(solves), **LADDER) == calibrate(LadderEngine(solves), **LADDER)


# ---------------------------------------------------------------- the command


class Command:
    """``main`` on a file of rows, with a :class:`LadderEngine`."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.engine = LadderEngine(lambda soft, refine, warm: warm and soft > 0)
        self.path = folder / "rows.jsonl"
        self.profile = folder / "profile.json"
        self.warm = folder / "warm.jsonl"
        self.warm.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
        self._capsys = capsys
        monkeypatch.setattr(command, "open_backend", lambda args, flags: self.engine)
        self.write(
            *({"contexts": ["ab", f"c{i}"], "query": "q", "answers": ["label"]} for i in range(6))
        )

    def write(self, *rows: Any) -> None:
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, *options: str, status: int = 0) -> str:
        argv = ["--url", "http://nowhere", "--data", str(self.path), "--out", str(self.profile)]
        values = ["--temperatures", "0.5", "--scales", "0.9"]
        assert command.main([*argv, *values, *options]) == status
        captured = self._capsys.readouterr()
        assert self.profile.exists() == (status == 0)
        return captured.out + captured.err


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def test_the_choice_is_in_the_profile_the_table_and_the_plot(run: Command, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    output = run(
        *("--soft", "0,0.1,0.3", "--refine", "1,2", "--warm", str(run.warm)),
        *("--budget", "50", "--plot", str(plot)),
    )
    found = profile.read(run.profile)
    assert (found.soft, found.refine, tuple(found.warm)) == (0.1, 0, ITEMS)
    assert found.report["ladder"]["budget"] == 50
    assert [step["soft"] for step in found.report["ladder"]["held_out"]] == [0.0, 0.1]
    lines = output.splitlines()
    (header,) = [line for line in lines if line.startswith("validation") and "extra" in line]
    (chosen, again) = [line for line in lines if "warm + soft 0.1*" in line]
    assert header.split() == ["validation", "accuracy", "extra", "tokens/request", "frontier"]
    assert chosen.split()[4:] == ["1.000", "±", "0.000", "(n=3)", "4.0", "yes"]
    assert "(n=3)" in again and "yes" not in again
    assert "rung        warm + soft 0.1" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_the_options_the_profile_has_no_ladder(run: Command) -> None:
    output = run()
    found = profile.read(run.profile)
    assert (found.soft, found.refine, found.warm) == (0, 0, [])
    assert "ladder" not in found.report
    assert "rung" not in output and "extra tokens" not in output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--soft", "-1"), "λ = -1 is out of range"),
        (("--soft", "nan"), "λ = nan is out of range"),
        (("--soft", "a"), "not numbers with commas"),
        (("--refine", "1.5"), "not whole numbers with commas"),
        (("--refine", "2,-1"), "m = -1 is out of range"),
        (("--soft", "1", "--budget", "-1"), "--budget: must be 0 or more"),
        (("--budget", "5"), "--budget goes with --soft, --refine or --warm"),
    ],
)
def test_wrong_options_are_named(run: Command, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
    assert reason in run._capsys.readouterr().err
    assert not run.engine.bodies


def test_rows_without_answers_are_no_ground_for_a_rung(run: Command) -> None:
    run.write(*[{"contexts": ["a", "b"], "query": "q"}] * 3)
    assert "no row with answers" in run("--soft", "0.1", status=2)


def test_a_row_with_a_prefix_of_its_own_gets_no_warm_items(run: Command) -> None:
    row = {"contexts": ["a", "b"], "query": "q", "answers": ["x"]}
    run.write(row, {**row, "prefix": "P"})
    assert "line 2: a request that gives its prefix" in run("--warm", str(run.warm), status=2)


def test_a_file_without_items_is_named_with_its_line(run: Command) -> None:
    run.warm.write_text('"one"\n7\n')
    assert "line 2: must be a string" in run("--warm", str(run.warm), status=2)
    assert not run.engine.bodies


def test_items_beyond_the_window_are_found_before_anything_is_asked(run: Command) -> None:
    run.warm.write_text(json.dumps("x" * 300))
    assert "line 1: " in run("--warm", str(run.warm), status=2)
    assert not run.engine.bodies
