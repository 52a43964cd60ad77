"""Right and wrong answers."""

from __future__ import annotations

import pytest

from sglang_ape.calibrate.scores import is_right, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Heron.", "heron"),
        ("“An owl” — a lark!", "owl lark"),
        ("Theatre", "theatre"),
        ("3.5", "35"),
        ("THE", ""),
    ],
)
def test_case_punctuation_articles_and_blanks_do_not_count(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "answers", "span", "exact"),
    [
        ("the Heron", ["Heron"], True, True),
        ("It was the Heron, on Monday", ["Lark", "heron"], True, False),
        ("in 1857", ["185"], False, False),
        ("Herons", ["Heron"], False, False),
        ("", ["Heron"], False, False),
        ("nothing", ["The"], False, False),
        ("The", ["The"], True, True),
        ("x b c", ["b c"], True, False),
    ],
)
def test_a_label_counts_as_whole_words_or_as_all_of_it(
    text: str, answers: list[str], span: bool, exact: bool
) -> None:
    assert is_right(text, answers, "span") == span
    assert is_right(text, answers, "exact") == exact
