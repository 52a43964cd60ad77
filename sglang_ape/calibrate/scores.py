"""Right or wrong: a generated answer against the labels of its row.

Texts are compared as in open-domain question answering, SQuAD's way of normalising them: lower
case, no punctuation, no English article, single blanks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, get_args

Metric = Literal["span", "exact"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    letters = (c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLE.sub(" ", "".join(letters)).split())


def is_right(text: str, answers: Sequence[str], metric: Metric) -> bool:
    """Whether a label is in the text as whole words (``span``), or is all of it (``exact``).

    A label that normalises to nothing, such as "The", is compared as it is.
    """
    for answer in answers:
        wanted, given = normalised(answer), normalised(text)
        if not wanted:
            wanted, given = answer.strip(), text.strip()
        if given == wanted or (metric == "span" and f" {wanted} " in f" {given} "):
            return True
    return False
