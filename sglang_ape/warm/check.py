"""Which proposed items are good: of the corpus's length, and not copied from it.

Pure functions of texts. A copy would answer questions that the contexts should answer.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SHARED_WORDS = 8
"""So many words in a row that also stand in the corpus make an item a copy of it."""

_FORM_SHARE = 0.1  # of the documents: words in a row that so many have belong to the format
_LEAST_OF_FORM = 2
# Letters of scripts without blanks count as words.
# Two words with capitals, one blank between them; overlapping.
_NAME = re.compile(r"\b(?=([A-Z]\w* [A-Z]\w*))")
_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7a3]|[^\W\u3040-\u9fff\uac00-\ud7a3]+")

Gram = tuple[str, ...]


class Lengths(NamedTuple):
    """Characters that an item may have."""

    least: int
    most: int


def lengths_like(texts: Sequence[str]) -> Lengths:
    """From half to twice the median of some texts."""
    median = statistics.median(map(len, texts))
    return Lengths(int(median / 2), int(2 * median))


def off_length(item: str, allowed: Lengths) -> str | None:
    """Why an item is too short or too long, None if it is neither."""
    if not item.strip():
        return "empty"
    if not allowed.least <= len(item) <= allowed.most:
        side = "short" if len(item) < allowed.least else "long"
        return f"too {side}: {len(item)} characters, not {allowed.least} to {allowed.most}"
    return None


def copied(items: Sequence[str], corpus: Sequence[str]) -> list[str | None]:
    """For each item, words in a row that it shares with the corpus or an item before it.

    Case and punctuation do not count. What a tenth of the corpus has in common, and at least two
    documents, is its format and no copy. An item too short for :data:`SHARED_WORDS` is a copy if
    all its words stand in a row somewhere.

    Args:
        items: texts; one pass over the corpus serves all of them.
        corpus: texts.

    Returns:
        The words, or None for an item that shares none.
    """
    grams = [_grams_of(item) for item in items]
    found = _count(grams, corpus)
    form = _form(corpus)
    shared: list[str | None] = []
    before: set[Gram] = set()
    for own in grams:
        copies = (gram for gram in own if 0 < found[gram] < form or gram in before)
        first = next(copies, None)
        shared.append(None if first is None else " ".join(first))
        before.update(gram for gram in own if not found[gram])
    return shared


def named(items: Sequence[str], corpus: Sequence[str]) -> list[str | None]:
    """For each item, a name of the corpus that it holds: two words with capitals, as "Sable Pass".

    Names that belong to the format, as in :func:`copied`, do not count.

    Args:
        items: texts.
        corpus: texts.

    Returns:
        The name, or None for an item with none.
    """
    counts = Counter(name for text in corpus for name in set(_NAME.findall(text)))
    form = _form(corpus)
    found = ((name for name in _NAME.findall(item) if 0 < counts[name] < form) for item in items)
    return [next(names, None) for names in found]


def _form(corpus: Sequence[str]) -> float:
    """In so many documents, words belong to the format."""
    return max(_LEAST_OF_FORM, _FORM_SHARE * len(corpus))


def _count(grams: Sequence[list[Gram]], corpus: Sequence[str]) -> Counter[Gram]:
    """How many texts of the corpus have each of the words in a row."""
    wanted: dict[int, set[Gram]] = {}  # by their number of words
    for gram in (gram for own in grams for gram in own):
        wanted.setdefault(len(gram), set()).add(gram)
    counts: Counter[Gram] = Counter()
    for text in corpus:
        words = words_of(text)
        for size, sought in wanted.items():
            counts.update(sought.intersection(_in_a_row(words, size)))
    return counts


def _grams_of(item: str) -> list[Gram]:
    words = words_of(item)
    return list(_in_a_row(words, min(SHARED_WORDS, len(words)))) if words else []


def _in_a_row(words: Sequence[str], size: int) -> Iterator[Gram]:
    return (tuple(words[at : at + size]) for at in range(len(words) - size + 1))


def words_of(text: str) -> list[str]:
    """Words in lower case."""
    return _WORD.findall(text.lower())
