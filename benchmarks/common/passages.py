"""Data of open-domain questions: documents, one that answers and others that do not."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import forms
from benchmarks.common.bm25 import Index
from benchmarks.common.data import DataError, Row, read_jsonl
from benchmarks.common.forms import Form
from benchmarks.common.forms import Passage as Passage
from benchmarks.common.scores import holds, normalised

HARD = 64  # hard negatives of a question


class OpenQuestion(NamedTuple):
    """A question over documents.

    Attributes:
        text: the question.
        answers: the accepted ones.
        gold: the document that answers it.
        distractors: documents that a retriever would have found beside it, the best ones first.
        also: further documents without which the answer cannot be known.
    """

    text: str
    answers: tuple[str, ...]
    gold: Passage
    distractors: tuple[Passage, ...]
    also: tuple[Passage, ...] = ()

    @property
    def needed(self) -> tuple[Passage, ...]:
        return (self.gold, *self.also)


class OpenQuestions(NamedTuple):
    """A data set; what the questions' own distractors do not fill comes from the collection."""

    name: str
    questions: tuple[OpenQuestion, ...]
    collection: tuple[Passage, ...]
    form: Form = forms.DOCUMENTS


def load(path: Path, collection: Path | None) -> OpenQuestions:
    """A data set of a JSONL file, in one of five forms, which its first row tells apart.

    Three have ``question`` and ``answers`` (a list). Documents are objects with ``title`` and
    ``text``, and stand in

    - ``documents``, with the index of the one that answers in ``gold_index``;
    - ``ctxs``, where ``isgold`` marks the one that answers: the public lost-in-the-middle files;
    - a file of their own, the collection, with their number in ``doc``; ``gold`` and
      ``distractors`` of a question are such numbers.

    In the first two, documents that do not answer rank as they stand, and those of all questions
    are the collection. Two have facts instead of documents, those of each question its own:

    - ``contexts``, objects with ``name`` and ``code``, and in ``target`` the index of the one that
      is asked for;
    - ``records``, pairs of a key and a value, and in ``key`` the one that is asked for.

    Args:
        path: the questions; ``.gz`` is decompressed.
        collection: the documents of the third form.

    Raises:
        DataError: a row is different.
    """
    rows = read_jsonl(path)
    name = path.name.split(".")[0]
    first = rows[0].values
    if "gold" in first and "distractors" in first:
        if collection is None:
            raise DataError(f"{path.name} names documents by number: --collection is needed")
        return _of_collection(name, rows, read_jsonl(collection))
    if "records" in first:
        return OpenQuestions(name, tuple(map(_of_records, rows)), (), forms.KEYS)
    if "contexts" in first and "target" in first:
        return OpenQuestions(name, tuple(map(_of_codes, rows)), (), forms.CODES)
    read = _indexed if "documents" in first else _marked if "ctxs" in first else None
    if read is None:
        raise DataError(
            f"{rows[0].where}: no 'documents', 'ctxs', 'records', 'contexts' and 'target', or "
            "'gold' and 'distractors'"
        )
    questions = tuple(map(read, rows))
    everything = (one for question in questions for one in (question.gold, *question.distractors))
    return OpenQuestions(name, questions, tuple(dict.fromkeys(everything)))


def ranking(
    question: OpenQuestion, collection: Sequence[Passage], count: int, seed: int
) -> list[Passage]:
    """Documents for a question, the best ones first.

    Those that the answer needs come first, then the question's own distractors, then other
    documents of the collection at random. None but the first ones holds an accepted answer, and
    none comes twice. Fewer documents are always a beginning of more.

    Args:
        question: the question.
        collection: where further documents come from.
        count: how many documents.
        seed: of the random ones.

    Raises:
        DataError: there are not enough.
    """
    drawn = random.Random(f"others {seed} {question.text}")
    chosen = [*question.needed]
    if count < len(chosen):
        raise DataError(
            f"{question.text!r:.80} needs {len(chosen)} documents, {count} are not enough"
        )
    for passage in chain(question.distractors, drawn.sample(collection, len(collection))):
        if len(chosen) == count:
            break
        if passage not in chosen and not holds_answer(passage, question.answers):
            chosen.append(passage)
    if len(chosen) < count:
        raise DataError(
            f"{question.text!r:.80}: {len(chosen)} documents without its answers, not {count}"
        )
    return chosen


