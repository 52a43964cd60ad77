"""Scores of an answer against the accepted ones; texts are compared after normalisation.

The normalisation is that of open-domain question answering: lower case, no punctuation, no English
article, single blanks.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus between digits is a dash; a comma belongs to a number only before three digits.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def normalised(text: str) -> str:
    """Words of a text; of one that consists of articles alone, these."""
    words = text.lower().translate(_PUNCTUATION).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones."""
    return float(normalised(answer) in map(normalised, accepted))


def sub_span_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer stands somewhere in this one, as whole words."""
    return float(holds(normalised(answer), accepted))


def every_span_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if each of the given texts stands somewhere in this one, as whole words."""
    words = normalised(answer)
    return float(all(holds(words, [text]) for text in accepted))


def holds(words: str, accepted: Iterable[str]) -> bool:
    """Whether an accepted answer stands in a text that is normalised already."""
    spans = (normalised(text) for text in accepted)
    return any(span and f" {span} " in f" {words} " for span in spans)


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall, over words as often as they occur."""
    return max(_f1(normalised(answer).split(), normalised(text).split()) for text in accepted)


def same_number(answer: str, accepted: Sequence[str]) -> float:
    """1 if the last number of the answer is the accepted one; for chains of thought."""
    found = _NUMBER.findall(answer)
    return float(bool(found) and _number(found[-1]) in map(_number, accepted))


def is_number(text: str) -> bool:
    """Whether a text is a number as :func:`same_number` reads it."""
    return bool(_NUMBER.fullmatch(text))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _f1(answer: list[str], accepted: list[str]) -> float:
    common = (Counter(answer) & Counter(accepted)).total()
    return 2 * common / (len(answer) + len(accepted)) if common else 0.0


Score = Callable[[str, Sequence[str]], float]
