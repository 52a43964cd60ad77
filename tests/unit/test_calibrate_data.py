"""The validation file: what is taken, what is refused by its line, and how it is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape.calibrate import quick
from sglang_ape.calibrate.data import Example, InputError, Line, divide, load

ROW: dict[str, Any] = {"contexts": ["a", "b"], "query": "q"}
CHAT: dict[str, Any] = {"contexts": ["a"], "messages": [{"role": "user", "content": "q"}]}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    return str(caught.value)


def test_all_forms_of_rows_are_taken_and_blank_lines_left_out(tmp_path: Path) -> None:
    full = {**ROW, "prefix": "", "answers": ["x"]}
    lines = load(written(tmp_path, ROW, "", full, "  ", CHAT))
    assert [line.number for line in lines] == [1, 3, 5]
    assert lines[1].example.prefix == ""
    assert lines[1].example.answers == ["x"]
    assert lines[2].example.query is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object, got list"),
        ({"query": "q"}, "contexts: Field required"),
        ({**ROW, "contexts": []}, "contexts: "),
        ({**ROW, "contexts": ["a", ""]}, "contexts.1: "),
        ({**ROW, "contexts": "a"}, "contexts: "),
        ({**ROW, "query": ""}, "query: "),
        ({**ROW, "answer": ["x"]}, "answer: Extra inputs"),
        ({**ROW, "answers": []}, "answers: "),
        ({**ROW, "answers": "x"}, "answers: "),
        ({**ROW, "split": "test"}, "split: "),
        ({"contexts": ["a"]}, "give either query or messages"),
        ({**ROW, **CHAT}, "give either query or messages"),
        ({**CHAT, "prefix": "P"}, "prefix cannot stand beside messages"),
        ({"contexts": ["a"], "messages": [{"role": "system", "content": "s"}]}, "user message"),
        ({"contexts": ["a"], "messages": [{"role": "user"}]}, "messages.0.content: "),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, row: Any, reason: str) -> None:
    path = written(tmp_path, ROW, row)
    message = refusal(path)
    assert message.startswith(f"{path}, line 2: ")
    assert reason in message


def test_all_wrong_lines_are_named_up_to_a_number(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, *["{"] * 13))
    assert message.count("line ") == 10
    assert message.endswith("and 3 further lines")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "holds no row" in refusal(written(tmp_path, ""))


def test_a_split_in_some_rows_alone_is_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, {**ROW, "split": "validation"}, ROW))
    assert "line 2: split is missing" in message


def of(count: int, **fields: Any) -> list[Line]:
    return [Line(number, Example(**ROW, **fields)) for number in range(1, count + 1)]


@given(count=st.integers(1, 40), share=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_a_shuffle_divides_into_two_parts_that_hold_all(
    count: int, share: float, seed: int
) -> None:
    lines = of(count)
    parts = divide(lines, share, seed)
    assert parts == divide(lines, share, seed)
    numbers = [line.number for part in parts for line in part]
    assert sorted(numbers) == list(range(1, count + 1))
    assert parts.validation
    assert abs(len(parts.held_out) - share * count) <= 1
    for part in parts:
        assert [line.number for line in part] == sorted(line.number for line in part)


def test_another_seed_divides_otherwise() -> None:
    assert divide(of(40), 0.5, 0) != divide(of(40), 0.5, 1)


def test_the_rows_own_split_goes_before_the_shuffle() -> None:
    lines = [*of(2, split="held_out"), Line(3, Example(**ROW, split="validation"))]
    parts = divide(lines, 0.9, 0)
    assert [line.number for line in parts.validation] == [3]
    assert [line.number for line in parts.held_out] == [1, 2]


def test_rows_that_are_all_held_out_leave_nothing_to_choose_on() -> None:
    with pytest.raises(InputError, match="validation"):
        divide(of(2, split="held_out"), 0.5, 0)


def test_the_quick_rows_have_their_answer_in_one_context() -> None:
    lines = quick.lines(3)
    assert lines == quick.lines(3) != quick.lines(4)
    assert len(lines) == quick.ROWS
    for line in lines:
        example = line.example
        assert example.answers is not None
        assert sum(example.answers[0] in context for context in example.contexts) == 1
        assert example.answers[0] not in (example.query or "")
