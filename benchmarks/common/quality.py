"""The part that quality benchmarks share: ask the same questions in every way and compare.

A benchmark brings *subjects*, one a data set, each with *levels* such as numbers of documents. For
each level and method all questions are asked at temperature 0 and scored; then a few are timed one
by one. Methods are compared question by question (:mod:`benchmarks.common.paired`). Some answers
have known values and are checked (:mod:`benchmarks.common.controls`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from benchmarks.common import controls, paired
from benchmarks.common.client import Answer, Client, Refused, Timed, computed_tokens
from benchmarks.common.methods import PLAIN, Method, Rungs, body_of
from benchmarks.common.options import (
    add_server_options,
    add_url_option,
    ape_server,
    model_of,
    settings_of,
)
from benchmarks.common.prompts import Encoder, Prompt
from benchmarks.common.reference import Reference
from benchmarks.common.results import Axes, Column, Line, Results, plot, show
from benchmarks.common.scores import Score
from benchmarks.common.server import ServerError

CHECKED_PROMPTS = 2  # of each subject, by the dense reference
TIMED, QUICK_TIMED = 5, 1
QUICK_NOTE = "--quick: this checks the machinery, not quality"


class Question(NamedTuple):
    """One question of a level."""

    text: str  # for a reader of the answers
    prompt: Prompt
    half: tuple[int, ...]  # indices of the contexts that the method HALF keeps
    accepted: tuple[str, ...]  # answers
    gold: tuple[int, ...] = ()  # indices of the contexts that hold the answer, where that is known


class Level(NamedTuple):
    """Questions over the same number of contexts or shots.

    Attributes:
        x: the number, for the table and the plot. Without contexts only the method NONE is asked,
            with contexts all others.
        contexts_of: what is counted, for a reader: "64 shots in 8 contexts".
        questions: in the order in which they are asked.
        reordered: for the second time a question is timed its contexts come in another order.
    """

    x: int
    contexts_of: str
    questions: Sequence[Question]
    reordered: bool

    def methods(self, chosen: Sequence[Method]) -> list[Method]:
        """Those that differ here: half of one context, for one, is all of it."""
        if not any(question.prompt.contexts for question in self.questions):
            return [Method.NONE]
        same = {Method.NONE}
        if all(len(question.half) == len(question.prompt.contexts) for question in self.questions):
            same.add(Method.HALF)
        return [method for method in chosen if method not in same]


class Task(NamedTuple):
    """How all questions of a data set are asked and scored.

    Attributes:
        scores: by name; the first is the one that is plotted.
        read: takes the answer out of the generated text.
        sampling: SGLang's sampling parameters; the temperature is 0.
    """

    scores: Mapping[str, Score]
    read: Callable[[str], str]
    sampling: Mapping[str, Any]


class Subject(NamedTuple):
    """A data set to measure.

    Attributes:
        name: for tables and files.
        x: what the levels count, for the plot.
        task: how its questions are asked and scored.
        levels: makes the questions with the model's tokenizer.
    """

    name: str
    x: str
    task: Task
    levels: Callable[[Encoder], Sequence[Level]]


class _Prepared(NamedTuple):
    subject: Subject
    levels: Sequence[Level]


def first_line(text: str) -> str:
    """The answer in a text that may go on after it."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def add_quality_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Options of all quality benchmarks.

    Those of the quality ladder are off, unless the benchmark adds them after this.

    Args:
        parser: gets the options.
        results: name of the folder of results.
    """
    parser.set_defaults(soft=0.0, refine=0, warm_items=0, checked=None)
    add_server_options(parser, results)
    add_url_option(parser)
    add = parser.add_argument
    add("--temperature", type=float, default=0.9, help="T of APE (default: %(default)s)")
    add("--scale", type=float, default=0.9, help="S of APE (default: %(default)s)")
    add("--chat", action="store_true", help="use the model's chat template")
    add("--questions", type=int, help="how many to ask (default: all; --quick: a few)")
    add("--concurrency", type=int, default=8, help="requests under way (default: %(default)s)")
    add(
        "--timed",
        type=int,
        help=f"questions to time, of each row (default: {TIMED}; --quick: {QUICK_TIMED})",
    )
    add(
        "--no-reference",
        action="store_true",
        help="do not compare T = S = 1 with a dense computation: it needs the weights a second "
        "time, in fp32 in main memory",
    )


def complete_quality_options(
    args: argparse.Namespace, parser: argparse.ArgumentParser, quick_questions: int
) -> None:
    """Defaults that depend on ``--quick``; ends the process if an option is out of its range.

    Args:
        args: are changed.
        parser: reports what is wrong.
        quick_questions: how many are asked with ``--quick``, unless the user says.
    """
    if args.quick:
        args.questions = quick_questions if args.questions is None else args.questions
    if args.timed is None:
        args.timed = QUICK_TIMED if args.quick else TIMED
    if args.questions is not None and args.questions < 1:
        parser.error("--questions must be positive")
    if args.concurrency < 1 or args.timed < 0:
        parser.error("--concurrency must be positive, --timed must not be negative")
    if not args.data and not args.quick:
        parser.error("--data is needed, except with --quick")


def run(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    benchmark: str,
    subjects: Sequence[Subject],
    flags: Sequence[str] = (),
    methods: Sequence[Method] = PLAIN,
) -> None:
    """Measure all subjects on one server; print tables, write results, answers and plots.

    A server that is started here gets room for the contexts of the longest question, also beyond
    the model's window.

    Args:
        args: of a parser with :func:`add_quality_options`.
        parser: reports what is wrong with them.
        benchmark: its name.
        subjects: what is measured.
        flags: of the server, before those that the user gave.
        methods: in the order in which they are asked.

    Raises:
        ControlError: what has a known value has another.
        ServerError: the server does not come up, or fails.
    """
    results = Results(args.out, benchmark, settings_of(args))
    if args.url:
        with ape_server(args, parser, ()) as client:
            prepared = _prepare(subjects, client.model_path(), args.chat)
            _measure_all(args, client, prepared, results, methods)
    else:
        prepared = _prepare(subjects, model_of(args, parser), args.chat)
        room = ["--ape-max-context-tokens", str(_most_context_tokens(prepared))]
        idle = ["--sleep-on-idle"] if args.quick else []  # or it takes one of two cores from us
        with ape_server(args, parser, [*flags, *room, *idle]) as client:
            _measure_all(args, client, prepared, results, methods)
    results.finish()


def _prepare(subjects: Sequence[Subject], model: str, chat: bool) -> list[_Prepared]:
    print("loading the tokenizer and encoding all questions", flush=True)
    encoder = Encoder(model, chat)
    return [_Prepared(subject, subject.levels(encoder)) for subject in subjects]


def _most_context_tokens(prepared: Sequence[_Prepared]) -> int:
    """Tokens of all contexts of the longest question; at least 1, as the server's flag."""
    prompts = (q.prompt for _, levels in prepared for level in levels for q in level.questions)
    return max(1, *(sum(map(len, prompt.contexts)) for prompt in prompts))


