"""The part that quality benchmarks share: ask the same questions in every way and compare.

A benchmark brings *levels*, such as numbers of documents, each with its questions. For each level
and method all questions are asked at temperature 0 and scored; then a few are timed one by one.
Two rows of the table have known values and are checked (:mod:`benchmarks.common.controls`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common import controls
from benchmarks.common.client import Answer, Client, Refused, computed_tokens
from benchmarks.common.methods import Method, body_of
from benchmarks.common.options import add_server_options, add_url_option, ape_server, settings_of
from benchmarks.common.prompts import Encoder, Prompt
from benchmarks.common.reference import Reference
from benchmarks.common.results import Axes, Column, Line, Results, plot, show
from benchmarks.common.scores import Score

CHECKED_PROMPTS = 2  # of the whole run, by the dense reference


class Question(NamedTuple):
    """One question of a level."""

    prompt: Prompt
    half: tuple[int, ...]  # indices of the contexts that the method HALF keeps
    accepted: tuple[str, ...]  # answers


class Level(NamedTuple):
    """Questions over the same number of contexts or shots.

    Attributes:
        x: the number, for the table and the plot.
        contexts_of: what is counted, for a reader: "64 shots in 8 contexts".
        questions: in the order in which they are asked.
        reordered: for the second time a question is timed its contexts come in another order.
    """

    x: int
    contexts_of: str
    questions: Sequence[Question]
    reordered: bool


class Task(NamedTuple):
    """How all questions of a benchmark are asked and scored.

    Attributes:
        scores: by name; the first is the one that is plotted.
        read: takes the answer out of the generated text.
        sampling: SGLang's sampling parameters; the temperature is 0.
    """

    scores: Mapping[str, Score]
    read: Callable[[str], str]
    sampling: Mapping[str, Any]


def add_quality_options(parser: argparse.ArgumentParser, results: str) -> None:
    add_server_options(parser, results)
    add_url_option(parser)
    add = parser.add_argument
    add("--temperature", type=float, default=0.9, help="T of APE (default: %(default)s)")
    add("--scale", type=float, default=0.9, help="S of APE (default: %(default)s)")
    add("--chat", action="store_true", help="use the model's chat template")
    add("--questions", type=int, help="how many to ask (default: all; --quick: a few)")
    add("--concurrency", type=int, default=8, help="requests under way (default: %(default)s)")
    add("--timed", type=int, default=5, help="questions to time, of each row (default: 5)")
    add(
        "--no-reference",
        action="store_true",
        help="do not compare T = S = 1 with a dense computation: it needs the weights a second "
        "time, in fp32 in main memory",
    )


def run(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    benchmark: str,
    task: Task,
    levels: Callable[[Encoder], Sequence[Level]],
    flags: Sequence[str] = (),
) -> None:
    """Measure all levels, print the table, and write results, answers and the plot.

    Args:
        args: of a parser with :func:`add_quality_options`.
        parser: reports what is wrong with them.
        benchmark: its name.
        task: how questions are asked and scored.
        levels: makes the questions with the model's tokenizer.
        flags: of the server, before those that the user gave.

    Raises:
        ControlError: a row with a known value has another.
        ServerError: the server does not come up, or fails.
    """
    results = Results(args.out, benchmark, settings_of(args))
    with ape_server(args, parser, flags) as client:
        model = client.model_path()
        info = client.info()
        results.note("dtype", info["dtype"])
        measure = _Measure(client, task, args)
        all_levels = levels(Encoder(model, args.chat))
        with (args.out / "answers.jsonl").open("w") as answers:
            for level in all_levels:
                for row in measure.level(level, answers):
                    results.add(row)
        notes = dict(measure.controls)
        parallel = [q.prompt for level in all_levels for q in level.questions]
        parallel = [prompt for prompt in parallel if len(prompt.contexts) > 1]
        notes["parallel"] = _check_parallel(args, client, model, parallel, info["dtype"])
    results.note("controls", notes)
    _show(benchmark, task, results)
    results.finish()


def _check_parallel(
    args: argparse.Namespace, client: Client, model: str, prompts: Sequence[Prompt], dtype: str
) -> str:
    if args.no_reference or not prompts:
        return "not checked: " + ("--no-reference" if prompts else "no question has two contexts")
    print("control: T = S = 1 beside a dense computation of parallel encoding", flush=True)
    chosen = prompts[:: max(len(prompts) // CHECKED_PROMPTS, 1)][:CHECKED_PROMPTS]
    return controls.check_parallel(client, Reference(model), chosen, dtype)


class _Measure:
    """One server, asked in all ways."""

    def __init__(self, client: Client, task: Task, args: argparse.Namespace) -> None:
        self._client = client
        self._task = task
        self._options = {"temperature": args.temperature, "scale": args.scale}
        self._concurrency = args.concurrency
        self._timed = args.timed
        self._random = random.Random(args.seed)
        self.controls: dict[str, str] = {}

    def level(self, level: Level, log: Any) -> Iterator[dict[str, Any]]:
        """Rows of one level, one a method."""
        has_contexts = any(question.prompt.contexts for question in level.questions)
        methods = [own for own in Method if has_contexts or own is Method.NONE]
        answers: dict[Method, list[Answer | Refused]] = {}
        for method in methods:
            answers[method] = self._ask(level, method)
            row = {"x": level.x, "level": level.contexts_of, "method": method.value}
            row |= self._scored(level, method, answers[method], log)
            yield row | self._times(level, method)
        if has_contexts:
            self.controls[f"one context, {level.contexts_of}"] = controls.check_one_context(
                answers[Method.SEQUENTIAL],
                answers[Method.ONE_CONTEXT],
                lambda method, i: self._alone(level, method, i),
            )

    def _body(self, method: Method, question: Question) -> dict[str, Any]:
        sampling = {"temperature": 0, **self._task.sampling}
        return body_of(method, question.prompt, question.half, self._options, sampling)

    def _ask(self, level: Level, method: Method) -> list[Answer | Refused]:
        """All questions, beginning with an empty cache.

        The first goes alone: what it shares with the others is then computed once, as it would be
        in a server that has run for a while.
        """
        self._client.flush()
        bodies = [self._body(method, question) for question in level.questions]
        label = f"{level.contexts_of}: {method.value}"
        first = self._client.generate(bodies[:1])
        return first + self._client.generate(bodies[1:], self._concurrency, label)

    def _alone(self, level: Level, method: Method, index: int) -> str:
        self._client.flush()
        answer = self._client.generate([self._body(method, level.questions[index])])[0]
        return str(answer) if isinstance(answer, Refused) else answer["text"]

    def _scored(
        self, level: Level, method: Method, answers: Sequence[Answer | Refused], log: Any
    ) -> dict[str, Any]:
        """Means over the questions that were answered, and how many were refused."""
        scores: dict[str, list[float]] = {name: [] for name in self._task.scores}
        tokens, computed = [], []
        for i, (question, answer) in enumerate(zip(level.questions, answers, strict=True)):
            entry: dict[str, Any] = {"level": level.x, "method": method.value, "question": i}
            if isinstance(answer, Refused):
                entry["refused"] = str(answer)
            else:
                read = self._task.read(answer["text"])
                own = {name: of(read, question.accepted) for name, of in self._task.scores.items()}
                entry |= {"answer": read, "accepted": question.accepted, **own}
                for name, value in own.items():
                    scores[name].append(value)
                tokens.append(answer["meta_info"]["prompt_tokens"])
                computed.append(computed_tokens(answer["meta_info"]))
            log.write(json.dumps(entry) + "\n")
        answered = len(tokens)
        row: dict[str, Any] = {"questions": answered, "refused": len(answers) - answered}
        if not answered:
            return row
        row |= {name: statistics.fmean(values) for name, values in scores.items()}
        main = next(iter(scores.values()))
        spread = statistics.pstdev(main) / math.sqrt(answered)
        return row | {
            "standard_error": spread,
            "prompt_tokens": statistics.fmean(tokens),
            "computed_tokens": sum(computed),
        }

    def _times(self, level: Level, method: Method) -> dict[str, Any]:
        """Medians of a few questions, one after another.

        Each is asked with an empty cache; then its contexts come again, in another order if the
        level says so, with the next question.
        """
        cold, warm = [], []
        for i in range(min(self._timed, len(level.questions))):
            question = level.questions[i]
            following = level.questions[(i + 1) % len(level.questions)]
            again = question._replace(prompt=question.prompt._replace(query=following.prompt.query))
            if level.reordered:
                again = self._in_another_order(again)
            self._client.flush()
            try:
                cold.append(self._first_token(method, question))
                warm.append(self._first_token(method, again))
            except Refused:
                continue
        if not cold or not warm:
            return {}
        return {
            "cold_ms": 1e3 * statistics.median(cold),
            "warm_ms": 1e3 * statistics.median(warm),
        }

    def _first_token(self, method: Method, question: Question) -> float:
        return self._client.stream([self._body(method, question)])[0].first_token

    def _in_another_order(self, question: Question) -> Question:
        count = len(question.prompt.contexts)
        order = self._random.sample(range(count), count)
        places = {context: place for place, context in enumerate(order)}
        return question._replace(
            prompt=question.prompt.with_contexts(order),
            half=tuple(sorted(places[context] for context in question.half)),
        )


def _show(benchmark: str, task: Task, results: Results) -> None:
    first = next(iter(task.scores))
    columns = [
        Column("Contexts", "level"),
        Column("Method", "method"),
        Column("Questions", "questions"),
        Column("Refused", "refused"),
        *(Column(name, name, "{:.3f}") for name in task.scores),
        Column("± s.e.", "standard_error", "{:.3f}"),
        Column("Prompt tokens", "prompt_tokens", "{:,.0f}"),
        Column("Computed in all", "computed_tokens", "{:,}"),
        Column("First token, cold", "cold_ms", "{:,.0f} ms"),
        Column("contexts cached", "warm_ms", "{:,.0f} ms"),
    ]
    show(
        f"{benchmark} ({results.content['settings'].get('data') or 'own texts'})",
        columns,
        results.rows,
    )
    for name, seen in results.content["controls"].items():
        print(f"control, {name}: {seen}")
    plot(
        results.folder / f"{benchmark}.png",
        benchmark,
        [
            Axes("Quality", "level", first, _lines(results.rows, first, "standard_error")),
            Axes("First token, cold", "level", "ms", _lines(results.rows, "cold_ms")),
            Axes("First token, contexts cached", "level", "ms", _lines(results.rows, "warm_ms")),
        ],
    )


def _lines(rows: Sequence[Mapping[str, Any]], key: str, spread: str | None = None) -> list[Line]:
    lines = []
    for method in Method:
        own = [row for row in rows if row["method"] == method.value and key in row]
        if own and not method.is_control:
            spreads = [row[spread] for row in own] if spread else None
            lines.append(Line(method.value, [r["x"] for r in own], [r[key] for r in own], spreads))
    return lines
