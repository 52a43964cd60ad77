"""Data of the quality benchmarks: files, the hub's form, texts of our own making."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import demonstrations, hub, invented, passages
from benchmarks.common.data import DataError, Row, Unavailable, held_out, read_jsonl
from benchmarks.common.demonstrations import Example, Examples, first_shots
from benchmarks.common.passages import OpenQuestion, Passage, holds_answer, ranking


def written(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def labelled(count: int, labels: int, split: str = "pool") -> list[dict[str, str]]:
    return [
        {"text": f"{split} text {i}", "label": f"label_{i % labels}", "split": split}
        for i in range(count)
    ]


##### Files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_read_jsonl(tmp_path: Path, name: str) -> None:
    rows = read_jsonl(written(tmp_path / name, [{"a": 1}, {"a": 2}]))
    assert [row.values["a"] for row in rows] == [1, 2]
    assert rows[1].where == f"{name}, line 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"a": 1}\n{', "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_read_jsonl_says_what_is_wrong(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_a_missing_or_damaged_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path / "bad.jsonl.gz")


def test_rows_check_their_columns() -> None:
    row = Row("line 1", {"a": "x", "n": 3, "flag": True, "empty": "", "list": ["x", 1]})
    assert row.get("a", str) == "x"
    assert row.get("n", int) == 3
    for name, kind in (("b", str), ("n", str), ("flag", int), ("empty", str)):
        with pytest.raises(DataError, match=f"line 1: '{name}'"):
            row.get(name, kind)
    with pytest.raises(DataError, match="list of texts"):
        row.texts("list")


def test_held_out_divides_and_repeats() -> None:
    shown, asked = held_out(range(50), seed=3)
    assert sorted(shown + asked) == list(range(50))
    assert len(asked) == 5
    assert held_out(range(50), seed=3) == (shown, asked)
    assert held_out(range(50), seed=4) != (shown, asked)
    with pytest.raises(DataError, match="two rows"):
        held_out([1], seed=0)


##### Demonstrations


def test_labelled_rows(tmp_path: Path) -> None:
    rows = labelled(6, 3) + labelled(2, 3, "dev")
    data = demonstrations.load(str(written(tmp_path / "own.v1.jsonl", rows)), seed=0)
    assert (data.name, len(data.pool), len(data.asked)) == ("own", 6, 2)
    assert data.labels == ("label 0", "label 1", "label 2")
    assert data.pool[0] == Example("pool text 0", "label 0")


def test_what_is_asked_is_never_shown() -> None:
    rows = [Row("", {"text": "same", "label": "x", "split": split}) for split in ("pool", "dev")]
    rows.append(Row("", {"text": "other", "label": "x", "split": "train"}))
    data = demonstrations.from_rows("own", rows, seed=0)
    assert [example.text for example in data.pool] == ["other"]


def test_without_splits_a_tenth_is_asked() -> None:
    rows = [Row("", {"text": f"text {i}", "label": "x"}) for i in range(20)]
    data = demonstrations.from_rows("own", rows, seed=0)
    assert (len(data.pool), len(data.asked)) == (18, 2)


@pytest.mark.parametrize(
    "answer",
    [
        {"solution": "Two and two is 4.", "answer": "4"},
        {"answer": "Two and two is <<2+2=4>>4.\n#### 4"},
    ],
)
def test_both_forms_of_solutions(answer: dict[str, str]) -> None:
    rows = [
        Row(split, {"question": f"{split}: 2 + 2?", "split": split} | answer)
        for split in ("pool", "dev")
    ]
    data = demonstrations.from_rows("sums", rows, seed=0)
    assert data.labels == ()
    assert data.pool == (Example("pool: 2 + 2?", "4", "Two and two is 4."),)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "later"}, "'split' must be one of"),
        ({"label": 3}, "'label'"),
        ({"text": None}, "'text'"),
    ],
)
def test_wrong_rows_are_named(changed: dict[str, Any], message: str) -> None:
    rows = [Row(f"line {i}", row) for i, row in enumerate(labelled(4, 2))]
    rows[2] = Row("line 2", rows[2].values | changed)
    with pytest.raises(DataError, match=f"line 2: .*{message}|line 2: {message}"):
        demonstrations.from_rows("own", rows, seed=0)


def test_a_solution_needs_a_number() -> None:
    row = Row("line 1", {"question": "q", "solution": "s", "answer": "many"})
    with pytest.raises(DataError, match="line 1: a solution and a number"):
        demonstrations.from_rows("own", [row, row], seed=0)


def test_neither_file_nor_name() -> None:
    with pytest.raises(DataError, match="banking77, clinc150"):
        demonstrations.load("nothing_of_this_name", seed=0)


def examples(counts: dict[str, int]) -> Examples:
    pool = [Example(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]
    return Examples("own", tuple(pool), (Example("asked", "x"),), tuple(counts))


@pytest.mark.parametrize("shots", [1, 5, 8, 16, 17, 21])
def test_shots_are_balanced_as_far_as_the_pool_goes(shots: int) -> None:
    counts = {"a": 9, "b": 9, "c": 2, "d": 9}
    seen = Counter(example.answer for example in first_shots(examples(counts), shots, seed=1))
    fullest = max(seen.values())
    for label, count in counts.items():
        assert seen[label] >= min(count, fullest - 1), seen


def test_fewer_shots_are_a_beginning_of_more() -> None:
    data = examples({"a": 9, "b": 9, "c": 2})
    everything = first_shots(data, 20, seed=1)
    assert sorted(everything) == sorted(data.pool)
    for shots in range(20):
        assert first_shots(data, shots, seed=1) == everything[:shots]
    assert first_shots(data, 20, seed=2) != everything
    with pytest.raises(DataError, match="20 examples to show, not 21"):
        first_shots(data, 21, seed=1)


def test_questions_are_drawn_by_the_seed() -> None:
    data = invented.requests(seed=0)
    assert demonstrations.questions(data, None, 0) == list(data.asked)
    first = demonstrations.questions(data, 10, 0)
    assert len(set(first)) == 10
    assert demonstrations.questions(data, 10, 0) == first
    assert demonstrations.questions(data, 10, 1) != first
    with pytest.raises(DataError, match="questions, not"):
        demonstrations.questions(data, 10_000, 0)


##### The hub


def test_a_set_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"utterance": datasets.Value("string"), "intent": datasets.ClassLabel(names=["a_b", "oos"])}
    )
    for split, values in (("train", [0, 1, 0]), ("test", [0, 0])):
        rows = {"utterance": [f"{split} {i}" for i in range(len(values))], "intent": values}
        (tmp_path / "data").mkdir(exist_ok=True)
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    source = hub.Source(str(tmp_path), "utterance", "intent", left_out="oos")
    assert [row.values for row in hub.load(source, "train")] == [
        {"text": "train 0", "answer": "a_b"},
        {"text": "train 2", "answer": "a_b"},
    ]


def test_names_and_repositories_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: hub.Source, split: str) -> list[Row]:
        solved = {"text": f"{split} 1 + 1?", "answer": "It is 2.\n#### 2"}
        kind = {"text": f"{split} where?", "answer": "place_name"}
        of_split = solved if "gsm8k" in source.repository else kind
        return [Row("", of_split), Row("", of_split | {"text": f"{split} again?"})]

    monkeypatch.setattr(hub, "load", load)
    assert demonstrations.load("trec", 0).labels == ("place name",)
    assert demonstrations.load("clinc/clinc_oos", 0).name == "clinc150"
    assert demonstrations.load("gsm8k", 0).asked[0] == Example("test 1 + 1?", "2", "It is 2.")
    assert len(demonstrations.load("nlu", 0).asked) == 1


def test_no_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match="legacy-datasets/banking77 cannot be loaded"):
        demonstrations.load("banking77", 0)


##### Passages

TOWER, MILL, INN = (Passage(name, f"The {name} is old.") for name in ("tower", "mill", "inn"))
KEEPER = Passage("keeper", "Jonas Pell keeps it.")


def as_row(passage: Passage) -> dict[str, str]:
    return passage._asdict()


FORMS = [
    {"documents": [as_row(TOWER), as_row(KEEPER), as_row(MILL)], "gold_index": 1},
    {
        "ctxs": [
            as_row(TOWER) | {"isgold": False},
            as_row(KEEPER) | {"isgold": True, "hasanswer": True},
            as_row(MILL) | {"isgold": False},
        ]
    },
    {"gold": 7, "distractors": [3, 4]},
]


@pytest.mark.parametrize("form", FORMS, ids=["documents", "ctxs", "collection"])
def test_forms_of_questions(tmp_path: Path, form: dict[str, Any]) -> None:
    row = {"question": "Who keeps it?", "answers": ["Jonas Pell"], **form}
    numbered = [{"doc": number, **as_row(one)} for number, one in ((3, TOWER), (4, MILL))]
    numbered.append({"doc": 7, **as_row(KEEPER)})
    collection = written(tmp_path / "documents.jsonl", numbered)
    data = passages.load(written(tmp_path / "questions.jsonl.gz", [row]), collection)
    assert data.name == "questions"
    assert data.questions == (
        OpenQuestion("Who keeps it?", ("Jonas Pell",), KEEPER, (TOWER, MILL)),
    )
    assert set(data.collection) == {TOWER, MILL, KEEPER}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "no 'documents'"),
        ({"documents": [as_row(TOWER)], "gold_index": 1}, "'gold_index' is 1, of 1"),
        ({"documents": [{"title": "x"}], "gold_index": 0}, r"documents\[0\]: 'text'"),
        ({"ctxs": [as_row(TOWER)]}, "none of its 'ctxs'"),
        ({"gold": 1, "distractors": []}, "--collection is needed"),
        ({"documents": [as_row(TOWER)], "gold_index": 0, "answers": []}, "list of texts"),
    ],
)
def test_wrong_questions_are_named(tmp_path: Path, form: dict[str, Any], message: str) -> None:
    row = {"question": "q", "answers": ["a"], **form}
    with pytest.raises(DataError, match=message):
        passages.load(written(tmp_path / "questions.jsonl", [row]), None)


def test_numbers_that_the_collection_has_not(tmp_path: Path) -> None:
    row = {"question": "q", "answers": ["a"], "gold": 1, "distractors": [9]}
    collection = written(tmp_path / "documents.jsonl", [{"doc": 1, **as_row(TOWER)}])
    with pytest.raises(DataError, match="no document 9"):
        passages.load(written(tmp_path / "questions.jsonl", [row]), collection)


def test_ranking() -> None:
    others = [Passage(f"hill {i}", f"It is {100 + i} metres high.") for i in range(30)]
    tempting = Passage("rumour", "Some say that jonas  pell, did it.")
    question = OpenQuestion("Who?", ("Jonas Pell",), KEEPER, (MILL, tempting, TOWER, MILL))
    collection = [tempting, KEEPER, INN, MILL, *others]
    ranked = ranking(question, collection, 30, seed=0)
    assert ranked[:3] == [KEEPER, MILL, TOWER]
    assert len(set(ranked)) == 30
    assert not any(holds_answer(one, question.answers) for one in ranked[1:])
    assert ranking(question, collection, 30, seed=0) == ranked
    assert ranking(question, collection, 30, seed=1) != ranked
    for count in range(1, 30):
        assert ranking(question, collection, count, seed=0) == ranked[:count]
    with pytest.raises(DataError, match="34 documents without its answers, not 35"):
        ranking(question, collection, 35, seed=0)


##### Our own texts


def test_invented_requests() -> None:
    data = invented.requests(seed=5)
    assert data == invented.requests(seed=5)
    assert data != invented.requests(seed=6)
    assert len(data.labels) == 6
    assert not {one.text for one in data.pool} & {one.text for one in data.asked}
    assert set(Counter(one.answer for one in data.pool)) == set(data.labels)


def test_invented_places() -> None:
    data = invented.places(seed=5, documents=1500)
    assert data == invented.places(seed=5, documents=1500)
    assert len(set(data.collection)) == len({one.title for one in data.collection}) == 1500
    for question in data.questions[:50]:
        ranked = ranking(question, data.collection, 20, seed=0)
        assert [holds_answer(one, question.answers) for one in ranked] == [True] + 19 * [False]
    with pytest.raises(ValueError, match="names"):
        invented.places(seed=0, documents=1_000_000)
