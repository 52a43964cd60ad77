"""What the soak says of a server that does not keep tenants apart, or leaves something over."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.campaigns.soak_client import VISIT_TOKENS, Clients, Pool
from tests.campaigns.soak_jobs import Corpus, Job, make_corpus
from tests.campaigns.soak_residue import Holdings, Memory, left_over

CORPUS = make_corpus(0)
JOB = Job(0, (3, 5), [8, 9], 0.9, 0.9, list(range(100, 140)), [-1.0] * 40)
PLAIN = JOB._replace(documents=())


class Answers:
    """A server's: ids of others are unknown, and texts get the oracle's answer, computed anew."""

    known_status = 400
    cached_tokens = 0
    scored_tokens = 6
    output_ids = JOB.tokens[:VISIT_TOKENS]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["extra_key"] == "new"
        if "id" in body.get("contexts", [{}])[0]:
            error = {"message": "unknown", "param": "contexts[0].id"}
            return httpx.Response(self.known_status, json={"error": error})
        ape = {"scored_tokens": self.scored_tokens}
        meta = {"cached_tokens": self.cached_tokens, "ape": ape}
        return httpx.Response(200, json={"output_ids": self.output_ids, "meta_info": meta})


def faults_of_visit(answers: Answers, job: Job = JOB, corpus: Corpus = CORPUS) -> list[str]:
    ids = {place: f"ctx-{i}" for i, place in enumerate(corpus.places)}

    async def visit() -> list[str]:
        transport = httpx.MockTransport(answers)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as session:
            clients = Clients(session, corpus, ids, Pool(1000, 100))
            await clients.visit(job, "new")
            return clients.faults

    return asyncio.run(visit())


@pytest.mark.parametrize("job", [JOB, PLAIN], ids=["contexts", "plain"])
def test_a_new_tenant_that_finds_nothing_of_others_is_no_fault(job: Job) -> None:
    assert faults_of_visit(Answers(), job) == []


@pytest.mark.parametrize("job", [JOB, PLAIN], ids=["contexts", "plain"])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cached_tokens", 1, "finds KV of others"),
        ("output_ids", [1, 2, 3, 4], "is answered"),
    ],
)
def test_a_cache_that_is_not_kept_apart_is_a_fault(
    job: Job, name: str, value: Any, words: str
) -> None:
    answers = Answers()
    setattr(answers, name, value)
    (fault,) = faults_of_visit(answers, job)
    assert words in fault


def test_scores_that_are_not_kept_apart_are_a_fault() -> None:
    answers = Answers()
    answers.scored_tokens = 0
    scored = JOB._replace(rung={"soft": 0.1}, scores=(-1.0, -2.0))
    (fault,) = faults_of_visit(answers, scored)
    assert "finds scores of others" in fault
    assert not faults_of_visit(answers)


def test_ids_that_are_not_kept_apart_are_a_fault() -> None:
    answers = Answers()
    answers.known_status = 200
    (fault,) = faults_of_visit(answers)
    assert "is given" in fault


SERVER = Holdings("server", 5, Counter({"socket": 3, "/dev/null": 1}), Counter({"handle_loop": 1}))


@pytest.mark.parametrize(
    "after",
    [
        {1: SERVER},
        {1: SERVER._replace(threads=6, handles=Counter({"socket": 2, "pipe": 2}))},
        {1: SERVER._replace(tasks=Counter())},
    ],
    ids=["the same", "others of the same number", "fewer"],
)
def test_what_was_there_before_is_not_left_over(after: dict[int, Holdings]) -> None:
    assert left_over({1: SERVER}, after) == []


@pytest.mark.parametrize(
    ("after", "word"),
    [
        ({1: SERVER._replace(handles=Counter({"socket": 4, "/dev/null": 1}))}, "handles"),
        ({1: SERVER._replace(tasks=Counter({"handle_loop": 1, "sleep": 2}))}, "tasks"),
        ({1: SERVER._replace(threads=500)}, "threads"),
        ({1: SERVER, 2: SERVER}, "is new"),
        ({}, "ended"),
    ],
)
def test_what_is_left_over_is_named(after: dict[int, Holdings], word: str) -> None:
    (found,) = left_over({1: SERVER}, after)
    assert word in found


def test_memory_is_told_by_quarters_of_the_time() -> None:
    memory = Memory([1])
    memory._samples = [{1: mib << 20} for mib in (10, 90, 10, 20, 20, 20, 30, 30, 30, 40, 41, 42)]
    assert memory.quarters(1) == [10, 20, 30, 41]
