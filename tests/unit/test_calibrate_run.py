"""A whole calibration, with a small arithmetic in the place of an engine."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from sglang_ape.calibrate import __main__ as command
from sglang_ape.calibrate import measure, plot, profile
from sglang_ape.calibrate.backend import Facts, Server
from sglang_ape.calibrate.data import Example, InputError
from sglang_ape.calibrate.measure import Measure, Options, Setting
from sglang_ape.calibrate.run import PLAIN, Calibration, Outcome, Plan
from sglang_ape.calibrate.search import Point
from sglang_ape.calibrate.tokens import Encoder, Row
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from tests.unit.test_expand import CharTokenizer

VALUES = (0.5, 0.9, 1.0)
ANSWER = [5, 6]
BOTH = {ANSWER[0]: 0.6, ANSWER[1]: 0.3}  # the sequential distribution at each position

Body = Mapping[str, Any]


@pytest.fixture(autouse=True, scope="module")
def no_progress() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_progress", lambda what, total: tqdm(total=total, disable=True))
        yield


class Engine:
    """Answers bodies.

    Args:
        shift: how far, in nats, APE's probability of the first likely token is off, by T, S and
            the length of P.
        right: whether APE's answer is the label, likewise.
    """

    def __init__(
        self,
        shift: Callable[[float, float, int], float] = lambda t, s, p: abs(t - 0.5) + abs(s - 0.9),
        right: Callable[[float, float, int], bool] = lambda t, s, p: True,
        window: int = 200,
        pool: int = 1000,
    ) -> None:
        self.facts = Facts(
            "/models/fake", CharTokenizer(), Limits(window, window, pool, 1 << 32), window, None
        )
        self.bodies: list[Body] = []
        self.closed = False
        self.error: Exception | None = None
        self.finish_reason = {"type": "stop"}
        self._shift, self._right = shift, right

    def ask(self, body: Body) -> list[dict[str, Any]]:
        self.bodies.append(body)
        if self.error is not None:
            raise self.error
        answers = [self._answer(body, i) for i in range(len(body["input_ids"]))]
        for answer in answers:
            answer.setdefault("meta_info", {})["finish_reason"] = self.finish_reason
        return answers

    def close(self) -> None:
        self.closed = True

    def _answer(self, body: Body, i: int) -> dict[str, Any]:
        if "contexts" not in body:
            top = [[math.log(p), token, None] for token, p in BOTH.items()]
            meta = {"output_top_logprobs": [top] * len(ANSWER)}
            return {"text": "the label", "output_ids": ANSWER, "meta_info": meta}
        ape = body["ape"][i]
        key = (ape["temperature"], ape["scale"], len(body["prefix_ids"][i]))
        if "token_ids_logprob" not in body:
            return {"text": "A label." if self._right(*key) else "nothing"}
        query = len(body["input_ids"][i]) - len(ANSWER)
        before = key[2] + sum(len(context["input_ids"]) for context in body["contexts"][i])
        assert body["logprob_start_len"][i] == before + query - 1
        assert body["input_ids"][i][query:] == ANSWER
        likely = math.log(BOTH[ANSWER[0]]) - self._shift(*key)
        row = [[likely, ANSWER[0], None], [math.log(BOTH[ANSWER[1]]), ANSWER[1], None]]
        return {"meta_info": {"input_token_ids_logprobs": [None, *[row] * len(ANSWER)]}}


def rows(count: int, labelled: bool = True) -> list[Row]:
    encoder = Encoder(CharTokenizer())
    return [
        encoder.row(
            line,
            Example(
                contexts=["ab", f"c{line}"], query="q", answers=["Label"] if labelled else None
            ),
        )
        for line in range(1, count + 1)
    ]


def calibrate(
    engine: Engine, labelled: bool = True, batch_size: int = 3, **changes: Any
) -> Outcome:
    plan = Plan("match", "greedy", "span", VALUES, VALUES, ())._replace(**changes)
    prefixes = {text: Encoder(CharTokenizer()).prefix(text) for text in plan.prefixes}
    asks = Measure(engine, Options(4, (), 2, batch_size), prefixes)
    found = rows(5, labelled)
    calibration = Calibration(plan, asks, lambda row: True)
    return calibration.run(found[:3], found[3:])


def drawn(seed: int) -> tuple[Callable[..., float], Callable[..., bool]]:
    """Functions of the setting, without any order in them."""
    return (
        lambda *key: random.Random(f"{seed} {key}").randrange(5) / 4,
        lambda *key: random.Random(f"right {seed} {key}").random() < 0.5,
    )


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    search=st.sampled_from(["greedy", "grid"]),
    objective=st.sampled_from(["match", "accuracy"]),
    prefixes=st.sampled_from([(), ("longer", "P")]),
    labelled=st.booleans(),
)
def test_nothing_chosen_is_worse_than_unit_by_score_or_accuracy(
    seed: int, search: str, objective: str, prefixes: tuple[str, ...], labelled: bool
) -> None:
    labelled |= objective == "accuracy"
    engine = Engine(*drawn(seed))
    plan = {"search": search, "objective": objective, "prefixes": prefixes}
    outcome = calibrate(engine, labelled, **plan)
    assert outcome == calibrate(Engine(*drawn(seed)), labelled, **plan)
    scores = {cell.setting: cell.score for cell in outcome.cells}
    assert scores[outcome.chosen] <= scores[PLAIN]
    assert scores[outcome.chosen] <= scores[Setting(PLAIN.point, outcome.chosen.prefix)]
    if labelled:
        accuracy = {one.name: one.accuracy.mean for one in outcome.validation if one.accuracy}
        assert accuracy["chosen"] >= accuracy["T = S = 1"]
        assert accuracy["sequential"] == 1


def test_without_labels_the_nearest_match_is_chosen_and_nothing_is_generated() -> None:
    engine = Engine()
    outcome = calibrate(engine, labelled=False)
    assert outcome.chosen == Setting(Point(0.5, 0.9))
    assert {one.accuracy for one in (*outcome.validation, *outcome.held_out)} == {None}
    asked = [body for body in engine.bodies if "contexts" in body]
    assert {body["sampling_params"]["max_new_tokens"] for body in asked} == {0}


def test_the_divergence_is_that_of_the_two_distributions() -> None:
    cells = {cell.setting.point: cell.score for cell in calibrate(Engine()).cells}
    p, q = [0.6, 0.3, 0.1], [0.6 * math.exp(-0.6), 0.3]
    q.append(1 - sum(q))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert cells[Point(1.0, 1.0)] == pytest.approx(expected)
    assert cells[Point(0.5, 0.9)] == pytest.approx(0)


def test_a_match_that_answers_wrong_is_passed_over_and_said_so() -> None:
    outcome = calibrate(Engine(right=lambda t, s, p: (t, s) != (0.5, 0.9)), search="grid")
    assert outcome.chosen.point == Point(0.5, 1.0)
    assert any("passed over" in note and "1 of the best" in note for note in outcome.notes)
    outcome = calibrate(Engine(right=lambda t, s, p: t == s == 1), search="grid")
    assert outcome.chosen == PLAIN
    assert any("kept is T = S = 1" in note for note in outcome.notes)


def test_accuracy_is_an_objective_of_its_own_and_ties_go_to_the_nearest_to_unit() -> None:
    outcome = calibrate(Engine(right=lambda t, s, p: s < 1), objective="accuracy", search="grid")
    assert outcome.chosen.point == Point(1.0, 0.9)
    assert {cell.score for cell in outcome.cells} == {0.0, 1.0}


def test_the_best_prefix_is_searched_further_and_the_others_are_not() -> None:
    length = len(Encoder(CharTokenizer()).prefix("longer"))
    engine = Engine(shift=lambda t, s, p: abs(t - 0.5) + (p != length))
    outcome = calibrate(engine, prefixes=("P", "longer"))
    assert outcome.chosen == Setting(Point(0.5, 1.0), "longer")
    scored = {None: 0, "P": 0, "longer": 0}
    for cell in outcome.cells:
        scored[cell.setting.prefix] += 1
    assert scored[None] == scored["P"] == 2 < scored["longer"]


def test_prefixes_that_do_not_help_leave_the_rows_own() -> None:
    length = len(Encoder(CharTokenizer()).prefix(None))
    outcome = calibrate(Engine(shift=lambda t, s, p: t + (p != length)), prefixes=("P",))
    assert outcome.chosen.prefix is None


def test_every_context_is_encoded_by_one_request_before_others_use_it() -> None:
    engine = Engine()
    calibrate(engine, search="grid", labelled=False)
    encoded: set[tuple[int, ...]] = set()
    for body in engine.bodies:
        if "contexts" not in body:
            continue
        assert len(body["input_ids"]) <= 3
        in_batch = [
            tuple(context["input_ids"])
            for contexts in body["contexts"]
            for context in contexts
            if tuple(context["input_ids"]) not in encoded
        ]
        assert len(set(in_batch)) == len(in_batch)
        if body is engine.bodies[-1]:
            break
        encoded |= set(in_batch)


def test_rows_that_the_pool_cannot_hold_together_are_taken_in_turns() -> None:
    settings_of: list[str] = []
    engine = Engine(pool=18)  # half of it: two rows of four context tokens
    calibrate(engine, search="grid", labelled=False, batch_size=2)
    for body in engine.bodies:
        if "contexts" in body:
            settings_of += [json.dumps(contexts) for contexts in body["contexts"]]
    first = settings_of[: 2 * 9]
    assert len(set(first)) == 2
    assert len(set(settings_of[18:27])) == 1


def test_figures_have_a_standard_error_and_few_rows_a_note() -> None:
    outcome = calibrate(Engine(), labelled=True)
    by_name = {one.name: one for one in outcome.validation}
    chosen = by_name["chosen"].divergence
    assert chosen is not None
    assert (chosen.rows, chosen.error) == (3, pytest.approx(0))
    assert [note for note in outcome.notes if "only 3 rows" in note]
    assert [note for note in outcome.notes if "only 2 rows" in note]


# ---------------------------------------------------------------- the command


class Command:
    """``main`` on a file of rows, with an :class:`Engine`."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.engine = Engine()
        self.path = folder / "rows.jsonl"
        self.profile = folder / "profile.json"
        self._capsys = capsys
        monkeypatch.setattr(command, "open_backend", lambda args, flags: self.engine)
        self.write(*({"contexts": ["ab", f"c{i}"], "query": "q"} for i in range(6)))

    def write(self, *rows: Any) -> None:
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, *options: str, status: int = 0) -> str:
        argv = ["--url", "http://nowhere", "--data", str(self.path), "--out", str(self.profile)]
        assert command.main([*argv, "--temperatures", "0.5,0.9", "--scales", "0.9", *options]) == (
            status
        )
        captured = self._capsys.readouterr()
        assert self.profile.exists() == (status == 0)
        return captured.out + captured.err


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def test_the_command_writes_a_profile_a_plot_and_a_table(run: Command, tmp_path: Path) -> None:
    output = run("--plot", str(tmp_path / "plot.png"))
    found = profile.read(run.profile)
    assert (found.temperature, found.scale, found.prefix) == (0.5, 0.9, None)
    assert found.model == "fake"
    assert found.report["data"]["name"] == "rows.jsonl"
    assert [one["setting"] for one in found.report["held_out"]][-1] == "chosen"
    assert "0.0000*" in output and "chosen      T 0.5, S 0.9" in output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run.engine.closed


