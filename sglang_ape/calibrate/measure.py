"""Asking an engine: the sequential answers, APE's log-probabilities of them, and its own answers.

A context's KV depends neither on T nor on S. The rows are therefore taken in groups that the KV
pool can hold, and all settings of a group are asked before the next: the contexts are encoded once,
and what is computed for a further setting is the query and the answer alone.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sglang_ape.calibrate.backend import Backend
from sglang_ape.calibrate.divergence import Target, at_tokens, divergence
from sglang_ape.calibrate.ladder import PLAIN_RUNG, Rung
from sglang_ape.calibrate.search import Point
from sglang_ape.calibrate.tokens import Row
from sglang_ape.entry.call import Ids
from sglang_ape.errors import ApeRequestError
from sglang_ape.scoring.choice import highest

_INDEX = re.compile(r"\[(\d+)\]")


class RowError(Exception):
    """The engine refused a row; the message is for the user."""


class Setting(NamedTuple):
    """How the rows are asked."""

    point: Point
    prefix: str | None = None  # None: each row's own
    rung: Rung = PLAIN_RUNG

    @property
    def before(self) -> tuple[str | None, bool]:
        """The same for settings whose contexts stand after the same P."""
        return self.prefix, self.rung.warm


class Options(NamedTuple):
    """Of every request."""

    max_new_tokens: int
    stop: tuple[str, ...]
    top_logprobs: int  # tokens a position that divergences look at
    batch_size: int  # requests in one call


class _Job(NamedTuple):
    """One request with contexts."""

    row: Row
    setting: Setting


class Answer(NamedTuple):
    """A greedy answer."""

    text: str
    extra_tokens: int  # to score and to refine contexts


_NO_WARM = array("I")
_Context = tuple[tuple[str | None, bool], bytes]  # after which P, and its ids
_Body = Callable[[Sequence[_Job]], dict[str, Any]]
_Read = Callable[[_Job, dict[str, Any]], Any]


class Measure:
    """Measures rows at settings; nothing is asked twice.

    Args:
        backend: answers.
        options: of every request.
        prefixes: token ids of the texts that settings name.
        warm: token ids of all warm items.

    All methods that ask raise RowError, naming the line, for what the engine refuses, and
    ``requests.RequestException`` where there is no answer.
    """

    def __init__(
        self,
        backend: Backend,
        options: Options,
        prefixes: Mapping[str, Ids],
        warm: Ids = _NO_WARM,
    ) -> None:
        self.targets: dict[int, Target] = {}  # by line, of the rows asked sequentially
        self._backend = backend
        self._options = options
        self._prefixes = prefixes
        self._warm = warm
        self._divergences: dict[tuple[int, Setting], float] = {}
        self._answers: dict[tuple[int, Setting], Answer] = {}

    def ask_sequentially(self, rows: Sequence[Row]) -> None:
        """Answer each row's sequential prompt greedily, for :attr:`targets`."""
        missing = [row for row in rows if row.line not in self.targets]
        # The first alone: rows with the same contexts then find them in the cache.
        batches = [missing[:1], *_batches(missing[1:], self._options.batch_size)]
        with _progress("sequential", len(missing)) as bar:
            for batch in filter(None, batches):
                body = {
                    "input_ids": [row.sequential for row in batch],
                    "sampling_params": self._sampling,
                    "return_logprob": True,
                    "top_logprobs_num": self._options.top_logprobs,
                }
                for row, answer in zip(batch, self._ask(body, batch), strict=True):
                    self.targets[row.line] = _target(answer)
                bar.update(len(batch))

    def divergences(self, rows: Sequence[Row], settings: Sequence[Setting]) -> list[list[float]]:
        """How far APE is from the sequential answers, in nats a token.

        Args:
            rows: all asked sequentially before.
            settings: to measure them at, all of the plain rung: the query holds the answer here.

        Returns:
            For each setting, the divergence of each row.
        """
        self._fill(
            "match", self._divergences, rows, settings, self._scoring_body, self._read_divergence
        )
        return [[self._divergences[row.line, one] for row in rows] for one in settings]

    def answers(self, rows: Sequence[Row], settings: Sequence[Setting]) -> list[list[Answer]]:
        """For each setting, the greedy answer to each row."""
        self._fill("answers", self._answers, rows, settings, self._generating_body, _answer)
        return [[self._answers[row.line, one] for row in rows] for one in settings]

    def texts(self, rows: Sequence[Row], settings: Sequence[Setting]) -> list[list[str]]:
        """The texts of :meth:`answers`."""
        return [[answer.text for answer in own] for own in self.answers(rows, settings)]

    def _fill(
        self,
        what: str,
        known: dict[tuple[int, Setting], Any],
        rows: Sequence[Row],
        settings: Sequence[Setting],
        body_of: _Body,
        read: _Read,
    ) -> None:
        jobs = [
            _Job(row, setting)
            for setting in dict.fromkeys(settings)
            for row in rows
            if (row.line, setting) not in known
        ]
        with _progress(f"{what}, {_named(settings)}", len(jobs)) as bar:
            for batch in self._ordered(jobs):
                answers = self._ask(body_of(batch), [job.row for job in batch])
                for job, answer in zip(batch, answers, strict=True):
                    known[job.row.line, job.setting] = read(job, answer)
                bar.update(len(batch))

    def _ordered(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Batches, group after group of rows.

        A context that is not encoded yet is in one request of a batch at most: requests that run
        together would each encode it.
        """
        for group in self._groups(jobs):
            encoded: set[_Context] = set()
            batch: list[_Job] = []
            pending: set[_Context] = set()
            for job in group:
                own = {(job.setting.before, ids.tobytes()) for ids in job.row.contexts} - encoded
                if len(batch) == self._options.batch_size or own & pending:
                    yield batch
                    encoded |= pending
                    own -= pending
                    batch, pending = [], set()
                batch.append(job)
                pending |= own
            yield batch

    def _groups(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """The jobs of as many rows as half of the KV pool has room for, at least of one."""
        room = self._backend.facts.limits.pool_tokens // 2
        need: dict[int, int] = {}
        for line, _before, tokens in {
            (job.row.line, job.setting.before, job.row.context_tokens): None for job in jobs
        }:
            need[line] = need.get(line, 0) + tokens
        group: set[int] = set()
        used = 0
        for line, tokens in need.items():
            if group and used + tokens > room:
                yield [job for job in jobs if job.row.line in group]
                group, used = set(), 0
            group.add(line)
            used += tokens
        if group:
            yield [job for job in jobs if job.row.line in group]

    def _scoring_body(self, jobs: Sequence[_Job]) -> dict[str, Any]:
        """Teacher forcing: Q and the sequential answer as one query, no new token."""
        targets = [self.targets[job.row.line] for job in jobs]
        queries = [
            job.row.query.tolist() + target.tokens
            for job, target in zip(jobs, targets, strict=True)
        ]
        return {
            **self._ape_body(jobs, queries),
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            # Counted from P; the last token of Q predicts the answer's first.
            "logprob_start_len": [
                job.row.tokens_before_query(self._prefix(job)) + len(job.row.query) - 1
                for job in jobs
            ],
            "token_ids_logprob": [target.support for target in targets],
        }

    def _read_divergence(self, job: _Job, answer: dict[str, Any]) -> float:
        target = self.targets[job.row.line]
        # The first is that of the last token of Q, before which nothing was asked for.
        positions = answer["meta_info"]["input_token_ids_logprobs"][1:]
        known = [{token: logprob for logprob, token, *_ in own} for own in positions]
        return divergence(target.logprobs, at_tokens(target.ids, known))

    def _generating_body(self, jobs: Sequence[_Job]) -> dict[str, Any]:
        queries = [job.row.query.tolist() for job in jobs]
        return {**self._ape_body(jobs, queries), "sampling_params": self._sampling}

    def _ape_body(self, jobs: Sequence[_Job], queries: list[list[int]]) -> dict[str, Any]:
        return {
            "input_ids": queries,
            "contexts": [[{"input_ids": ids.tolist()} for ids in job.row.contexts] for job in jobs],
            "prefix_ids": [self._prefix(job).tolist() for job in jobs],
            "ape": [_ape(job.setting) for job in jobs],
        }

    def _prefix(self, job: _Job) -> Ids:
        chosen = job.setting.prefix
        prefix = job.row.prefix if chosen is None else self._prefixes[chosen]
        return prefix + self._warm if job.setting.rung.warm else prefix

    @property
    def _sampling(self) -> dict[str, Any]:
        stop = {"stop": list(self._options.stop)} if self._options.stop else {}
        return {"temperature": 0, "max_new_tokens": self._options.max_new_tokens, **stop}

    def _ask(self, body: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
        try:
            answers = self._backend.ask(body)
        except ApeRequestError as error:
            if error.status_code != 400:
                raise
            raise RowError(f"{_blamed(error, rows)}: {error}") from error
        for row, answer in zip(rows, answers, strict=True):
            reason = answer["meta_info"]["finish_reason"]
            if reason["type"] == "abort":
                raise RowError(f"line {row.line}: {reason.get('message', 'the engine gave up')}")
        return answers


def _target(answer: Mapping[str, Any]) -> Target:
    tops = answer["meta_info"]["output_top_logprobs"]
    return Target(
        answer["text"],
        list(answer["output_ids"]),
        np.array([[token for _, token, *_ in top] for top in tops], dtype=np.int64),
        np.array([[logprob for logprob, *_ in top] for top in tops], dtype=np.float64),
    )


def _ape(setting: Setting) -> dict[str, float]:
    """The field ``ape``, with all of it: the server's own defaults may be others."""
    rung = setting.rung
    return {**setting.point._asdict(), "soft": rung.soft, "refine": rung.refine}


def _answer(job: _Job, answer: dict[str, Any]) -> Answer:
    scores = [one["score"] for one in answer["meta_info"].get("contexts", ())]
    return Answer(answer["text"], _scored_tokens(job.row, scores) + _refined_tokens(job, scores))


def _scored_tokens(row: Row, scores: Sequence[float]) -> int:
    """Tokens that scoring computes for a new question: a copy of the query for each context.

    The engine tells of none where it knows the scores: from the rung before, or an earlier run.
    """
    distinct = {ids.tobytes() for ids in row.contexts}
    return len(distinct) * (len(row.query) + 1) if scores else 0  # and the context's last token


def _refined_tokens(job: _Job, scores: Sequence[float]) -> int:
    """Tokens that refining computes where the contexts are cached, each by itself.

    The first of the sequence is cached as it is. What the engine tells would be less here: rungs
    that were asked before, and the sequential prompt, leave beginnings of the sequence behind.
    """
    refine, contexts = job.setting.rung.refine, job.row.contexts
    if not refine:
        return 0
    chosen = highest(scores, refine) if scores else list(range(len(contexts)))
    return sum(len(contexts[i]) for i in chosen[1:])


def _blamed(error: ApeRequestError, rows: Sequence[Row]) -> str:
    """The line that a refusal names by its index in the batch, or all lines of the batch."""
    index = _INDEX.search(error.param or "")
    if index and int(index[1]) < len(rows):
        rows = [rows[int(index[1])]]
    noun = "line" if len(rows) == 1 else "one of the lines"
    return f"{noun} {', '.join(str(row.line) for row in rows)}"


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _named(settings: Sequence[Setting]) -> str:
    if any(one.rung != PLAIN_RUNG for one in settings):
        return f"rungs {len(settings)}"
    temperatures = {one.point.temperature for one in settings}
    scales = {one.point.scale for one in settings}
    return f"T {_range(temperatures)}, S {_range(scales)}"


def _range(values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}…{high:g}"


def _progress(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{what:32}", unit=" requests", mininterval=1, disable=total == 0)