def _measure_all(
    args: argparse.Namespace,
    client: Client,
    prepared: Sequence[_Prepared],
    results: Results,
    methods: Sequence[Method],
) -> None:
    info = client.info()
    if not info.get("enable_ape"):
        raise ServerError(f"{client.url} was not started with --enable-ape")
    results.note("dtype", info["dtype"])
    results.note("controls", {})
    results.note("comparisons", [])
    reference = _Reference(args, client)
    failures: list[str] = []
    with (args.out / "answers.jsonl").open("w") as answers:
        for subject, levels in prepared:
            measure = _Measure(client, subject, args, answers, methods)
            for name, check in _dense_checks(methods):
                _note_control(results, subject, name, reference.check(check, levels, info["dtype"]))
            for level in levels:
                for row in measure.level(level):
                    results.add({"data": subject.name} | row)
                results.content["comparisons"] += measure.comparisons(level)
                try:
                    for name, seen in measure.check(level, info["dtype"]):
                        _note_control(results, subject, f"{name}, {level.contexts_of}", seen)
                except controls.ControlError as error:
                    # What follows is measured all the same: hours may have gone into it.
                    failures.append(f"{subject.name}, {level.contexts_of}: {error}")
                    _note_control(results, subject, f"failed, {level.contexts_of}", str(error))
            _show(args, subject, results)
    if failures:
        raise controls.ControlError("; ".join(failures))


