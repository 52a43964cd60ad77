"""What answers tell of a request's contexts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape.entry.call import NATIVE, ApeCall
from sglang_ape.entry.report import RowParts, reported, usage_of, with_usage
from sglang_ape.metrics import RequestUsage, Usage

ROW = RowParts(3, (4, 2))
OTHER = RowParts(0, (5,))


class Counted:
    """Stands for ``EntryMetrics``."""

    def __init__(self) -> None:
        self.requests: list[Usage] = []

    def observe_request(self, usage: Usage) -> None:
        self.requests.append(usage)


class Answers:
    """What ``generate_request`` yields, one after another."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.closed = False
        self._answers = answers

    async def __call__(self) -> AsyncIterator[Any]:
        try:
            for answer in self._answers:
                yield answer
        finally:
            self.closed = True


def answer(cached: int, index: int | None = None, finished: bool = True) -> dict[str, Any]:
    meta = {"cached_tokens": cached, "finish_reason": {"type": "stop"} if finished else None}
    return {"text": "a", "meta_info": meta} | ({} if index is None else {"index": index})


def report(
    answers: Sequence[Any], rows: Sequence[RowParts] = (ROW,), samples: int = 1
) -> tuple[list[Any], ApeCall, Counted]:
    call, counted = ApeCall([], False, NATIVE), Counted()

    async def collect() -> list[Any]:
        return [one async for one in reported(Answers(answers)(), rows, samples, call, counted)]

    return asyncio.run(collect()), call, counted


def told(answer: dict[str, Any]) -> tuple[int, int, int]:
    found = answer["meta_info"]["ape"]
    return found["contexts"], found["context_tokens"], found["cached_context_tokens"]


# ---------------------------------------------------------------- usage_of


@given(prefix=st.integers(0, 9), contexts=st.lists(st.integers(1, 9), min_size=1), data=st.data())
def test_of_the_cached_tokens_those_after_the_prefix_and_before_the_query_count(
    prefix: int, contexts: list[int], data: st.DataObject
) -> None:
    parts = ["prefix"] * prefix + ["context"] * sum(contexts) + ["query"] * 5
    cached = data.draw(st.integers(0, len(parts)))
    usage = usage_of(RowParts(prefix, tuple(contexts)), cached)
    wanted = Usage(len(contexts), sum(contexts), parts[:cached].count("context"))
    assert usage == RequestUsage(wanted, cached)


# ---------------------------------------------------------------- reported


def test_an_answer_tells_what_it_had_of_its_contexts() -> None:
    (one,), call, counted = report([answer(8)])
    assert one["meta_info"]["ape"] == {
        "contexts": 2,
        "context_tokens": 6,
        "cached_context_tokens": 5,
        "scored_tokens": 0,
        "refined_tokens": 0,
    }
    assert "contexts" not in one["meta_info"]
    assert one["text"] == "a"
    assert call.usage == {0: RequestUsage(Usage(2, 6, 5), 8)}
    assert counted.requests == [Usage(2, 6, 5)]


def test_every_event_of_a_stream_tells_it_and_the_last_one_counts() -> None:
    events = [answer(8, finished=False), answer(8, finished=False), answer(8), answer(8)]
    found, _, counted = report(events)
    assert [told(one) for one in found] == [(2, 6, 5)] * 4
    assert len(counted.requests) == 1


def test_a_request_that_did_not_end_is_not_counted() -> None:
    assert report([answer(8, finished=False)])[2].requests == []


def test_each_request_of_a_batch_is_told_its_own() -> None:
    (batch,), call, counted = report([[answer(3), answer(4)]], [ROW, OTHER])
    assert [told(one) for one in batch] == [(2, 6, 0), (1, 5, 4)]
    assert {item: usage.cached_tokens for item, usage in call.usage.items()} == {0: 3, 1: 4}
    assert counted.requests == [Usage(2, 6, 0), Usage(1, 5, 4)]


def test_a_streamed_batch_goes_by_index() -> None:
    events = [answer(4, 1, False), answer(9, 0, False), answer(4, 1), answer(9, 0)]
    found, call, counted = report(events, [ROW, OTHER])
    assert [told(one)[0] for one in found] == [1, 2, 1, 2]
    assert sorted(call.usage) == [0, 1]
    assert counted.requests == [Usage(1, 5, 4), Usage(2, 6, 6)]


def test_several_samples_are_one_request() -> None:
    """SGLang lists all samples of the first item, then those of the next."""
    batch = [answer(3), answer(9), answer(9), answer(0), answer(5), answer(5)]
    (found,), call, counted = report([batch], [ROW, OTHER], samples=3)
    assert [told(one)[:2] for one in found] == [(2, 6)] * 3 + [(1, 5)] * 3
    assert {item: usage.cached_tokens for item, usage in call.usage.items()} == {0: 3, 1: 0}
    assert counted.requests == [Usage(2, 6, 0), Usage(1, 5, 0)]


