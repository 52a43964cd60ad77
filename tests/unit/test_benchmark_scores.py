"""Scores of the quality benchmarks, case by case."""

import pytest

from benchmarks.common.quality import first_line
from benchmarks.common.scores import (
    exact_match,
    f1,
    is_number,
    normalised,
    same_number,
    sub_span_match,
)
from benchmarks.many_shot_icl import label_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Brae Hill, Library!", "brae hill library"),
        ("an apple a day", "apple day"),
        ("theatre and another", "theatre and another"),
        ("A", "a"),
        ("the a", "the a"),
        ("", ""),
        ("...", ""),
    ],
)
def test_normalised(text: str, words: str) -> None:
    assert normalised(text) == words
    assert normalised(normalised(text)) == words


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "sub_span"),
    [
        ("Jonas Pell", ["Jonas Pell"], 1, 1),
        ("the jonas pell.", ["Agda", "Jonas Pell"], 1, 1),
        ("It is Jonas Pell", ["Jonas Pell"], 0, 1),
        ("Jonas Pellman", ["Jonas Pell"], 0, 0),
        ("42 metres", ["4"], 0, 0),
        ("", ["The"], 0, 0),
        ("", ["Jonas"], 0, 0),
        ("Group A", ["A"], 0, 0),  # the article is dropped beside other words: a known loss
        ("A", ["A"], 1, 1),
    ],
)
def test_matches(answer: str, accepted: list[str], exact: int, sub_span: int) -> None:
    assert exact_match(answer, accepted) == exact
    assert sub_span_match(answer, accepted) == sub_span


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("red blue", ["red blue"], 1.0),
        ("red", ["red blue"], 2 / 3),
        ("red red", ["red"], 2 / 3),
        ("green", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("red", ["blue", "the red"], 1.0),
    ],
)
def test_f1(answer: str, accepted: list[str], score: float) -> None:
    assert f1(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("2 + 3 = 5\nThe answer is 5.", "5", 1),
        ("The answer is 1,234", "1234", 1),
        ("The answer is 1234.00", "1,234", 1),
        ("#### 18", "18", 1),
        ("$18.50 in all", "18.5", 1),
        ("it falls to -7", "-7", 1),
        ("between 10-12", "12", 1),
        ("between 10-12", "-12", 0),
        ("on days 1, 2, 3", "3", 1),
        ("5, then 6", "5", 0),
        ("12,34", "34", 1),
        ("none", "0", 0),
        ("", "0", 0),
    ],
)
def test_same_number(answer: str, accepted: str, score: int) -> None:
    assert same_number(answer, [accepted]) == score


@pytest.mark.parametrize(("text", "is_one"), [("18", True), ("-1,000.5", True), ("18 km", False)])
def test_is_number(text: str, is_one: bool) -> None:
    assert is_number(text) is is_one


@pytest.mark.parametrize(
    ("text", "line"), [(" red \nblue", "red"), ("\n\nred", "red"), ("", ""), (" \n", "")]
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text) == line


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Label: card arrival\n\nText: more", "card arrival"),
        (" card arrival", "card arrival"),
        ("Labels: two", "Labels: two"),
        ("", ""),
    ],
)
def test_a_label_may_be_led_in_as_the_question_ends(text: str, label: str) -> None:
    assert label_of(text) == label