def with_hard_negatives(data: OpenQuestions) -> OpenQuestions:
    """The data set with other distractors: those that look most like the answer's document.

    They are the documents that BM25 ranks highest for the question together with the titles of the
    documents that it needs, of all documents of the collection (where there is none, of the
    question's own), less those that hold an accepted answer. Other documents of the same title, of
    which a long article has many, thus come first.

    Args:
        data: whose questions' own distractors are replaced, by up to :data:`HARD`.
    """
    if not data.collection:
        questions = [_harder(one, (*one.needed, *one.distractors), None) for one in data.questions]
        return data._replace(questions=tuple(questions))
    index = _index(data.collection)
    questions = [_harder(one, data.collection, index) for one in data.questions]
    return data._replace(questions=tuple(questions))


def _index(passages: Sequence[Passage]) -> Index:
    return Index([f"{passage.title} {passage.text}" for passage in passages])


def _harder(
    question: OpenQuestion, passages: Sequence[Passage], index: Index | None
) -> OpenQuestion:
    query = " ".join([question.text, *(passage.title for passage in question.needed)])
    ranked = (passages[i] for i in (index or _index(passages)).ranked(query))
    others = (
        passage
        for passage in dict.fromkeys(ranked)
        if passage not in question.needed and not holds_answer(passage, question.answers)
    )
    return question._replace(distractors=tuple(itertools.islice(others, HARD)))


def holds_answer(passage: Passage, answers: Iterable[str]) -> bool:
    """Whether an answer stands in a document's title or text, after normalisation."""
    return holds(_words(passage), answers)


@functools.cache
def _words(passage: Passage) -> str:
    return normalised(f"{passage.title} {passage.text}")


def _passage(row: Row) -> Passage:
    title = row.get("title", str) if row.values.get("title") else ""
    return Passage(title, row.get("text", str))


def _question(row: Row, gold: Passage, distractors: Iterable[Passage]) -> OpenQuestion:
    return OpenQuestion(row.get("question", str), row.texts("answers"), gold, tuple(distractors))


def _indexed(row: Row) -> OpenQuestion:
    passages = [_passage(one) for one in row.rows("documents")]
    gold = row.get("gold_index", int)
    if not 0 <= gold < len(passages):
        raise DataError(f"{row.where}: 'gold_index' is {gold}, of {len(passages)} documents")
    return _question(row, passages[gold], passages[:gold] + passages[gold + 1 :])


def _marked(row: Row) -> OpenQuestion:
    rows = row.rows("ctxs")
    gold = [i for i, one in enumerate(rows) if one.values.get("isgold") is True]
    if not gold:
        raise DataError(f"{row.where}: none of its 'ctxs' has 'isgold'")
    others = [_passage(one) for i, one in enumerate(rows) if i != gold[0]]
    return _question(row, _passage(rows[gold[0]]), others)


def _of_codes(row: Row) -> OpenQuestion:
    facts = [(one.get("name", str), one.get("code", str)) for one in row.rows("contexts")]
    target = row.get("target", int)
    if not 0 <= target < len(facts):
        raise DataError(f"{row.where}: 'target' is {target}, of {len(facts)} contexts")
    passages = [Passage("", forms.code_sentence(*fact)) for fact in facts]
    name, code = facts[target]
    text = f"What is the secret code of the {name}?"
    others = passages[:target] + passages[target + 1 :]
    return OpenQuestion(text, (code,), passages[target], tuple(others))


def _of_records(row: Row) -> OpenQuestion:
    key, pairs = row.get("key", str), row.get("records", list)
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in pairs
    ):
        raise DataError(f"{row.where}: 'records' must be a list of pairs of texts")
    values = [value for own, value in pairs if own == key]
    if len(values) != 1:
        raise DataError(f"{row.where}: {len(values)} of its 'records' have the key {key!r}")
    others = tuple(Passage("", forms.key_line(*pair)) for pair in pairs if pair[0] != key)
    gold = Passage("", forms.key_line(key, values[0]))
    return OpenQuestion(f'What is the value of the key "{key}"?', (values[0],), gold, others)


def _of_collection(name: str, rows: Sequence[Row], documents: Sequence[Row]) -> OpenQuestions:
    passages = {row.get("doc", int): _passage(row) for row in documents}
    questions = []
    for row in rows:
        numbers = [row.get("gold", int), *row.get("distractors", list)]
        missing = [number for number in numbers if number not in passages]
        if missing:
            raise DataError(f"{row.where}: the collection has no document {missing[0]!r}")
        gold, *distractors = (passages[number] for number in numbers)
        questions.append(_question(row, gold, distractors))
    return OpenQuestions(name, tuple(questions), tuple(passages.values()))
