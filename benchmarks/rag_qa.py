"""Open-domain questions over documents, from one document to hundreds of them.

Each question comes with the document that answers it and with others that do not: first those
that its data set lists for it, the best ones first, then others of the collection. None of them
holds an accepted answer. The order is shuffled with the seed.

Compared are no documents, one ordinary prompt with all of them and with the better half, parallel
encoding (T = S = 1) and APE. The document that answers counts as the best one, so the better half
always has it: this row stands for a perfect retriever, not for dropping documents at random. As a
control, all documents as one context at T = S = 1 must be answered as the ordinary prompt is.

Documents that are together longer than the model's window can be asked about with parallel
encoding and APE; the ordinary prompt is refused then, which the table shows. The server gets the
room that the longest question needs (--ape-max-context-tokens).

Data sets, for --data, are JSONL files (.gz is read too) with "question" and "answers", and with
- "documents" (objects with "title" and "text") and "gold_index";
- "ctxs", of which "isgold" marks one: the public lost-in-the-middle files; or
- "gold" and "distractors", numbers of documents in the file of --collection ("doc", "title",
  "text").

Two more forms, of facts instead of documents, stand in benchmarks/common/passages.py.

  python -m benchmarks.rag_qa --quick
  python -m benchmarks.rag_qa --model MODEL --chat --data FILE --documents 1 10 50

The server's cache is emptied again and again.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import invented, passages
from benchmarks.common.data import DataError
from benchmarks.common.options import parser_of
from benchmarks.common.passages import OpenQuestion, OpenQuestions, Passage
from benchmarks.common.prompts import Encoder
from benchmarks.common.quality import (
    Level,
    Question,
    Subject,
    Task,
    add_quality_options,
    complete_quality_options,
    first_line,
    run,
)
from benchmarks.common.scores import every_span_match, exact_match, f1, sub_span_match
from benchmarks.common.script import exit_status

NAME = "rag_qa"
DOCUMENTS, QUICK_DOCUMENTS = [1, 10, 50], [1, 4, 16]
QUICK_WINDOW = 1024  # less than the documents of the last level hold
QUICK_COLLECTION = 32
QUICK_QUESTIONS = 6
INSTRUCTION = (
    "Read the documents, if there are any, and answer the question with a name, a number or a few "
    "words.\n\n"
)
SCORES = {"sub-span": sub_span_match, "exact": exact_match, "F1": f1}
SCORES_OF_ALL = {"every span": every_span_match}


def shown(passage: Passage) -> str:
    """A document as a context."""
    heading = f"Document: {passage.title}\n" if passage.title else "Document:\n"
    return f"{heading}{passage.text}\n\n"


def question(
    encoder: Encoder,
    one: OpenQuestion,
    collection: Sequence[Passage],
    count: int,
    seed: int,
    warm: Sequence[Passage] = (),
) -> Question:
    """A question over so many documents, in a random order; none for the level without any."""
    ranked = passages.ranking(one, collection, count, seed) if count else []
    order = random.Random(f"order {seed} {count} {one.text}").sample(range(count), count)
    better = (count + 1) // 2
    return Question(
        text=one.text,
        prompt=encoder.prompt(
            INSTRUCTION,
            [shown(ranked[rank]) for rank in order],
            f"Question: {one.text}\nAnswer:",
            "".join(map(shown, warm)),
        ),
        half=tuple(place for place, rank in enumerate(order) if rank < better),
        accepted=one.answers,
        gold=tuple(place for place, rank in enumerate(order) if rank < len(one.needed)),
    )


def chosen(data: OpenQuestions, args: argparse.Namespace) -> list[OpenQuestion]:
    """The questions that are asked, at all levels the same.

    Raises:
        DataError: there are fewer.
    """
    if args.questions is None:
        return list(data.questions)
    if args.questions > len(data.questions):
        raise DataError(f"{data.name} has {len(data.questions)} questions, not {args.questions}")
    return random.Random(f"questions {args.seed}").sample(data.questions, args.questions)


def level(encoder: Encoder, data: OpenQuestions, count: int, args: argparse.Namespace) -> Level:
    """All questions over so many documents."""
    warm = data.form.warm[: args.warm_items]
    asked = [
        question(encoder, one, data.collection, count, args.seed, warm)
        for one in chosen(data, args)
    ]
    return Level(count, f"{count} document{'' if count == 1 else 's'}", asked, reordered=True)


def subject(data: OpenQuestions, args: argparse.Namespace, counts: Sequence[int]) -> Subject:
    """A data set at some numbers of documents, and at none."""
    sampling = {
        "max_new_tokens": data.form.answer_tokens,
        "stop": [] if args.chat else ["\n"],
    }
    task = Task(SCORES_OF_ALL if data.form.needs_all else SCORES, first_line, sampling)

    def levels(encoder: Encoder) -> list[Level]:
        return [level(encoder, data, count, args) for count in sorted({0, *counts})]

    return Subject(data.name, "documents", task, levels)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of(f"benchmarks.{NAME}", __doc__)
    add = parser.add_argument
    add("--data", nargs="+", type=Path, help="files (with --quick: documents of our own making)")
    add("--collection", type=Path, help="file of the documents that --data has numbers of")
    add(
        "--documents", nargs="+", type=int, help=f"default: {DOCUMENTS}; --quick: {QUICK_DOCUMENTS}"
    )
    add_quality_options(parser, NAME)
    args = parser.parse_args(argv)
    if args.documents is None:
        args.documents = QUICK_DOCUMENTS if args.quick else DOCUMENTS
    if min(args.documents) < 0:
        parser.error("--documents must not be negative")
    complete_quality_options(args, parser, QUICK_QUESTIONS)
    return args, parser


def main(argv: Sequence[str] | None = None) -> None:
    args, parser = parse(argv)
    if args.data:
        found = [passages.load(path, args.collection) for path in args.data]
    else:
        found = [invented.places(args.seed, QUICK_COLLECTION)]
    flags = ["--context-length", str(QUICK_WINDOW)] if args.quick else []
    run(args, parser, NAME, [subject(data, args, args.documents) for data in found], flags)


if __name__ == "__main__":
    sys.exit(exit_status(main))
