"""The quality ladder: what each rung above plain parallel encoding brings, and what it costs.

The same questions are asked as one ordinary prompt, with parallel encoding (T = S = 1), APE, and
APE with soft (--soft), refine (--refine), warm (--warm-items) and warm + soft. Each is compared
with APE and with the ordinary prompt, question by question: mean difference, its 95 % interval
from a bootstrap over questions, and an exact sign test. Counted beside it are the tokens that were
prefilled to score contexts and to refine them, and how often the context with the answer scored
highest.

As controls, all contexts refined must be answered as the ordinary prompt is, soft with a λ that
moves nothing (1e-9; 0 where the server does not compute in fp32) as APE is, and a few scores must
be those of a dense computation. The command ends with status 1 if not.

Data sets, for --data:
- "places", "two-codes", "two-hops" and "requests" are of our own making: documents on invented
  places, questions that need two facts (both named in the question; the second named in the first
  only), and classification;
- JSONL files of questions over documents or facts, as benchmarks.rag_qa reads them: also "contexts"
  (objects with "name" and "code") with "target", and "records" (pairs) with "key";
- names and JSONL files of demonstrations, as benchmarks.many_shot_icl reads them.

With --negatives hard, questions over documents get other distractors: the documents that BM25
(k1 = 1.2, b = 0.75, over all documents of the collection, titles included) ranks highest for the
question together with the answer's title, less those that hold an accepted answer. Distractors of
the same title as the answer's document are thus among them.

Warm items are invented, in the form of the contexts, and no rows of the data.

  python -m benchmarks.ladder --quick
  python -m benchmarks.ladder --model MODEL --chat --data FILE banking77 two-hops

The server's cache is emptied again and again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import many_shot_icl, rag_qa
from benchmarks.common import demonstrations, hub, invented, passages
from benchmarks.common.data import DataError, Unavailable, read_jsonl
from benchmarks.common.demonstrations import Examples
from benchmarks.common.methods import LADDER
from benchmarks.common.options import parser_of
from benchmarks.common.passages import OpenQuestions
from benchmarks.common.quality import Subject, add_quality_options, complete_quality_options, run
from benchmarks.common.script import exit_status

NAME = "ladder"
DOCUMENTS, QUICK_DOCUMENTS = [5, 10, 20], [5]
FACTS = [10]
SHOTS, QUICK_SHOTS = [64], [16]
PER_CONTEXT, QUICK_PER_CONTEXT = 8, 4
QUICK_DATA = ["places", invented.TWO_CODES, "requests"]
QUICK_QUESTIONS = 6
INVENTED_QUESTIONS = 250

DataSet = OpenQuestions | Examples

INVENTED: dict[str, Callable[[int], DataSet]] = {
    "places": lambda seed: invented.places(seed, INVENTED_QUESTIONS),
    invented.TWO_CODES: lambda seed: invented.two_codes(seed, INVENTED_QUESTIONS),
    invented.TWO_HOPS: lambda seed: invented.two_hops(seed, INVENTED_QUESTIONS),
    "requests": invented.requests,
}


def load(given: str, args: argparse.Namespace) -> DataSet:
    """A data set by its name or path.

    Raises:
        DataError: there is no such name, or the data is not what it should be.
        Unavailable: the hub cannot be reached.
    """
    if given in INVENTED:
        data = INVENTED[given](args.seed)
        return data._replace(name=given) if data.name == invented.NAME else data
    path = Path(given)
    if not path.is_file():
        if given in hub.SOURCES:
            return demonstrations.load(given, args.seed)
        known = ", ".join([*INVENTED, *hub.SOURCES])
        raise DataError(f"{given!r} is neither a file nor one of {known}")
    first = read_jsonl(path)[0].values
    if "label" in first or ("question" in first and "answer" in first):
        return demonstrations.load(given, args.seed)
    return passages.load(path, args.collection)


def load_all(args: argparse.Namespace) -> list[DataSet]:
    """All data sets that can be had, with the negatives that were asked for."""
    found: list[DataSet] = []
    for given in args.data or QUICK_DATA:
        try:
            data = load(given, args)
        except Unavailable as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
            continue
        if args.negatives == "hard" and isinstance(data, OpenQuestions):
            data = passages.with_hard_negatives(data)
        found.append(data)
    if not found:
        raise Unavailable("no data set could be loaded, nothing was measured")
    return found


def subject(data: DataSet, args: argparse.Namespace) -> Subject:
    """A data set, of which as many questions are asked as it has, at most."""
    there = len(data.asked if isinstance(data, Examples) else data.questions)
    if args.questions is not None and args.questions > there:
        args = argparse.Namespace(**{**vars(args), "questions": there})
    if isinstance(data, Examples):
        return many_shot_icl.subject(data, args)
    return rag_qa.subject(data, args, args.facts if data.form.is_short else args.documents)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = parser_of(f"benchmarks.{NAME}", __doc__)
    add_quality_options(parser, NAME)
    add = parser.add_argument
    add("--data", nargs="+", help=f"names or files (with --quick: {' '.join(QUICK_DATA)})")
    add("--collection", type=Path, help="file of the documents that --data has numbers of")
    add(
        "--documents",
        nargs="+",
        type=int,
        help=f"contexts of questions over documents (default: {DOCUMENTS}; --quick: "
        f"{QUICK_DOCUMENTS})",
    )
    add(
        "--facts",
        nargs="+",
        type=int,
        default=FACTS,
        help="contexts of questions over facts (default: %(default)s)",
    )
    add("--shots", nargs="+", type=int, help=f"default: {SHOTS}; --quick: {QUICK_SHOTS}")
    add(
        "--per-context",
        type=int,
        help=f"demonstrations in a context (default: {PER_CONTEXT}; --quick: {QUICK_PER_CONTEXT})",
    )
    add("--negatives", choices=["given", "hard"], default="given", help="default: %(default)s")
    add("--soft", type=float, default=0.1, help="λ of soft (default: %(default)s)")
    add("--refine", type=int, default=2, help="m of refine (default: %(default)s)")
    add("--warm-items", type=int, choices=[1, 2], default=2, help="default: %(default)s")
    add(
        "--checked",
        type=int,
        help="questions of each level that the controls of soft and refine ask (default: all)",
    )
    args = parser.parse_args(argv)
    for name, quick, full in (
        ("documents", QUICK_DOCUMENTS, DOCUMENTS),
        ("shots", QUICK_SHOTS, SHOTS),
        ("per_context", QUICK_PER_CONTEXT, PER_CONTEXT),
    ):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if min(*args.documents, *args.facts, *args.shots) < 1 or args.per_context < 1:
        parser.error("--documents, --facts, --shots and --per-context must be positive")
    if args.soft <= 0 or args.refine < 1:
        parser.error("--soft and --refine must be positive: both are measured")
    if args.checked is not None and args.checked < 1:
        parser.error("--checked must be positive")
    complete_quality_options(args, parser, QUICK_QUESTIONS)
    return args, parser


def main(argv: Sequence[str] | None = None) -> None:
    args, parser = parse(argv)
    run(args, parser, NAME, [subject(data, args) for data in load_all(args)], methods=LADDER)


if __name__ == "__main__":
    sys.exit(exit_status(main))