def test_the_same_command_gives_the_same_profile(run: Command) -> None:
    run("--seed", "3")
    first = run.profile.read_bytes()
    run.profile.unlink()
    run("--seed", "3")
    assert run.profile.read_bytes() == first


def test_wrong_rows_end_with_2_and_nothing_is_asked(run: Command) -> None:
    run.write({"contexts": ["a"], "query": "q"}, {"contexts": ["a"]})
    assert "line 2: give either query or messages" in run(status=2)
    assert not run.engine.bodies


def test_a_prefix_cannot_be_searched_for_a_chat(run: Command) -> None:
    run.write({"contexts": ["a"], "messages": [{"role": "user", "content": "q"}]})
    assert "line 1: the prefix of a chat" in run("--prefix", "P", status=2)


def test_accuracy_needs_labels(run: Command) -> None:
    assert "needs rows with answers" in run("--objective", "accuracy", status=2)


def test_rows_beyond_the_window_are_left_out_with_their_lines(run: Command) -> None:
    long = {"contexts": ["a" * 80, "b" * 80, "c" * 20], "query": "q" * 30}
    run.write(*[{"contexts": ["a", "b"], "query": "q"}] * 4, long)
    output = run("--seed", "1")
    assert "left out 1 rows: their sequential prompt does not fit" in output
    assert "(lines 5)" in output
    run.profile.unlink()
    run.write(long)
    assert "no row is left to choose on" in run(status=2)