def _note_control(results: Results, subject: Subject, name: str, seen: str) -> None:
    controls_seen = results.content["controls"]
    controls_seen.setdefault(subject.name, {})[name] = seen
    results.write()


_DenseCheck = Callable[[Client, Reference, Sequence[Prompt], str], str]


def _dense_checks(methods: Sequence[Method]) -> list[tuple[str, _DenseCheck]]:
    checks: list[tuple[str, _DenseCheck]] = [("parallel", controls.check_parallel)]
    if Method.SOFT in methods or Method.REFINE in methods:
        checks.append(("scores", controls.check_scores))
    return checks


class _Reference:
    """The checks that compare with a dense computation; the model is loaded for the first one."""

    def __init__(self, args: argparse.Namespace, client: Client) -> None:
        self._is_off = args.no_reference
        self._client = client
        self._loaded: Reference | None = None

    def check(self, check: _DenseCheck, levels: Sequence[Level], dtype: str) -> str:
        """First of all, so that a run of hours does not end with it."""
        prompts = [question.prompt for level in levels for question in level.questions]
        prompts = [prompt for prompt in prompts if len(prompt.contexts) > 1]
        if self._is_off or not prompts:
            why = "--no-reference" if prompts else "no question has two contexts"
            return f"not checked: {why}"
        print("control: answers beside a dense computation", flush=True)
        chosen = prompts[:: max(len(prompts) // CHECKED_PROMPTS, 1)][:CHECKED_PROMPTS]
        self._loaded = self._loaded or self._load()
        return check(self._client, self._loaded, chosen, dtype)

    def _load(self) -> Reference:
        model = self._client.model_path()
        try:
            return Reference(model)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise controls.ControlError(
                f"transformers cannot load {model} ({reason:.200}); --no-reference goes without"
            ) from error


class _Measure:
    """One subject, asked in all ways.

    Args:
        client: of the server.
        subject: what is measured.
        args: the options.
        log: gets a line of JSON for each answer.
        methods: in the order in which they are asked.
    """

    def __init__(
        self,
        client: Client,
        subject: Subject,
        args: argparse.Namespace,
        log: TextIO,
        methods: Sequence[Method],
    ) -> None:
        self._client = client
        self._name = subject.name
        self._task = subject.task
        self._rungs = Rungs(args.temperature, args.scale, args.soft, args.refine)
        self._methods = methods
        self._checked = args.checked
        self._seed = args.seed
        self._concurrency = args.concurrency
        self._timed = args.timed
        self._random = random.Random(args.seed)
        self._log = log
        self._answers: dict[Method, list[Answer | Refused]] = {}

    def level(self, level: Level) -> Iterator[dict[str, Any]]:
        """Rows of one level, one a method."""
        self._answers.clear()
        for method in level.methods(self._methods):
            self._answers[method] = self._ask(level.questions, method, level.contexts_of)
            row = {"x": level.x, "level": level.contexts_of, "method": method.value}
            row |= {"reordered": level.reordered} | self._scored(level, method)
            yield row | self._times(level, method)

    def comparisons(self, level: Level) -> Iterator[dict[str, Any]]:
        """Each method beside APE and sequential, at the level that was measured last.

        A question counts where both answered it.
        """
        name, score = next(iter(self._task.scores.items()))
        scores = {
            method: [
                None if isinstance(answer, Refused) else score(self._task.read(answer["text"]), ok)
                for answer, ok in zip(answers, (q.accepted for q in level.questions), strict=True)
            ]
            for method, answers in self._answers.items()
            if not method.is_control
        }
        for against in (Method.APE, Method.SEQUENTIAL):
            for method in scores if against in scores else ():
                both = [
                    (a, b)
                    for a, b in zip(scores[method], scores[against], strict=True)
                    if a is not None and b is not None
                ]
                if method is not against and both:
                    own, other = zip(*both, strict=True)
                    found = paired.compare(own, other, self._seed)
                    place = {"data": self._name, "x": level.x, "method": method.value}
                    yield place | {"against": against.value, "score": name} | found._asdict()

    def check(self, level: Level, dtype: str) -> Iterator[tuple[str, str]]:
        """The controls over the answers of the level that was measured last; what each saw."""
        if Method.ONE_CONTEXT in self._answers:
            answers = self._answers[Method.ONE_CONTEXT]
            yield "one context", self._alike(level, Method.SEQUENTIAL, Method.ONE_CONTEXT, answers)
        if Method.REFINE in self._answers:
            asked = self._asked_again(level, Method.REFINE_ALL)
            yield "refine all", self._alike(level, Method.SEQUENTIAL, Method.REFINE_ALL, asked)
        if Method.SOFT in self._answers:
            # Biased attention need not round as other attention does, which bf16 answers show.
            own = Method.LEAST_SOFT if dtype == "float32" else Method.NO_SOFT
            asked = self._asked_again(level, own)
            if own is Method.LEAST_SOFT:
                prompts = [question.prompt for question in level.questions[: len(asked)]]
                controls.check_scored(asked, prompts)
            yield own.value, self._alike(level, Method.APE, own, asked)

    def _asked_again(self, level: Level, method: Method) -> list[Answer | Refused]:
        return self._ask(level.questions[: self._checked], method, level.contexts_of)

    def _alike(
        self, level: Level, known: Method, checked: Method, answers: Sequence[Answer | Refused]
    ) -> str:
        return controls.check_alike(
            known,
            self._answers[known][: len(answers)],
            checked,
            answers,
            lambda method, i: self._alone(level, method, i),
        )

    def _body(self, method: Method, question: Question) -> dict[str, Any]:
        sampling = {"temperature": 0, **self._task.sampling}
        return body_of(method, question.prompt, question.half, self._rungs, sampling)

    def _ask(
        self, questions: Sequence[Question], method: Method, contexts_of: str
    ) -> list[Answer | Refused]:
        """All questions, beginning with an empty cache.

        The first goes alone: what it shares with the others is then computed once, as it would be
        in a server that has run for a while.
        """
        self._client.flush()
        bodies = [self._body(method, question) for question in questions]
        label = f"{self._name}, {contexts_of}, {method.value}"
        first = self._client.generate(bodies[:1])
        return first + self._client.generate(bodies[1:], self._concurrency, label)

    def _alone(self, level: Level, method: Method, index: int) -> str:
        self._client.flush()
        answer = self._client.generate([self._body(method, level.questions[index])])[0]
        return str(answer) if isinstance(answer, Refused) else answer["text"]

    def _scored(self, level: Level, method: Method) -> dict[str, Any]:
        """Means over the questions that were answered, and how many were refused."""
        scores: dict[str, list[float]] = {name: [] for name in self._task.scores}
        metas = []
        found = _Found()
        for i, answer in enumerate(self._answers[method]):
            entry = {"data": self._name, "level": level.x, "method": method.value, "question": i}
            entry |= self._read(level.questions[i], answer)
            self._log.write(json.dumps(entry) + "\n")
            if not isinstance(answer, Refused):
                metas.append(answer["meta_info"])
                found.add(answer["meta_info"].get("contexts"), level.questions[i].gold)
                for name, values in scores.items():
                    values.append(entry[name])
        self._log.flush()
        row: dict[str, Any] = {
            "questions": len(metas),
            "refused": len(self._answers[method]) - len(metas),
        }
        if not metas:
            return row
        row |= {name: statistics.fmean(values) for name, values in scores.items()}
        return row | {
            "standard_error": _standard_error(next(iter(scores.values()))),
            "prompt_tokens": statistics.fmean(meta["prompt_tokens"] for meta in metas),
            "computed_tokens": sum(map(computed_tokens, metas)),
            **_spent(metas),
            **found.shares(),
        }

    def _read(self, question: Question, answer: Answer | Refused) -> dict[str, Any]:
        """What the log says of an answer."""
        if isinstance(answer, Refused):
            return {"asked": question.text, "refused": str(answer)}
        read = self._task.read(answer["text"])
        own = {name: of(read, question.accepted) for name, of in self._task.scores.items()}
        return {"asked": question.text, "answer": read, "accepted": question.accepted, **own}

    def _times(self, level: Level, method: Method) -> dict[str, Any]:
        """Medians over a few questions, one after another.

        Each is asked with an empty cache; then its contexts come again, in another order if the
        level says so, with the next question.
        """
        pairs: list[tuple[Timed, Timed]] = []
        for i in range(min(self._timed, len(level.questions))):
            question = level.questions[i]
            following = level.questions[(i + 1) % len(level.questions)]
            again = question._replace(prompt=question.prompt._replace(query=following.prompt.query))
            if level.reordered:
                again = self._in_another_order(again)
            self._client.flush()
            try:
                pairs.append((self._time(method, question), self._time(method, again)))
            except Refused:
                continue
        if not pairs:
            return {}
        cold, warm = zip(*pairs, strict=True)
        return {
            "cold_ms": 1e3 * statistics.median(one.first_token for one in cold),
            "warm_ms": 1e3 * statistics.median(one.first_token for one in warm),
            "warm_computed": statistics.median(computed_tokens(one.meta) for one in warm),
        }

    def _time(self, method: Method, question: Question) -> Timed:
        return self._client.stream([self._body(method, question)])[0]

    def _in_another_order(self, question: Question) -> Question:
        order = another_order(len(question.prompt.contexts), self._random)
        places = {context: place for place, context in enumerate(order)}
        return question._replace(
            prompt=question.prompt.with_contexts(order),
            half=tuple(sorted(places[context] for context in question.half)),
        )


class _Found:
    """How often the contexts that hold the answer had the highest scores."""

    def __init__(self) -> None:
        self._ranks: list[tuple[bool, bool]] = []

    def add(self, contexts: Sequence[Mapping[str, Any]] | None, gold: Sequence[int]) -> None:
        """One answer: ``meta_info["contexts"]``, if contexts were scored, and which hold it."""
        if contexts and gold:
            order = sorted(range(len(contexts)), key=lambda i: (-contexts[i]["score"], i))
            self._ranks.append((order[0] in gold, set(gold) <= set(order[:2])))

    def shares(self) -> dict[str, float]:
        if not self._ranks:
            return {}
        first, in_two = zip(*self._ranks, strict=True)
        return {"gold_first": statistics.fmean(first), "gold_in_two": statistics.fmean(in_two)}


def _spent(metas: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens a request that were prefilled for scores, and to refine; none without APE."""
    own = [meta["ape"] for meta in metas if "ape" in meta]
    return {
        name: statistics.fmean(one.get(name, 0) for one in own)
        for name in ("scored_tokens", "refined_tokens")
        if own
    }


def another_order(count: int, drawn: random.Random) -> list[int]:
    """A random order of indices that does not begin as the given one does, if there is one."""
    order = drawn.sample(range(count), count)
    if count > 1 and order[0] == 0:
        other = drawn.randrange(1, count)
        order[0], order[other] = order[other], order[0]
    return order


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _show(args: argparse.Namespace, subject: Subject, results: Results) -> None:
    rows = [row for row in results.rows if row["data"] == subject.name]
    name = results.content["benchmark"]
    title = f"{name}, {subject.name}" + (f" ({QUICK_NOTE})" if args.quick else "")
    show(title, _columns(subject), rows)
    print(
        f"±: one standard error of {next(iter(subject.task.scores))}. Tokens: of a prompt. "
        "Computed: prompt tokens of all questions, from an empty\n"
        "cache on. Cold ms: first token with nothing cached. Again ms: with the same contexts "
        f"cached{_order_note(rows)}, and\nanother question; New: prompt tokens computed then."
    )
    rungs = [row for row in rows if row.get("scored_tokens") or row.get("refined_tokens")]
    if rungs:
        show(f"{title}: what scores took and found", _SCORED, rungs)
        print(
            "Scored, Refined: tokens prefilled a request, beyond contexts and query. Gold: how "
            "often a context with the answer had\nthe highest score, and all of them were among "
            "the first two."
        )
    compared = [one for one in results.content["comparisons"] if one["data"] == subject.name]
    show(f"{title}: difference of {next(iter(subject.task.scores))}", _COMPARED, compared)
    print(
        "Over the questions that both answered. Low, High: 95 % interval of the mean difference "
        f"(bootstrap, {paired.RESAMPLES:,}\nresamples of questions). p: exact two-sided sign test "
        "over the questions that differ (McNemar's for 0/1 scores)."
    )
    for control, seen in results.content["controls"][subject.name].items():
        print(f"control, {control}: {seen}")
    _plot(title, subject, rows, compared, results)


def _order_note(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", in another order" if any(row["reordered"] for row in rows) else ""


_COMPARED = [
    Column("", "x"),
    Column("Method", "method"),
    Column("Against", "against"),
    Column("Questions", "questions"),
    Column("Difference", "difference", "{:+.3f}"),
    Column("Low", "low", "{:+.3f}"),
    Column("High", "high", "{:+.3f}"),
    Column("Better", "better"),
    Column("Worse", "worse"),
    Column("p", "p", "{:.3f}"),
]
_SCORED = [
    Column("", "x"),
    Column("Method", "method"),
    Column("Scored", "scored_tokens", "{:,.0f}"),
    Column("Refined", "refined_tokens", "{:,.0f}"),
    Column("Gold 1st", "gold_first", "{:.2f}"),
    Column("in 2", "gold_in_two", "{:.2f}"),
]


def _columns(subject: Subject) -> list[Column]:
    return [
        Column(subject.x, "x"),
        Column("Method", "method"),
        Column("Asked", "questions"),
        Column("Refused", "refused"),
        *(Column(name, name, "{:.3f}") for name in subject.task.scores),
        Column("±", "standard_error", "{:.3f}"),
        Column("Tokens", "prompt_tokens", "{:,.0f}"),
        Column("Computed", "computed_tokens", "{:,}"),
        Column("Cold ms", "cold_ms", "{:,.0f}"),
        Column("Again ms", "warm_ms", "{:,.0f}"),
        Column("New", "warm_computed", "{:,.0f}"),
    ]


def _plot(
    title: str,
    subject: Subject,
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    results: Results,
) -> None:
    first = next(iter(subject.task.scores))
    axes = [
        ("Quality, ± one standard error", first, first, "standard_error"),
        ("First token, nothing cached", "ms", "cold_ms", None),
        ("First token, contexts cached" + _order_note(rows), "ms", "warm_ms", None),
    ]
    plot(
        results.folder / f"{subject.name}.png",
        title,
        [
            *(
                Axes(above, subject.x, y, _lines(rows, key, spread), log_x=True)
                for above, y, key, spread in axes
            ),
            Axes(
                "Difference from APE, 95 % interval",
                subject.x,
                first,
                _differences(compared),
                log_x=True,
            ),
        ],
    )


def _differences(compared: Sequence[Mapping[str, Any]]) -> list[Line]:
    """A line a method, with intervals that need not be symmetric."""
    lines = []
    for method in Method:
        own = [
            one
            for one in compared
            if (one["method"], one["against"]) == (method.value, Method.APE.value)
        ]
        if own:
            ys = [one["difference"] for one in own]
            # The ends of a bootstrap interval may lie on one side of the mean, by rounding.
            below = [
                max(0.0, y - (y if one["low"] is None else one["low"]))
                for one, y in zip(own, ys, strict=True)
            ]
            above = [
                max(0.0, (y if one["high"] is None else one["high"]) - y)
                for one, y in zip(own, ys, strict=True)
            ]
            lines.append(Line(method.value, [one["x"] for one in own], ys, (below, above)))
    return lines


def _lines(rows: Sequence[Mapping[str, Any]], key: str, spread: str | None = None) -> list[Line]:
    """A line a method; that of NONE, which has one value, goes from end to end."""
    ends = [row["x"] for row in rows if row["x"]]
    lines = []
    for method in Method:
        own = [row for row in rows if row["method"] == method.value and row.get(key) is not None]
        if not own or method.is_control:
            continue
        xs, ys = [row["x"] for row in own], [row[key] for row in own]
        spreads = [row[spread] or 0.0 for row in own] if spread else None
        if method is Method.NONE and ends:
            xs, ys, spreads = [min(ends), max(ends)], 2 * ys, spreads and 2 * spreads
        lines.append(Line(method.value, xs, ys, spreads))
    return lines
