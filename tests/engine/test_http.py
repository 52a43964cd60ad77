"""The HTTP routes: texts, chat, streams, batches, and bodies that must be refused."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.support.oracle import Oracle
from tests.support.server import Server

CONTEXTS = [
    "The harbour master keeps a ledger of every ship.",
    "A lighthouse stands on the northern cliff.",
    "The baker sells the loaves warm before the school bell rings.",
]
QUESTION = "Question: who keeps the ledger? Answer:"
SYSTEM = "You are a helpful assistant."
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
WINDOW = 2048
POOL = 5900


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = (
        *("--enable-ape", "--ape-temperature", "0.8", "--ape-scale", "0.7"),
        *("--ape-max-context-tokens", "4000", "--max-total-tokens", str(POOL)),
        *("--enable-cache-report", "--served-model-name", "tiny"),
    )
    with Server(tiny_llama, flags, log) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Oracle:
    return Oracle(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _chat_parts(tokenizer: Any, *later: str) -> tuple[list[int], list[int]]:
    """P and Q of a chat with SYSTEM and QUESTION, by cutting the rendered text by hand."""
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    tail = f"{QUESTION}<|im_end|>\n{''.join(later)}<|im_start|>assistant\n"
    return _ids(tokenizer, head), _ids(tokenizer, tail)


MESSAGES = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": QUESTION},
]


def test_texts_are_tokenised_one_by_one_and_bos_goes_to_the_prefix(
    server: Server, oracle: Oracle, tokenizer: Any
) -> None:
    answer = server.generate(
        {
            "prefix": "Documents:\n",
            "contexts": [CONTEXTS[0], {"text": CONTEXTS[1]}],
            "text": QUESTION,
            "sampling_params": GREEDY,
        }
    )
    prefix = tokenizer.encode("Documents:\n")
    assert prefix[0] == tokenizer.bos_token_id
    contexts = [_ids(tokenizer, text) for text in CONTEXTS[:2]]
    query = _ids(tokenizer, QUESTION)
    expected = oracle.generate(prefix, contexts, query, 6, 0.8, 0.7)
    assert answer["output_ids"] == expected.token_ids
    tokens = len(prefix) + sum(map(len, contexts)) + len(query)
    assert answer["meta_info"]["prompt_tokens"] == tokens


def test_the_default_prefix_is_bos_and_two_newlines(
    server: Server, oracle: Oracle, tokenizer: Any
) -> None:
    answer = server.generate({"contexts": CONTEXTS, "text": QUESTION, "sampling_params": GREEDY})
    prefix = [tokenizer.bos_token_id, *_ids(tokenizer, "\n\n")]
    contexts = [_ids(tokenizer, text) for text in CONTEXTS]
    expected = oracle.generate(prefix, contexts, _ids(tokenizer, QUESTION), 6, 0.8, 0.7)
    assert answer["output_ids"] == expected.token_ids


def test_a_native_stream_ends_in_the_answer_of_the_plain_call(server: Server) -> None:
    body = {"contexts": CONTEXTS, "text": QUESTION, "sampling_params": GREEDY}
    whole = server.generate(body)
    events = []
    with server.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    assert len(events) > 1
    assert events[-1]["text"] == whole["text"]


def test_a_batch_gives_each_request_its_own_contexts(server: Server) -> None:
    shared = {"sampling_params": GREEDY, "ape": {"temperature": 0.5}}
    lists = [CONTEXTS[:1], CONTEXTS[1:]]
    single = [server.generate({**shared, "contexts": own, "text": QUESTION}) for own in lists]
    batch = server.generate({**shared, "contexts": lists, "text": [QUESTION] * 2})
    assert [a["output_ids"] for a in batch] == [a["output_ids"] for a in single]


def test_parallel_samples_share_one_prompt(server: Server) -> None:
    body = {"contexts": CONTEXTS, "text": QUESTION, "sampling_params": GREEDY}
    one = server.generate(body)
    three = server.generate({**body, "sampling_params": {**GREEDY, "n": 3}})
    assert [answer["output_ids"] for answer in three] == [one["output_ids"]] * 3


def test_completions_equal_the_native_route(server: Server, client: openai.OpenAI) -> None:
    native = server.generate(
        {"prefix": "Docs: ", "contexts": CONTEXTS, "text": QUESTION, "sampling_params": GREEDY}
    )
    extra = {"contexts": CONTEXTS, "prefix": "Docs: ", "ignore_eos": True}
    options: dict[str, Any] = dict(
        model="tiny", prompt=QUESTION, max_tokens=6, temperature=0, extra_body=extra
    )
    answer = client.completions.create(**options)
    assert answer.choices[0].text == native["text"]
    assert answer.usage and answer.usage.prompt_tokens == native["meta_info"]["prompt_tokens"]
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    streamed = client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == native["text"]


def test_a_chat_puts_contexts_before_the_first_user_content(
    client: openai.OpenAI, oracle: Oracle, tokenizer: Any
) -> None:
    prefix, query = _chat_parts(tokenizer)
    contexts = [_ids(tokenizer, text) for text in CONTEXTS]
    expected = oracle.generate(prefix, contexts, query, 6, 0.6, 0.9)
    options: dict[str, Any] = dict(
        model="tiny",
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        extra_body={
            "contexts": CONTEXTS,
            "ape": {"temperature": 0.6, "scale": 0.9},
            "ignore_eos": True,
        },
    )
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == tokenizer.decode(expected.token_ids)
    total = len(prefix) + sum(map(len, contexts)) + len(query)
    assert answer.usage and answer.usage.prompt_tokens == total
    streamed = client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
    assert "".join(pieces) == answer.choices[0].message.content


def test_a_later_turn_of_a_chat_reuses_prefix_and_contexts(
    client: openai.OpenAI, tokenizer: Any
) -> None:
    extra = {"contexts": CONTEXTS, "ignore_eos": True}
    first = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, extra_body=extra
    )
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And who trims the lamp?"},
    ]
    second = client.chat.completions.create(
        model="tiny", messages=turns, max_tokens=4, temperature=0, extra_body=extra
    )
    prefix, query = _chat_parts(tokenizer)
    contexts = sum(len(_ids(tokenizer, text)) for text in CONTEXTS)
    assert second.usage and second.usage.prompt_tokens_details
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= len(prefix) + contexts + len(query) - 8


def test_structured_output_holds_with_contexts(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ship": {"enum": ["Heron", "Lark"]}},
        "required": ["ship"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=60,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        extra_body={"contexts": CONTEXTS},
    )
    assert json.loads(answer.choices[0].message.content or "")["ship"] in ("Heron", "Lark")


def _long(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [7 + i % 400] * 100} for i in range(count)]


REFUSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "no contexts": ({"contexts": []}, "contexts"),
    "contexts of the wrong type": ({"contexts": "one"}, "contexts"),
    "an empty context": ({"contexts": ["a", ""]}, "contexts[1]"),
    "an empty context by ids": ({"contexts": [{"input_ids": []}]}, "contexts[0].input_ids"),
    "a number as context": ({"contexts": ["a", "b", 3]}, "contexts[2]"),
    "an unknown key in a context": ({"contexts": [{"text": "a", "x": 1}]}, "contexts[0]"),
    "text and ids in a context": (
        {"contexts": [{"text": "a", "input_ids": [5]}]},
        "contexts[0]",
    ),
    "ids that are no integers": ({"contexts": [{"input_ids": [5, "6"]}]}, "contexts[0].input_ids"),
    "ids outside the vocabulary": ({"contexts": [{"input_ids": [5, 512]}]}, "contexts[0]"),
    "negative ids": ({"contexts": [{"input_ids": [-1]}]}, "contexts[0].input_ids"),
    "an unknown id": ({"contexts": [{"id": "ctx-0"}]}, "contexts[0].id"),
    "temperature zero": ({"ape": {"temperature": 0}}, "ape.temperature"),
    "temperature negative": ({"ape": {"temperature": -0.1}}, "ape.temperature"),
    "temperature beyond its range": ({"ape": {"temperature": 10.1}}, "ape.temperature"),
    "temperature NaN": ({"ape": {"temperature": float("nan")}}, "ape.temperature"),
    "temperature infinite": ({"ape": {"temperature": float("inf")}}, "ape.temperature"),
    "temperature as text": ({"ape": {"temperature": "1"}}, "ape.temperature"),
    "scale negative": ({"ape": {"scale": -1}}, "ape.scale"),
    "scale beyond its range": ({"ape": {"scale": 11}}, "ape.scale"),
    "scale NaN": ({"ape": {"scale": float("nan")}}, "ape.scale"),
    "an unknown key in ape": ({"ape": {"heat": 1}}, "ape.heat"),
    "ape of the wrong type": ({"ape": [1]}, "ape"),
    "both forms of the prefix": ({"prefix": "a", "prefix_ids": [5]}, "prefix_ids"),
    "prefix of the wrong type": ({"prefix": 5}, "prefix"),
    "text and ids": ({"input_ids": [5, 6]}, "input_ids"),
    "an empty query": ({"text": ""}, "text"),
    "an image": ({"image_data": "http://localhost/a.png"}, "image_data"),
    "embeddings": ({"input_embeds": [[0.1, 0.2]]}, "input_embeds"),
    "a session": ({"session_params": {"id": "s"}}, "session_params"),
    "a session by id": ({"session_id": "s"}, "session_id"),
    "more contexts than the limit": ({"contexts": _long(41)}, "contexts"),
    "a context over the window": ({"contexts": [{"input_ids": [7] * WINDOW}]}, "contexts[0]"),
    "a query over the window": (
        {"text": None, "input_ids": [7] * (WINDOW - 4)},
        "input_ids",
    ),
    "more new tokens than the window": (
        {"sampling_params": {"max_new_tokens": WINDOW}},
        "sampling_params.max_new_tokens",
    ),
    "reserved parameters": (
        {"sampling_params": {"custom_params": {"ape_context_lens": [1]}}},
        "custom_params",
    ),
    "lists of contexts for one text": ({"contexts": [["a"], ["b"]]}, "contexts"),
    "one list of contexts for two texts": ({"text": ["a", "b"]}, "contexts"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_bad_input_is_refused_by_field_and_the_server_serves_on(
    server: Server, case: str, stream: bool
) -> None:
    change, param = REFUSED[case]
    body = {"contexts": ["a", "b"], "text": QUESTION, "stream": stream, **change}
    response = _post_raw(server, "/generate", json.dumps(body).encode())
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == 400 and error["message"]
    server.assert_alive()


def _post_raw(server: Server, path: str, body: bytes) -> httpx.Response:
    """Post on a connection of its own: an idle one may be closed while a large body is made."""
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=300)


def test_limits_are_refused_with_the_numbers(server: Server) -> None:
    body = {"contexts": _long(41), "text": QUESTION}
    message = server.post("/generate", body).json()["error"]["message"]
    assert "4100" in message and "4000" in message


def test_a_request_larger_than_the_pool_is_refused(server: Server) -> None:
    body = {"input_ids": [9] * 1900, "prefix_ids": [8] * 30}
    fitting, too_large = _long(39), _long(40)
    assert 3900 + 1900 + 30 < POOL < 4000 + 1900 + 30
    assert server.post("/generate", {**body, "contexts": fitting}).status_code == 200
    response = server.post("/generate", {**body, "contexts": too_large})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "5930" in message and "pool" in message


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_routes_refuse_in_the_same_form(server: Server, route: str, stream: bool) -> None:
    body = {
        "model": "tiny",
        "prompt": QUESTION,
        "messages": MESSAGES,
        "stream": stream,
        "contexts": ["a", {"input_ids": [5] * WINDOW}],
    }
    response = server.post(route, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "contexts[1]"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prefix": "a"}, "prefix"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"input_ids": [5, 6]}, "input_ids"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://localhost"}}
                        ],
                    }
                ]
            },
            "messages[0].content",
        ),
    ],
)
def test_a_chat_that_cannot_hold_contexts_is_refused(
    server: Server, change: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "contexts": ["a"], **change}
    response = server.post("/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b'{"contexts": ["a", "b"], "text": "caf\xe9"}',
        b'{"contexts": ["a", "b"], "text": "cut',
        b'{"contexts": ["\\ud800"], "text": "a"}',
        b'{"contexts": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "a"}',
        b'{"contexts": ["a"], "text": "a", "ape": {"temperature": 1' + b"0" * 10_000 + b"}}",
    ],
    ids=["invalid UTF-8", "cut off", "a lone surrogate", "deeply nested", "a huge number"],
)
def test_a_body_that_cannot_be_read_is_refused(server: Server, body: bytes) -> None:
    response = _post_raw(server, "/generate", body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
    server.assert_alive()


def _resident_megabytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def test_a_body_of_200_megabytes_is_refused_and_its_memory_given_back(server: Server) -> None:
    before = _resident_megabytes(server.process.pid)
    filler = b"a" * (200 << 20)
    body = b'{"contexts": ["' + filler + b'"], "text": "a"}'
    assert _post_raw(server, "/generate", body).status_code == 413
    server.generate({"contexts": ["a", "b"], "text": QUESTION, "sampling_params": GREEDY})
    assert _resident_megabytes(server.process.pid) - before < 100


def test_one_million_empty_contexts_are_refused_at_once(server: Server) -> None:
    response = server.post("/generate", {"contexts": [""] * 1_000_000, "text": "a"})
    error = response.json()["error"]
    assert error["param"] == "contexts" and "1000000 contexts" in error["message"]


def test_aborted_streams_leave_nothing_behind(server: Server) -> None:
    rng = random.Random(1)
    for _ in range(6):
        contexts = [{"input_ids": [rng.randrange(4, 512) for _ in range(200)]} for _ in range(5)]
        body = {
            "contexts": contexts,
            "text": QUESTION,
            "stream": True,
            "sampling_params": {"max_new_tokens": 500, "ignore_eos": True},
        }
        with server.client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
    server.assert_clean()
    server.flush()