def test_a_row_that_cannot_be_served_at_all_is_named(run: Command) -> None:
    run.write({"contexts": ["a"], "query": "q"}, {"contexts": ["a", "b" * 250], "query": "q"})
    output = run(status=2)
    assert "line 2: contexts" in output


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ApeRequestError("too odd", "contexts[0][1]"), 1, "line 1: too odd"),
        (ApeRequestError("input is odd", None), 1, "input is odd"),
        (ApeRequestError("answered 401 Unauthorized", None, 401), 1, "error: answered 401"),
        (requests.ConnectionError("gone"), 1, "no answer from http://nowhere: gone"),
        (KeyboardInterrupt(), 130, "interrupted: no profile was written"),
    ],
)
def test_what_goes_wrong_is_said_and_no_profile_is_written(
    run: Command, error: Exception, status: int, said: str
) -> None:
    run.write(*[{"contexts": ["a", "b"], "query": "q"}] * 2)
    run.engine.error = error
    assert said in run("--held-out", "0", status=status)
    assert run.engine.closed


def test_an_answer_that_the_engine_gave_up_is_an_error(run: Command) -> None:
    run.engine.finish_reason = {"type": "abort", "message": "out of luck"}
    run.write({"contexts": ["a", "b"], "query": "q"})
    assert "line 1: out of luck" in run(status=1)


