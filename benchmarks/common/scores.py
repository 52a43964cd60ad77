"""Scores of an answer against the accepted ones; texts are compared after normalisation.

The normalisation is that of open-domain question answering: lower case, no punctuation, no English
article, single blanks.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones."""
    return float(normalised(answer) in map(normalised, accepted))


def sub_span_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer stands somewhere in this one, as whole words."""
    words = f" {normalised(answer)} "
    spans = [f" {normalised(text)} " for text in accepted]
    return float(any(span.strip() and span in words for span in spans))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall, over words as often as they occur."""
    return max(_f1(normalised(answer).split(), normalised(text).split()) for text in accepted)


def same_number(answer: str, accepted: Sequence[str]) -> float:
    """1 if the last number of the answer is the accepted one; for chains of thought."""
    found = _NUMBER.findall(answer)
    return float(bool(found) and _number(found[-1]) in map(_number, accepted))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _f1(answer: list[str], accepted: list[str]) -> float:
    common = (Counter(answer) & Counter(accepted)).total()
    return 2 * common / (len(answer) + len(accepted)) if common else 0.0


Score = Callable[[str, Sequence[str]], float]
