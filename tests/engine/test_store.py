"""The context store of a real server: ids, pins, eviction, tenants, metrics, and who may ask."""

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import sglang as sgl

from sglang_ape import ContextStore
from tests.engine.conftest import API_KEY
from tests.support.server import Server

PREFIX = "Documents:\n"
CONTEXTS = [
    "The harbour master keeps a ledger of every ship.",
    "A lighthouse stands on the northern cliff.",
    "The baker sells the loaves warm before the school bell rings.",
]
QUESTION = "Question: who keeps the ledger? Answer:"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": QUESTION},
]
MAX_PINNED = 2000


@pytest.fixture
def server(store_server: Server) -> Iterator[Server]:
    """The shared server, empty: nothing known, nothing cached, nothing used at the end."""
    _forget_all(store_server)
    store_server.flush()
    yield store_server
    _forget_all(store_server)
    store_server.assert_clean()


def _forget_all(server: Server) -> None:
    while known := _get(server, "/ape/contexts?limit=1000")["contexts"]:
        for context in known:
            assert server.client.delete(f"/ape/contexts/{context['id']}").status_code == 200


def _get(server: Server, path: str) -> Any:
    response = server.client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def _register(server: Server, contexts: list[Any], **fields: Any) -> list[dict[str, Any]]:
    response = server.post("/ape/contexts", {"prefix": PREFIX, "contexts": contexts} | fields)
    assert response.status_code == 200, response.text
    return response.json()["contexts"]


def _by_id(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"id": context["id"]} for context in found]


def _ask(server: Server, contexts: list[Any], **fields: Any) -> Any:
    body = {"contexts": contexts, "text": QUESTION, "sampling_params": GREEDY}
    return server.generate(body | fields)


def _tokens(seed: int, size: int) -> dict[str, list[int]]:
    return {"input_ids": random.Random(seed).choices(range(10, 500), k=size)}