def test_a_folder_is_no_place_for_a_plot(run: Command, tmp_path: Path) -> None:
    assert "is a folder" in run("--plot", str(tmp_path), status=2)
    assert not run.engine.bodies


def test_a_folder_that_is_not_there_is_found_out_before_the_work(
    run: Command, tmp_path: Path
) -> None:
    output = run("--plot", str(tmp_path / "no" / "plot.png"), status=2)
    assert "there is no folder" in output
    assert not run.engine.bodies


def test_without_matplotlib_the_plot_alone_is_refused(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise InputError("--plot needs matplotlib: pip install 'sglang-ape[bench]'")

    monkeypatch.setattr(plot, "require_matplotlib", missing)
    assert "needs matplotlib" in run("--plot", str(tmp_path / "plot.png"), status=2)
    run()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--url", "u"],
        ["--url", "u", "--model", "m", "--quick"],
        ["--url", "u", "--quick", "--", "--tp-size", "2"],
        ["--model", "m", "--quick", "--tokenizer", "t"],
        ["--url", "u", "--quick", "--temperatures", "0"],
        ["--url", "u", "--quick", "--temperatures", "0.5;1"],
        ["--url", "u", "--quick", "--scales", "11"],
        ["--url", "u", "--quick", "--scales", "nan"],
        ["--url", "u", "--quick", "--held-out", "1"],
        ["--url", "u", "--quick", "--batch-size", "0"],
    ],
)
def test_options_that_make_no_sense_end_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(options)
    assert caught.value.code == 2


def test_quick_needs_no_file(run: Command, tmp_path: Path) -> None:
    run.engine.facts = run.engine.facts._replace(
        limits=Limits(4000, 4000, 20000, 1 << 32), longest_prompt=4000
    )
    assert command.main(["--url", "u", "--quick", "--out", str(run.profile)]) == 0
    assert profile.read(run.profile).report["data"]["name"] == "--quick"


def test_a_dead_server_is_said_to_be_dead(tmp_path: Path, capsys: Any) -> None:
    url = "http://127.0.0.1:1"
    assert command.main(["--url", url, "--quick", "--out", str(tmp_path / "p.json")]) == 1
    assert f"no answer from {url}" in capsys.readouterr().err
    with pytest.raises(InputError, match="http"):
        Server("127.0.0.1:1", None, 1.0, None)


def test_the_parts_of_a_batch_belong_together() -> None:
    """Every body has one value of each field for each of its requests."""
    engine = Engine()
    calibrate(engine)
    for body in engine.bodies:
        sizes = {name: len(value) for name, value in body.items() if isinstance(value, list)}
        assert len(set(sizes.values())) == 1, sizes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch_size=st.integers(1, 9), pool=st.integers(15, 200))
def test_batches_and_groups_change_no_figure(batch_size: int, pool: int) -> None:
    shift, right = drawn(7)
    expected = calibrate(Engine(shift, right), search="grid")
    assert calibrate(Engine(shift, right, pool=pool), batch_size=batch_size, search="grid") == (
        expected
    )


def test_greedy_and_grid_agree_on_a_bowl() -> None:
    assert calibrate(Engine()).chosen == calibrate(Engine(), search="grid").chosen
