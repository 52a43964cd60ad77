"""soft and refine through the routes: streams, chats, samples, aborts, and what answers tell."""

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.server import Server

CONTEXTS = [
    "The harbour master keeps a ledger of every ship.",
    "A lighthouse stands on the northern cliff.",
    "The baker sells the loaves warm before the school bell rings.",
]
QUESTION = "Question: who keeps the ledger? Answer:"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = (
        *("--enable-ape", "--max-total-tokens", "12000", "--ape-max-context-tokens", "10000"),
        *("--enable-cache-report", "--enable-metrics", "--served-model-name", "tiny"),
        *("--chunked-prefill-size", "512"),
    )
    with Server(tiny_llama, flags, log) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def body(ape: dict[str, Any], **given: Any) -> dict[str, Any]:
    fields = {"contexts": CONTEXTS, "text": QUESTION, "sampling_params": GREEDY, "ape": ape}
    return {**fields, **given}


RUNGS = pytest.mark.parametrize("ape", [{"soft": 0.2}, {"refine": 2}], ids=str)


@RUNGS
def test_a_stream_ends_in_the_answer_of_the_plain_call(server: Server, ape: dict[str, Any]) -> None:
    whole = server.generate(body(ape))
    with server.client.stream("POST", "/generate", json=body(ape, stream=True)) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events[-1]["output_ids"] == whole["output_ids"]
    for event in events:
        assert event["meta_info"]["contexts"] == whole["meta_info"]["contexts"]


@RUNGS
def test_parallel_samples_are_scored_once(server: Server, ape: dict[str, Any]) -> None:
    text = f"Another question, of {ape}?"
    answers = server.generate(body(ape, text=text, sampling_params={**GREEDY, "n": 3}))
    assert len({tuple(one["output_ids"]) for one in answers}) == 1
    (scored,) = {one["meta_info"]["ape"]["scored_tokens"] for one in answers}
    assert scored == 3 * (1 + answers[0]["meta_info"]["prompt_tokens"] - tokens_before(answers[0]))
    server.assert_clean()


def tokens_before(answer: dict[str, Any]) -> int:
    """Tokens of a prompt before its query; P are BOS and two newlines."""
    prefix = 3 if answer["meta_info"]["ape"]["contexts"] else 0
    return prefix + answer["meta_info"]["ape"]["context_tokens"]


def test_the_contexts_of_an_answer_have_the_ids_of_the_store(server: Server) -> None:
    response = server.post("/ape/contexts", {"contexts": CONTEXTS})
    known = [context["id"] for context in response.json()["contexts"]]
    answer = server.generate(body({"soft": 0.2}))
    assert [one["id"] for one in answer["meta_info"]["contexts"]] == known
    by_id = server.generate(body({"soft": 0.2}, contexts=[{"id": id} for id in known]))
    assert by_id["output_ids"] == answer["output_ids"]
    assert by_id["meta_info"]["contexts"] == answer["meta_info"]["contexts"]


def test_openai_routes_tell_scores_and_what_was_spent(
    server: Server, client: openai.OpenAI
) -> None:
    extra = {"contexts": CONTEXTS, "ape": {"soft": 0.2}}
    messages: Any = [{"role": "user", "content": "Who keeps the ledger?"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, extra_body=extra, temperature=0, max_tokens=6
    )
    text = client.completions.create(
        model="tiny", prompt="Who keeps the ledger?", extra_body=extra, temperature=0, max_tokens=6
    )
    events = list(
        client.completions.create(
            model="tiny",
            prompt="Who keeps the ledger?",
            extra_body=extra,
            temperature=0,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for answer in (chat, text, events[-1]):
        usage: Any = answer.usage
        assert len(usage.contexts) == 3
        assert all(one["score"] < 0 for one in usage.contexts)
        assert usage.prompt_tokens_details.refined_tokens == 0
    assert chat.usage.prompt_tokens_details.scored_tokens > 0  # type: ignore[union-attr]
    assert events[-1].usage.contexts == text.usage.contexts  # type: ignore[union-attr]
    assert events[-1].usage.prompt_tokens_details.scored_tokens == 0  # type: ignore[union-attr]


def test_scores_are_forgotten_with_the_cache(server: Server) -> None:
    first = server.generate(body({"soft": 0.3}))["meta_info"]
    assert server.generate(body({"soft": 0.3}))["meta_info"]["ape"]["scored_tokens"] == 0
    server.flush()
    again = server.generate(body({"soft": 0.3}))["meta_info"]
    assert again["ape"]["scored_tokens"] > 0 and again["cached_tokens"] == 0
    for one, other in zip(first["contexts"], again["contexts"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_what_cannot_be_refined_is_refused_with_the_numbers(server: Server) -> None:
    contexts = [{"input_ids": [5] * 1500}, {"input_ids": [6] * 1500}]
    response = server.post("/generate", body({"refine": 2}, contexts=contexts))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "ape.refine" and "2048" in error["message"]


def large_body(rng: random.Random) -> dict[str, Any]:
    """Takes a while to be scored."""

    def ids(count: int) -> list[int]:
        return [rng.randrange(4, 512) for _ in range(count)]

    contexts = [{"input_ids": ids(600)} for _ in range(10)]
    given = body({"soft": 0.1}, contexts=contexts, input_ids=ids(300))
    del given["text"]
    return given


def test_a_request_that_is_aborted_while_it_is_scored_ends_at_once(server: Server) -> None:
    rng = random.Random(3)
    began = time.monotonic()
    assert server.post("/generate", large_body(rng)).status_code == 200
    usual = time.monotonic() - began

    answers: list[Any] = []
    asked = large_body(rng) | {"rid": "to-be-aborted"}
    asking = threading.Thread(target=lambda: answers.append(server.post("/generate", asked)))
    asking.start()
    time.sleep(usual / 5)
    assert server.post("/abort_request", {"rid": "to-be-aborted"}).status_code == 200
    asking.join(60)
    (response,) = answers
    assert response.status_code == 499, response.text
    assert "aborted" in response.json()["error"]["message"]
    server.assert_clean()
    server.flush()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_is_scored_leaves_nothing_behind(
    server: Server, stream: bool
) -> None:
    rng = random.Random(4)
    for _ in range(3):
        with pytest.raises(Exception, match="timed out"):
            server.client.post("/generate", json=large_body(rng) | {"stream": stream}, timeout=0.1)
    server.generate(body({"soft": 0.2}))
    server.assert_clean()
    server.flush()


def test_metrics_count_what_scoring_and_refining_took(server: Server) -> None:
    def spent(rung: str) -> float:
        text = server.client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("sglang:ape_ladder_tokens")]
        return sum(float(line.split()[-1]) for line in lines if f'rung="{rung}"' in line)

    server.flush()
    before = spent("score"), spent("refine")
    told = server.generate(body({"refine": 2}, text="Something else?"))["meta_info"]["ape"]
    assert told["scored_tokens"] > 0 and told["refined_tokens"] > 0
    after = spent("score"), spent("refine")
    found = [new - old for new, old in zip(after, before, strict=True)]
    assert found == [told["scored_tokens"], told["refined_tokens"]]
