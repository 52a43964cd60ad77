"""Many-shot learning: classification, and grade-school mathematics with a chain of thought.

Each question comes with a number of demonstrations, a few of them in each context. The
demonstrations and the label map, which the instruction names, are the same for all questions of a
level, in the same order. A server thus computes them once and reuses them from request to request:
APE does, and so does ordinary prefix caching. More shots are always the fewer ones and further
ones; each beginning is balanced over the labels as far as the data allows.

Compared are no demonstrations, one ordinary prompt with all of them and with the first half of the
contexts, parallel encoding (T = S = 1) and APE. As a control, all demonstrations as one context at
T = S = 1 must be answered as the ordinary prompt is.

Data sets, for --data, are names on the Hugging Face hub (banking77, clinc150, trec, trec-fine, nlu,
gsm8k, or the repository that stands for it in benchmarks/common/hub.py) or JSONL files. Their rows
have "text" and "label", or "question" and "answer" (with the chain of thought in "solution", or
before "####"), and "split": "pool" or "train" to show, "dev", "validation" or "test" to ask.
Without "split" a tenth is asked. A data set that cannot be loaded is reported and left out.

  python -m benchmarks.many_shot_icl --quick
  python -m benchmarks.many_shot_icl --model MODEL --chat --data banking77 gsm8k --shots 0 8 64 256

The server's cache is emptied again and again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common import demonstrations, invented
from benchmarks.common.data import Unavailable
from benchmarks.common.demonstrations import Example, Examples
from benchmarks.common.forms import warm_examples
from benchmarks.common.options import parser_of
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
from benchmarks.common.scores import exact_match, same_number
from benchmarks.common.script import exit_status

NAME = "many_shot_icl"
SHOTS, QUICK_SHOTS = [0, 8, 64, 256], [0, 8, 24]
PER_CONTEXT, QUICK_PER_CONTEXT = 8, 4
QUICK_QUESTIONS = 16
LABEL_TOKENS = 24
LEAD = "Label:"
SOLUTION_TOKENS = 320


def shown(example: Example, labels: Sequence[str]) -> str:
    """A demonstration, with its answer."""
    if labels:
        return f"{asked(example, labels)} {example.answer}\n\n"
    return f"{asked(example, labels)} {example.solution}\nThe answer is {example.answer}.\n\n"


def asked(example: Example, labels: Sequence[str]) -> str:
    """The same without its answer: what the model goes on from."""
    return f"Text: {example.text}\n{LEAD}" if labels else f"Problem: {example.text}\nSolution:"


def label_of(answer: str) -> str:
    """The label in an answer; a chat model likes to repeat what the question ends with."""
    return first_line(answer).removeprefix(LEAD).strip()


def instruction(labels: Sequence[str]) -> str:
    """What stands before all demonstrations."""
    if labels:
        return f"Give each text one of these labels: {', '.join(labels)}.\n\n"
    return 'Solve each problem step by step. End with "The answer is" and the number.\n\n'


def contexts(shots: Sequence[Example], labels: Sequence[str], per_context: int) -> list[str]:
    """Demonstrations, so many to a context; the last one may have fewer."""
    texts = [shown(example, labels) for example in shots]
    starts = range(0, len(texts), per_context)
    return ["".join(texts[start : start + per_context]) for start in starts]


def task(data: Examples, chat: bool) -> Task:
    """How answers are read and scored; a chat model ends its answer by itself."""
    if data.labels:
        stop = [] if chat else ["\n"]
        sampling = {"max_new_tokens": LABEL_TOKENS, "stop": stop}
        return Task({"exact match": exact_match}, label_of, sampling)
    sampling = {"max_new_tokens": SOLUTION_TOKENS, "stop": [] if chat else ["Problem:"]}
    return Task({"last number": same_number}, str.strip, sampling)


def level(encoder: Encoder, data: Examples, shots: int, args: argparse.Namespace) -> Level:
    """All questions after so many demonstrations."""
    chosen = demonstrations.first_shots(data, shots, args.seed)
    texts = contexts(chosen, data.labels, args.per_context)
    half = tuple(range((len(texts) + 1) // 2))
    items = warm_examples(data.labels)[: args.warm_items]
    warm = "".join(shown(example, data.labels) for example in items)
    questions = [
        Question(
            text=example.text,
            prompt=encoder.prompt(
                instruction(data.labels), texts, asked(example, data.labels), warm
            ),
            half=half,
            accepted=(example.answer,),
        )
        for example in demonstrations.questions(data, args.questions, args.seed)
    ]
    name = f"{shots} shots in {len(texts)}" if shots else "0 shots"
    return Level(shots, name, questions, reordered=False)


def subject(data: Examples, args: argparse.Namespace) -> Subject:
    """A data set at all numbers of shots, none included."""

    def levels(encoder: Encoder) -> list[Level]:
        return [level(encoder, data, shots, args) for shots in sorted({0, *args.shots})]

    return Subject(data.name, "shots", task(data, args.chat), levels)


def load(args: argparse.Namespace) -> list[Examples]:
    """All data sets that can be had.

    Raises:
        DataError: one is not what it should be.
        Unavailable: none can be had.
    """
    if not args.data:
        return [invented.requests(args.seed)]
    found = []
    for given in args.data:
        try:
            found.append(demonstrations.load(given, args.seed))
        except Unavailable as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
    if not found:
        raise Unavailable("no data set could be loaded, nothing was measured")
    return found


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of(f"benchmarks.{NAME}", __doc__)
    add = parser.add_argument
    add("--data", nargs="+", help="names or JSONL files (with --quick: requests of our own making)")
    add("--shots", nargs="+", type=int, help=f"default: {SHOTS}; --quick: {QUICK_SHOTS}")
    add(
        "--per-context",
        type=int,
        help=f"demonstrations in a context (default: {PER_CONTEXT}; --quick: {QUICK_PER_CONTEXT})",
    )
    add_quality_options(parser, NAME)
    args = parser.parse_args(argv)
    if args.shots is None:
        args.shots = QUICK_SHOTS if args.quick else SHOTS
    if args.per_context is None:
        args.per_context = QUICK_PER_CONTEXT if args.quick else PER_CONTEXT
    if min(args.shots) < 0 or args.per_context < 1:
        parser.error("--shots must not be negative, --per-context must be positive")
    complete_quality_options(args, parser, QUICK_QUESTIONS)
    return args, parser


def main(argv: Sequence[str] | None = None) -> None:
    args, parser = parse(argv)
    run(args, parser, NAME, [subject(data, args) for data in load(args)])


if __name__ == "__main__":
    sys.exit(exit_status(main))