def _metric(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric over its other labels."""
    total = 0.0
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(f"sglang:{name}{{") and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            total += float(line.rsplit(" ", 1)[1])
    return total


# ---------------------------------------------------------------- ids


def test_contexts_by_id_give_the_answer_of_their_texts(server: Server) -> None:
    found = _register(server, CONTEXTS)
    by_text = _ask(server, CONTEXTS, prefix=PREFIX)
    by_id = _ask(server, _by_id(found))
    mixed = _ask(server, [*_by_id(found[:1]), *CONTEXTS[1:]], prefix=PREFIX)
    assert by_text["output_ids"] == by_id["output_ids"] == mixed["output_ids"]
    tokens = sum(context["tokens"] for context in found)
    usage = {
        "contexts": 3,
        "context_tokens": tokens,
        "cached_context_tokens": tokens,
        "scored_tokens": 0,
        "refined_tokens": 0,
    }
    assert by_text["meta_info"]["ape"] == by_id["meta_info"]["ape"] == usage


def test_the_same_content_has_the_same_id_and_is_computed_once(server: Server) -> None:
    first = _register(server, CONTEXTS)
    again = _register(server, [{"text": CONTEXTS[1]}, CONTEXTS[0]])
    assert [context["id"] for context in again] == [first[1]["id"], first[0]["id"]]
    assert all(context["cached_tokens"] == context["tokens"] for context in again)
    assert len({context["id"] for context in first}) == 3
    assert _get(server, "/ape/contexts")["total"] == 3


def test_an_id_changes_with_prefix_tenant_and_content(server: Server) -> None:
    variants: list[dict[str, Any]] = [{}, {"prefix": "Notes:\n"}, {"extra_key": "tenant"}]
    ids = [_register(server, CONTEXTS[:1], **fields)[0]["id"] for fields in variants]
    ids.append(_register(server, [CONTEXTS[0] + "."])[0]["id"])
    assert len(set(ids)) == 4


def test_a_request_with_another_prefix_is_refused_by_name(server: Server) -> None:
    found = _register(server, CONTEXTS[:2])
    body = {"contexts": ["one", *_by_id(found)], "prefix": "Notes:\n", "text": QUESTION}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "contexts[1].id"
    assert "another prefix" in response.json()["error"]["message"]


def test_ids_of_a_batch_are_those_of_each_request(server: Server) -> None:
    found = _register(server, CONTEXTS)
    batch = server.generate(
        {
            "text": [QUESTION, QUESTION],
            "contexts": [_by_id(found[:1]), _by_id(found[1:])],
            "sampling_params": GREEDY,
        }
    )
    alone = [_ask(server, _by_id(part)) for part in (found[:1], found[1:])]
    assert [one["output_ids"] for one in batch] == [one["output_ids"] for one in alone]
    assert [one["meta_info"]["ape"]["contexts"] for one in batch] == [1, 2]


# ---------------------------------------------------------------- OpenAI routes


@pytest.fixture(scope="module")
def client(store_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{store_server.url}/v1", api_key=API_KEY, max_retries=0)


def _chat(client: openai.OpenAI, contexts: list[Any], **options: Any) -> Any:
    extra = {"contexts": contexts, **options.pop("extra_body", {})}
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    return client.chat.completions.create(**(given | options), extra_body=extra)


@pytest.mark.parametrize("messages", [MESSAGES[:1], MESSAGES], ids=["system", "whole-chat"])
def test_ids_registered_with_the_messages_serve_a_chat(
    server: Server, client: openai.OpenAI, messages: list[Any]
) -> None:
    by_text = _chat(client, CONTEXTS)
    found = _register(server, CONTEXTS, prefix=None, messages=messages)
    assert all(context["cached_tokens"] == context["tokens"] for context in found)
    by_id = _chat(client, _by_id(found))
    assert by_id.choices[0].message.content == by_text.choices[0].message.content
    tokens = sum(context["tokens"] for context in found)
    details = by_id.usage.prompt_tokens_details
    assert (details.contexts, details.context_tokens) == (3, tokens)
    assert details.cached_context_tokens == tokens < details.cached_tokens


def test_a_stream_reports_the_same_usage_at_its_end(server: Server, client: openai.OpenAI) -> None:
    found = _by_id(_register(server, CONTEXTS, prefix=None, messages=MESSAGES))
    whole = _chat(client, found)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(_chat(client, found, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.prompt_tokens_details.contexts == 3
    expected = whole.usage.prompt_tokens_details.cached_context_tokens
    assert usage.prompt_tokens_details.cached_context_tokens == expected


def test_several_choices_count_the_contexts_once(server: Server, client: openai.OpenAI) -> None:
    found = _by_id(_register(server, CONTEXTS, prefix=None, messages=MESSAGES))
    answer = _chat(client, found, n=3, temperature=1.0)
    assert len(answer.choices) == 3
    assert answer.usage.prompt_tokens_details.contexts == 3


SHIP = {
    "type": "object",
    "properties": {"ship": {"enum": ["Heron", "Lark"]}},
    "required": ["ship"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": SHIP}}]


@pytest.mark.parametrize("by", ["text", "id"])
def test_a_required_tool_is_called_with_contexts_present(
    server: Server, client: openai.OpenAI, by: str
) -> None:
    found = _register(server, CONTEXTS, prefix=None, messages=MESSAGES, tools=TOOLS)
    contexts = CONTEXTS if by == "text" else _by_id(found)
    options: Any = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    options["parallel_tool_calls"] = False  # this model would never stop calling
    message = _chat(client, contexts, **options).choices[0].message
    call = message.tool_calls[0].function
    assert call.name == "look_up"
    assert json.loads(call.arguments)["ship"] in ("Heron", "Lark")
    chunks = _chat(client, contexts, stream=True, **options)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [part.function for delta in deltas for part in delta.tool_calls or ()]
    assert calls[0].name == "look_up"
    assert "".join(part.arguments or "" for part in calls) == call.arguments


def test_a_json_schema_holds_with_ids(server: Server, client: openai.OpenAI) -> None:
    found = _by_id(_register(server, CONTEXTS, prefix=None, messages=MESSAGES))
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SHIP}}
    answer = _chat(client, found, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content or "")["ship"] in ("Heron", "Lark")


def test_completions_take_ids(server: Server, client: openai.OpenAI) -> None:
    found = _by_id(_register(server, CONTEXTS))
    options: Any = {"model": "tiny", "prompt": QUESTION, "max_tokens": 6, "temperature": 0}
    extra = {"ignore_eos": True}
    by_id = client.completions.create(**options, extra_body={"contexts": found, **extra})
    body = {"contexts": CONTEXTS, "prefix": PREFIX, **extra}
    by_text = client.completions.create(**options, extra_body=body)
    assert by_id.choices[0].text == by_text.choices[0].text
    assert by_id.usage and by_id.usage.prompt_tokens_details
    assert by_id.usage.prompt_tokens_details.contexts == 3  # type: ignore[attr-defined]


# ---------------------------------------------------------------- programs


@sgl.function
def one_question(s: Any, documents: list[Any]) -> None:
    s += PREFIX
    s += sgl.parallel_contexts(documents)
    s += QUESTION + sgl.gen("answer", temperature=0, max_tokens=6, ignore_eos=True)


def test_a_program_takes_ids_beside_texts(server: Server) -> None:
    backend = sgl.RuntimeEndpoint(server.url, api_key=API_KEY)
    ids = _by_id(ContextStore(backend).register(CONTEXTS[:2], prefix=PREFIX))
    by_text = one_question.run(documents=CONTEXTS, backend=backend)
    by_id = one_question.run(documents=[*ids, CONTEXTS[2]], backend=backend)
    assert by_id["answer"] == by_text["answer"]
    assert by_id["answer"] == _ask(server, CONTEXTS, prefix=PREFIX)["text"]
    assert by_id.get_meta_info("answer")["ape"]["contexts"] == 3


# ---------------------------------------------------------------- the cache


def test_a_flush_empties_the_cache_and_keeps_ids_and_pins(server: Server) -> None:
    found = _register(server, CONTEXTS, pin=True)
    before = _ask(server, _by_id(found))
    server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    listed = _get(server, "/ape/contexts")["contexts"]
    assert [context["cached_tokens"] for context in listed] == [0, 0, 0]
    assert all(context["pinned"] for context in listed)
    after = _ask(server, _by_id(found))
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["ape"]["cached_context_tokens"] == 0
    _fill_the_pool(server)
    again = _get(server, "/ape/contexts")["contexts"]
    assert [c["cached_tokens"] for c in again] == [c["tokens"] for c in found]


def test_an_evicted_context_still_answers_by_its_id(server: Server) -> None:
    found = _register(server, CONTEXTS)
    before = _ask(server, _by_id(found))
    evicted = _metric(server, "ape_evicted_contexts_total")
    _fill_the_pool(server)
    listed = _get(server, "/ape/contexts")["contexts"]
    assert all(context["cached_tokens"] < context["tokens"] for context in listed)
    assert _metric(server, "ape_evicted_contexts_total") >= evicted + 3
    after = _ask(server, _by_id(found))
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["ape"]["cached_context_tokens"] == 0


def test_pinned_contexts_outlive_traffic_that_fills_the_pool(server: Server) -> None:
    pinned = _register(server, CONTEXTS[:2], pin=True)
    (loose,) = _register(server, CONTEXTS[2:])
    _fill_the_pool(server)
    listed = {context["id"]: context for context in _get(server, "/ape/contexts")["contexts"]}
    for context in pinned:
        assert listed[context["id"]]["cached_tokens"] == context["tokens"]
    assert listed[loose["id"]]["cached_tokens"] < loose["tokens"]
    server.client.delete(f"/ape/contexts/{pinned[0]['id']}")
    assert _metric(server, "ape_pinned_tokens") == _get(server, "/ape/contexts")["pinned_tokens"]


def _fill_the_pool(server: Server) -> None:
    """Plain prompts of more tokens than the pool holds."""
    for seed in range(5):
        prompt = _tokens(1000 + seed, 1500)["input_ids"]
        server.generate({"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}})


def test_pins_beyond_the_cap_are_refused_whole(server: Server) -> None:
    _register(server, [_tokens(1, MAX_PINNED // 2)], pin=True)
    before = _get(server, "/ape/contexts")
    body = {"prefix": PREFIX, "contexts": [_tokens(2, 10), _tokens(3, MAX_PINNED // 2)]}
    response = server.post("/ape/contexts", body | {"pin": True})
    assert response.status_code == 507
    assert response.json()["error"]["param"] == "pin"
    assert str(MAX_PINNED) in response.json()["error"]["message"]
    assert _get(server, "/ape/contexts") == before
    assert server.post("/ape/contexts", body).status_code == 200


def test_a_request_that_pins_leave_no_room_for_is_refused_and_others_are_served(
    server: Server,
) -> None:
    """It would wait forever, and every request behind it."""
    (pinned,) = _register(server, [_tokens(4, 1900)], pin=True)
    large = [_tokens(seed, 1100) for seed in range(10, 14)]
    body = {"contexts": large, "prefix": PREFIX, "text": QUESTION, "sampling_params": GREEDY}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "contexts"
    assert "pinned" in response.json()["error"]["message"]
    with_pinned = [{"id": pinned["id"]}, *large[:2]]
    assert _ask(server, with_pinned)["meta_info"]["ape"]["context_tokens"] == 4100
    server.client.delete(f"/ape/contexts/{pinned['id']}")
    assert server.post("/generate", body).status_code == 200


# ---------------------------------------------------------------- at the same time


def test_a_context_registered_many_times_at_once_is_encoded_once(server: Server) -> None:
    contexts = [_tokens(seed, 400) for seed in range(20, 24)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: _register(server, contexts), range(8)))
    assert len({tuple(one["id"] for one in answer) for answer in answers}) == 1
    computed = sum(one["tokens"] - one["cached_tokens"] for answer in answers for one in answer)
    assert computed == 4 * 400
    assert _get(server, "/ape/contexts")["total"] == 4


def test_deleting_a_context_in_use_harms_nobody(server: Server) -> None:
    found = _register(server, CONTEXTS, pin=True)
    long = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    expected = _ask(server, _by_id(found), sampling_params=long)["output_ids"]
    answers: list[Any] = []
    body = {"contexts": _by_id(found), "text": QUESTION, "sampling_params": long}
    users = [
        threading.Thread(target=lambda: answers.append(server.generate(body))) for _ in range(3)
    ]
    for user in users:
        user.start()
    _wait_until_running(server)
    for context in found:
        assert server.client.delete(f"/ape/contexts/{context['id']}").json()["deleted"] is True
    for user in users:
        user.join()
    assert [answer["output_ids"] for answer in answers] == [expected] * 3
    assert server.post("/generate", body).status_code == 400
    assert server.client.get(f"/ape/contexts/{found[0]['id']}").status_code == 404
    assert server.client.delete(f"/ape/contexts/{found[0]['id']}").status_code == 404
    assert _get(server, "/ape/contexts")["pinned_tokens"] == 0


def _wait_until_running(server: Server) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if _get(server, "/v1/loads")["loads"][0]["num_running_reqs"]:
            return
    raise AssertionError("no request came to run")


# ---------------------------------------------------------------- tenants


def test_tenants_share_neither_ids_nor_cache(server: Server) -> None:
    mine = _register(server, CONTEXTS, extra_key="mine")
    yours = _register(server, CONTEXTS, extra_key="yours")
    assert not {one["id"] for one in mine} & {one["id"] for one in yours}
    assert all(context["cached_tokens"] == 0 for context in yours)
    response = server.post(
        "/generate", {"contexts": _by_id(mine), "text": QUESTION, "extra_key": "yours"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "contexts[0].id"
    assert server.post("/generate", {"contexts": _by_id(mine), "text": QUESTION}).status_code == 400
    answer = _ask(server, _by_id(mine), extra_key="mine")
    assert answer["meta_info"]["ape"]["cached_context_tokens"] > 0
    listed = _get(server, "/ape/contexts?extra_key=mine")["contexts"]
    assert [context["id"] for context in listed] == [context["id"] for context in mine]


# ---------------------------------------------------------------- listings, errors, keys


def test_ten_thousand_contexts_are_registered_and_listed_in_pages(server: Server) -> None:
    ids: list[str] = []
    for start in range(0, 10_000, 500):
        contexts = [
            {"input_ids": [10 + i // 400, 10 + i % 400, 5]} for i in range(start, start + 500)
        ]
        ids += [context["id"] for context in _register(server, contexts)]
    assert len(set(ids)) == 10_000
    listed: list[str] = []
    page = _get(server, "/ape/contexts?limit=1000")
    while True:
        listed += [context["id"] for context in page["contexts"]]
        if page["next"] is None:
            break
        page = _get(server, f"/ape/contexts?limit=1000&after={page['next']}")
    assert listed == ids
    assert page["total"] == 10_000
    assert _metric(server, "ape_store_contexts") == 10_000
    answer = _ask(server, [{"id": id} for id in ids[::100]])
    assert answer["meta_info"]["ape"]["contexts"] == 100


REFUSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "no contexts": ({"contexts": []}, "contexts"),
    "contexts of the wrong type": ({"contexts": "one"}, "contexts"),
    "an empty context": ({"contexts": ["a", ""]}, "contexts[1]"),
    "an unknown id": ({"contexts": ["a", {"id": "ctx-0"}]}, "contexts[1].id"),
    "an id outside the vocabulary": ({"contexts": [{"input_ids": [999999]}]}, "contexts[0]"),
    "a context longer than the window": ({"contexts": [{"input_ids": [7] * 3000}]}, "contexts[0]"),
    "two prefixes": ({"prefix": "a", "prefix_ids": [1], "contexts": ["a"]}, "prefix_ids"),
    "a prefix and messages": ({"prefix": "a", "messages": [], "contexts": ["a"]}, "messages"),
    "messages that are none": ({"messages": "hello", "contexts": ["a"]}, "messages"),
    "tools without messages": ({"tools": [], "contexts": ["a"]}, "tools"),
    "pin of the wrong type": ({"contexts": ["a"], "pin": 1}, "pin"),
    "a tenant of the wrong type": ({"contexts": ["a"], "extra_key": 1}, "extra_key"),
    "an empty tenant": ({"contexts": ["a"], "extra_key": ""}, "extra_key"),
    "an adapter that was never loaded": ({"contexts": ["a"], "lora_path": "x"}, "lora_path"),
    "an unknown field": ({"contexts": ["a"], "prefx": "b"}, None),
    "a list as the body": ([], None),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_a_wrong_registration_names_its_field_and_registers_nothing(
    store_server: Server, case: str
) -> None:
    body, param = REFUSED[case]
    before = _get(store_server, "/ape/contexts")["total"]
    response = store_server.post("/ape/contexts", body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, 400)
    assert _get(store_server, "/ape/contexts")["total"] == before


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=-1", "after=1.5"])
def test_a_wrong_page_is_refused(store_server: Server, query: str) -> None:
    response = store_server.client.get(f"/ape/contexts?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.split("=")[0]


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/ape/contexts"),
        ("GET", "/ape/contexts"),
        ("GET", "/ape/contexts/ctx-0"),
        ("DELETE", "/ape/contexts/ctx-0"),
    ],
)
def test_every_route_wants_the_api_key(
    store_server: Server, method: str, path: str, key: str | None
) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"contexts": ["a"]} if method == "POST" else None
    response = httpx.request(method, store_server.url + path, headers=headers, json=body)
    assert response.status_code == 401


# ---------------------------------------------------------------- metrics


def test_metrics_count_requests_and_where_their_context_tokens_came_from(server: Server) -> None:
    names = ("ape_requests_total", "ape_contexts_per_request_sum")
    before = [_metric(server, name) for name in names]
    sources = [("request", "computed"), ("request", "cache"), ("registration", "computed")]
    tokens_before = [
        _metric(server, "ape_context_tokens_total", by=by, source=source) for by, source in sources
    ]
    _ask(server, CONTEXTS, prefix=PREFIX)
    _ask(server, CONTEXTS[:2], prefix=PREFIX)
    found = _register(server, CONTEXTS)
    server.generate({"text": QUESTION, "sampling_params": GREEDY})
    assert [_metric(server, name) for name in names] == [before[0] + 2, before[1] + 5]
    tokens = [context["tokens"] for context in found]
    grown = [
        _metric(server, "ape_context_tokens_total", by=by, source=source) - old
        for (by, source), old in zip(sources, tokens_before, strict=True)
    ]
    assert grown == [sum(tokens), sum(tokens[:2]), 0]
    assert _metric(server, "ape_store_contexts") == 3