def test_an_answer_without_cached_tokens_had_none() -> None:
    bare = {"meta_info": {"finish_reason": {"type": "stop"}}}
    assert told(report([bare])[0][0]) == (2, 6, 0)


def test_a_client_that_leaves_closes_the_engines_answers() -> None:
    source = Answers([answer(1, finished=False)] * 5)
    call = ApeCall([], False, NATIVE)

    async def leave() -> bool:
        answers = reported(source(), [ROW], 1, call, None)
        await anext(answers)
        await answers.aclose()
        return source.closed  # the end of the loop would close it too

    assert asyncio.run(leave())


SCORES = ({"id": "ctx-a", "score": -3.5}, {"id": "ctx-b", "score": -1.0})


def test_what_scoring_found_and_computed_is_told() -> None:
    scored = ROW._replace(scores=SCORES, scored_tokens=12, encoded_tokens=7)
    (one,), call, counted = report([answer(9)], [scored])
    info = one["meta_info"]
    assert info["contexts"] == list(SCORES)
    assert info["cached_tokens"] == 2, "what its own scoring brought into the cache was computed"
    assert info["ape"]["cached_context_tokens"] == 0
    assert (info["ape"]["scored_tokens"], info["ape"]["refined_tokens"]) == (12, 0)
    assert counted.requests == [Usage(2, 6, 0, scored_tokens=12)]
    assert call.usage[0].scores == SCORES


def test_refined_tokens_are_those_of_the_sequence_that_were_not_cached() -> None:
    (one,), _, _ = report([answer(7)], [ROW._replace(is_refined=True)])
    assert one["meta_info"]["ape"]["refined_tokens"] == 2


# ---------------------------------------------------------------- with_usage


USAGE = {0: usage_of(ROW, 8), 1: usage_of(OTHER, 2)}
DETAILS = {
    "cached_tokens": 10,
    "contexts": 3,
    "context_tokens": 11,
    "cached_context_tokens": 7,
    "scored_tokens": 0,
    "refined_tokens": 0,
}


def body(**usage: Any) -> bytes:
    return json.dumps({"choices": [{"text": 'a "usage"\n\ndata: {'}], "usage": usage}).encode()


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def test_an_answer_gets_the_sums_over_its_prompts() -> None:
    before = body(prompt_tokens=30, total_tokens=40)
    after = json.loads(with_usage(before, USAGE))
    assert after["usage"].pop("prompt_tokens_details") == DETAILS
    assert after == json.loads(before)


def test_scores_stand_beside_the_counts_of_tokens() -> None:
    usage = {0: usage_of(ROW._replace(scores=SCORES), 8)}
    after = json.loads(with_usage(body(prompt_tokens=1), usage))["usage"]
    assert after["contexts"] == list(SCORES)
    both = {**USAGE, 1: usage[0]}
    assert json.loads(with_usage(body(prompt_tokens=1), both))["usage"]["contexts"] == [
        [],
        list(SCORES),
    ]
    assert "contexts" not in json.loads(with_usage(body(prompt_tokens=1), USAGE))["usage"]


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": 4}, {"audio_tokens": 0}])
def test_other_details_are_kept(details: Any) -> None:
    after = json.loads(with_usage(body(prompt_tokens_details=details, x=1), USAGE))
    assert after["usage"] == {"prompt_tokens_details": {**(details or {}), **DETAILS}, "x": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not JSON",
        b'{"choices": []}',
        b'{"error": "\\"usage\\""}',
        b'{"usage": null}',
        event(b"[DONE]"),
        event(b'{"choices": [], "usage": null}'),
        event(b'{"text": "usage"}') + event(b"[DONE]"),
    ],
)
def test_a_body_without_usage_passes_byte_for_byte(data: bytes) -> None:
    assert with_usage(data, USAGE) == data


def test_a_body_of_a_request_that_has_no_answer_yet_passes_byte_for_byte() -> None:
    assert with_usage(body(prompt_tokens=1), {}) == body(prompt_tokens=1)


def test_of_a_stream_only_the_usage_changes() -> None:
    first, last, done = event(b'{"usage": null, "a":  1}'), body(prompt_tokens=1), event(b"[DONE]")
    after = with_usage(first + event(last) + done, USAGE)
    assert after == first + event(with_usage(last, USAGE)) + done
    assert json.loads(with_usage(last, USAGE))["usage"]["prompt_tokens_details"] == DETAILS


def test_an_abort_has_the_length_that_sglangs_streams_read() -> None:
    """They read it where log-probabilities were asked for; SGLang leaves it out of an abort."""
    aborted = answer(0)
    aborted["meta_info"]["finish_reason"] = {"type": "abort"}
    told, _, _ = report([aborted, answer(0)])
    assert told[0]["meta_info"]["output_token_logprobs_length"] == 0
    assert "output_token_logprobs_length" not in told[1]["meta_info"]
