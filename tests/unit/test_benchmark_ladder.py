"""The measurement of the quality ladder: statistics, hard negatives, its data and a whole run."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ladder, rag_qa
from benchmarks.common import forms, invented, passages
from benchmarks.common.bm25 import K1, B, Index
from benchmarks.common.controls import ControlError
from benchmarks.common.data import DataError
from benchmarks.common.methods import LADDER, LEAST_SOFT
from benchmarks.common.paired import compare, interval, sign_test
from benchmarks.common.passages import (
    OpenQuestion,
    OpenQuestions,
    Passage,
    holds_answer,
    ranking,
    with_hard_negatives,
)
from benchmarks.common.prompts import Prompt
from benchmarks.common.scores import every_span_match
from tests.unit import test_benchmark_quality
from tests.unit.test_benchmark_data import written
from tests.unit.test_benchmark_quality import Server, answers, run
from tests.unit.test_benchmark_quality import server as server  # a fixture

##### Statistics


@pytest.mark.parametrize(("better", "worse"), [*itertools.product(range(6), repeat=2)])
def test_the_sign_test_counts_all_splits(better: int, worse: int) -> None:
    count = better + worse
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=count)]
    uneven = abs(better - worse)
    as_uneven = sum(abs(2 * ups - count) >= uneven for ups in splits)
    assert sign_test(better, worse) == pytest.approx(as_uneven / len(splits))


def test_a_comparison_counts_questions_and_not_rows() -> None:
    found = compare([1, 1, 0, 1, 0.5], [0, 1, 1, 0, 0], seed=0)
    assert (found.questions, found.better, found.worse) == (5, 3, 1)
    assert found.difference == pytest.approx(0.3)
    assert found.low is not None and found.high is not None
    assert found.low < found.difference < found.high
    assert found == compare([1, 1, 0, 1, 0.5], [0, 1, 1, 0, 0], seed=0)
    alone = compare([1], [0], seed=0)
    assert (alone.difference, alone.low, alone.high, alone.p) == (1, None, None, 1)


def test_the_interval_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 400)
    low, high = interval(values.tolist(), seed=0)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(2)
    covered = 0
    for seed in range(100):
        low, high = interval(drawn.integers(-1, 2, 40).tolist(), seed)
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


##### Hard negatives


def test_bm25_is_its_formula_written_with_loops() -> None:
    texts = ["red mill by the red river", "river of gold", "a mill", "nothing here at all", ""]
    words = [[w for w in text.split() if w != "a" and w != "the"] for text in texts]
    mean = sum(map(len, words)) / len(words)

    def score(own: list[str], query: str) -> float:
        total = 0.0
        for word in query.split():
            having = sum(word in other for other in words)
            if word in own:
                f = own.count(word)
                norm = f + K1 * (1 - B + B * len(own) / mean)
                total += math.log(1 + (len(words) - having + 0.5) / (having + 0.5)) * (
                    f * (K1 + 1) / norm
                )
        return total

    index = Index(texts)
    for query in ("red mill", "river", "mill mill gold", "absent"):
        scores = [score(own, query) for own in words]
        expected = sorted(
            (i for i, found in enumerate(scores) if found), key=lambda i: (-scores[i], i)
        )
        assert index.ranked(query) == expected


def test_hard_negatives_are_of_the_same_title_first_and_hold_no_answer() -> None:
    gold = Passage("Old Mill", "Jonas Pell keeps the wheel.")
    same = Passage("Old Mill", "The wheel was built of oak.")
    holding = Passage("Old Mill", "jonas pell built the wheel")
    related = Passage("New Mill", "Nobody keeps the wheel of this one.")
    far = Passage("Harbour", "Ships come in.")
    one = OpenQuestion("Who keeps the wheel?", ("Jonas Pell",), gold, (far,))
    collection = (far, gold, holding, related, same)
    (found,) = with_hard_negatives(OpenQuestions("x", (one,), collection)).questions
    assert found.distractors == (same, related) or found.distractors == (related, same)
    assert ranking(found, collection, 4, seed=0)[0] == gold
    assert ranking(found, collection, 4, seed=0)[3] == far


def test_facts_keep_to_the_distractors_of_their_own_question(tmp_path: Path) -> None:
    rows = [
        {
            "contexts": [{"name": f"{name} tower", "code": code} for name, code in pairs],
            "target": 1,
        }
        for pairs in (
            [("old", "1111"), ("red", "2222"), ("low", "3333")],
            [("red", "4444"), ("wet", "5555"), ("dry", "6666")],
        )
    ]
    data = passages.load(written(tmp_path / "codes.jsonl", rows), None)
    for given, hard in zip(data.questions, with_hard_negatives(data).questions, strict=True):
        assert set(given.distractors) == set(hard.distractors)
        ranked = ranking(hard, data.collection, 3, seed=0)
        assert [holds_answer(one, hard.answers) for one in ranked] == [True, False, False]


##### Data


def test_forms_of_facts(tmp_path: Path) -> None:
    codes = {"contexts": [{"name": "red mill", "code": "12"}], "target": 0}
    found = passages.load(written(tmp_path / "codes.jsonl", [codes]), None)
    (one,) = found.questions
    assert (one.text, one.answers) == ("What is the secret code of the red mill?", ("12",))
    assert found.form is forms.CODES and not one.distractors
    records = {"key": "k2", "records": [["k1", "v1"], ["k2", "v2"]]}
    found = passages.load(written(tmp_path / "records.jsonl", [records]), None)
    (one,) = found.questions
    assert (one.gold.text, one.answers) == ('"k2": "v2"', ("v2",))
    assert found.form is forms.KEYS and len(one.distractors) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"contexts": [{"name": "n", "code": "1"}], "target": 1}, "'target' is 1, of 1"),
        ({"contexts": [{"name": "n"}], "target": 0}, r"contexts\[0\]: 'code'"),
        ({"key": "k", "records": [["j", "v"]]}, "0 of its 'records' have the key 'k'"),
        ({"key": "k", "records": [["k"]]}, "pairs of texts"),
    ],
)
def test_wrong_facts_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        passages.load(written(tmp_path / "facts.jsonl", [row]), None)


@pytest.mark.parametrize("made", [invented.two_codes, invented.two_hops])
def test_two_documents_are_needed_and_no_other_answers(made: Any) -> None:
    data = made(3, 80)
    assert data == made(3, 80) and data != made(4, 80)
    assert len(data.questions) == len({one.text for one in data.questions}) == 80
    for one in data.questions:
        ranked = ranking(one, data.collection, 10, seed=0)
        assert ranked[:2] == list(one.needed)
        assert not any(holds_answer(passage, one.answers) for passage in ranked[2:])
        joined = " ".join(passage.text for passage in one.needed)
        assert every_span_match(joined, one.answers) == 1
        assert every_span_match(ranked[2].text, one.answers) == 0
    with pytest.raises(DataError, match="needs 2 documents"):
        ranking(data.questions[0], data.collection, 1, seed=0)


def test_the_second_hop_is_not_named_in_the_question() -> None:
    for one in invented.two_hops(0, 40).questions:
        person = one.gold.text.split(" was born")[0]
        assert person in one.also[0].text and person not in one.text


def test_warm_items_are_in_no_data_set_of_our_own() -> None:
    sets = (invented.two_codes(0, 200), invented.two_hops(0, 200), invented.places(0, 500))
    for data in sets:
        assert not set(data.form.warm) & set(data.collection)
        for item in data.form.warm:
            assert bool(item.title) == bool(data.collection[0].title)


##### Runs


class LadderServer(Server):
    """Also scores contexts: the gold one highest, which is the one with most tokens."""

    def __init__(self, other: Server) -> None:
        super().__init__(other.folder)
        self.bodies: list[dict[str, Any]] = []
        self.without_scores = False
        self.moved_by: float | None = None  # a value of soft that changes answers

    def _answer(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        answer = super()._answer(body)
        ape = body.get("ape")
        if ape is None or not isinstance(answer, dict):
            return answer
        count = len(body["contexts"])
        scores = ape["soft"] > 0 or 0 < ape["refine"] < count
        spent = {"scored_tokens": 5 * count * scores, "refined_tokens": 7 * ape["refine"]}
        answer["meta_info"]["ape"] = spent
        if scores and not self.without_scores:
            answer["meta_info"]["contexts"] = [
                {"id": f"ctx-{i}", "score": float(len(one["input_ids"]))}
                for i, one in enumerate(body["contexts"])
            ]
        if ape["soft"] and ape["soft"] == self.moved_by:
            answer["text"] = "moved"
        return answer


@pytest.fixture
def rungs(server: Server, monkeypatch: pytest.MonkeyPatch) -> LadderServer:
    monkeypatch.setattr(test_benchmark_quality, "WINDOW", 100_000)
    made = LadderServer(server)
    for name in ("generate", "stream", "info", "flush"):
        monkeypatch.setattr(server, name, getattr(made, name))
    return made


SMALL = ["--documents", "4", "--facts", "4", "--shots", "8", "--questions", "5"]


def test_every_rung_is_compared(
    rungs: LadderServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(ladder.main, tmp_path, *SMALL)
    rows = {(row["data"], row["method"]): row for row in content["rows"]}
    for data in ladder.QUICK_DATA:
        assert [method for own, method in rows if own == data] == [one.value for one in LADDER]
        assert rows[data, "ape"]["scored_tokens"] == rows[data, "ape + warm"]["scored_tokens"] == 0
        assert rows[data, "ape + soft"]["scored_tokens"] > 0
        assert rows[data, "ape + refine"]["refined_tokens"] == 14
        assert rows[data, "ape + warm"]["prompt_tokens"] > rows[data, "ape"]["prompt_tokens"]
        controls = content["controls"][data]
        assert sum(name.startswith("refine all") for name in controls) == 1
        assert sum(name.startswith("least soft") for name in controls) == 1
        assert controls["scores"] == "not checked: --no-reference"
    assert "gold_first" in rows["places", "ape + soft"]
    assert "gold_first" not in rows["requests", "ape + soft"]
    compared = {(one["data"], one["method"], one["against"]): one for one in content["comparisons"]}
    assert len(compared) == 3 * (6 + 6)
    entries = answers(tmp_path)
    for (data, method, against), one in compared.items():
        own, other = (
            [e[one["score"]] for e in entries if (e["data"], e["method"]) == (data, name)]
            for name in (method, against)
        )
        assert one["questions"] == 5
        assert one["difference"] == pytest.approx(np.subtract(own, other).mean())
    printed = capsys.readouterr().out
    assert "McNemar" in printed and "Gold 1st" in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_controls_may_ask_fewer_questions(rungs: LadderServer, tmp_path: Path) -> None:
    content = run(ladder.main, tmp_path, *SMALL, "--data", "two-hops", "--checked", "2")
    assert content["controls"]["two-hops"]["refine all, 4 documents"].startswith("2 of 2")
    assert sum(body.get("ape", {}).get("soft") == LEAST_SOFT for body in rungs.bodies) == 2


def test_soft_that_moves_nothing_must_move_nothing(rungs: LadderServer, tmp_path: Path) -> None:
    rungs.moved_by = LEAST_SOFT
    with pytest.raises(ControlError, match="places, 4 documents: question 0: soft with a λ"):
        run(ladder.main, tmp_path, *SMALL)
    left = json.loads((tmp_path / "results.json").read_text())
    assert not left["finished"]
    assert {row["data"] for row in left["rows"]} == set(ladder.QUICK_DATA)
    assert "soft with a λ" in left["controls"]["requests"]["failed, 8 shots in 2"]
    rungs.moved_by, rungs.without_scores = None, True
    with pytest.raises(ControlError, match="0 scores for 4 contexts"):
        run(ladder.main, tmp_path, *SMALL)


def test_a_bf16_server_is_asked_with_soft_off(
    rungs: LadderServer, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server, "info", lambda: {"enable_ape": True, "dtype": "bfloat16"})
    content = run(ladder.main, tmp_path, *SMALL, "--data", "two-codes")
    assert "soft 0, 4 documents" in content["controls"]["two-codes"]
    assert not any(body.get("ape", {}).get("soft") == LEAST_SOFT for body in rungs.bodies)


def test_files_are_told_apart(tmp_path: Path) -> None:
    files: dict[str, list[dict[str, Any]]] = {
        "codes": [{"contexts": [{"name": "n", "code": "1"}], "target": 0}],
        "labels": [
            {"text": f"t{i}", "label": "x", "split": split}
            for i, split in enumerate(("pool", "dev"))
        ],
        "sums": [
            {"question": f"q{i}", "solution": "1", "answer": "1", "split": split}
            for i, split in enumerate(("pool", "dev"))
        ],
    }
    kinds = []
    for name, rows in files.items():
        path = written(tmp_path / f"{name}.jsonl", rows)
        args, _ = ladder.parse(["--quick", "--data", str(path)])
        kinds.append(type(ladder.load_all(args)[0]).__name__)
    assert kinds == ["OpenQuestions", "Examples", "Examples"]
    args, _ = ladder.parse(["--quick", "--data", "nowhere"])
    with pytest.raises(DataError, match="neither a file nor one of places, two-codes"):
        ladder.load_all(args)


def test_gold_contexts_are_where_the_prompt_has_them(tiny_llama: Path) -> None:
    encoder = rag_qa.Encoder(str(tiny_llama))
    data = invented.two_codes(0, 20)
    for one in data.questions:
        made = rag_qa.question(encoder, one, data.collection, 6, seed=0, warm=data.form.warm)
        golds = [encoder.prompt("", [rag_qa.shown(p)], "").contexts[0] for p in one.needed]
        assert sorted(made.gold) == sorted(made.prompt.contexts.index(gold) for gold in golds)
        assert made.prompt.warm


def test_a_small_set_is_asked_whole() -> None:
    data = invented.two_codes(0, 5)
    for questions, asked in ((3, 3), (9, 5)):
        args, _ = ladder.parse(["--quick", "--questions", str(questions)])
        assert args.soft == 0.1 and args.warm_items == 2
        made = ladder.subject(data, args)
        encoder = rag_qa.Encoder.__new__(rag_qa.Encoder)
        encoder.prompt = lambda *_: Prompt([1], ([2], [3]), [4])  # type: ignore[method-assign]
        assert {len(level.questions) for level in made.levels(encoder)} == {asked}


@pytest.mark.parametrize(
    "options",
    [["--soft", "0"], ["--refine", "0"], ["--facts", "0"], ["--checked", "0"], ["--shots", "0"]],
)
def test_options_out_of_range(options: Sequence[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ladder.parse(["--quick", *options])
