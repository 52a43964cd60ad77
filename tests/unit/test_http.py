"""The HTTP door around a small application that records what reaches it."""

import asyncio
import json
import weakref
from array import array
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sglang_ape.entry import http
from sglang_ape.entry.call import ApeCall, current_call
from sglang_ape.entry.expand import Defaults
from sglang_ape.entry.http import ApeMiddleware
from sglang_ape.entry.tokenizer_manager import Entry
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.store.contexts import ContextStore

ROUTES = ["/generate", "/v1/completions", "/v1/chat/completions"]
APE_FIELDS = {"contexts", "prefix", "prefix_ids", "ape"}
EVENTS = ['data: {"text": "a"}\n\n', 'data: {"text": "ab"}\n\n', "data: [DONE]\n\n"]
MARK = "<mark>"


class Tokenizer:
    """One token a character."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(char) for char in text]

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [self.encode(text, False) for text in texts]}


class Marker:
    """Stands for ``ContextMarker``; marks the first message."""

    def mark(self, messages: Any) -> list[Any]:
        if not isinstance(messages, list):
            raise ApeRequestError("messages must be a list", "messages")
        first = messages[0]
        return [{**first, "content": MARK + first["content"]}, *messages[1:]]


class Recorder:
    """The application behind the door."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.body: bytes | None = None
        self.headers: dict[str, str] = {}
        self.call: ApeCall | None = None
        self.refusal: ApeRequestError | None = None  # raised as TokenizerManager would
        self.stream = False
        self.served = 0

    async def serve(self, request: Request) -> Response:
        self.served += 1
        self.body = await request.body()
        self.headers = dict(request.headers)
        self.call = current_call.get()
        if self.call is not None and self.refusal is not None:
            self.call.error = self.refusal
        if self.stream:
            return StreamingResponse(self._events(), media_type="text/event-stream")
        if self.refusal is not None:
            return Response("SGLang's own form of the error", status_code=400)
        return Response(b'{"text": "answer"}', media_type="application/json")

    async def _events(self) -> AsyncIterator[str]:
        if self.refusal is not None:
            yield 'data: {"error": "as SGLang says it"}\n\n'
            yield "data: [DONE]\n\n"
            return
        for event in EVENTS:
            yield event

    def json(self) -> Any:
        assert self.body is not None
        return json.loads(self.body)


ANY_METHOD = ["GET", "POST", "PUT", "DELETE"]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def ids(*tokens: int) -> array:
    return array("I", tokens)


def build_app(recorder: Recorder, entry: Entry) -> ApeMiddleware:
    paths = [*ROUTES, "/other", "/api/generate", "/generate_more"]
    routes = [Route(path, recorder.serve, methods=ANY_METHOD) for path in paths]
    return ApeMiddleware(Starlette(routes=routes), entry)


def make_entry(marker: Any = None, **limits: int) -> Entry:
    store = ContextStore("model", 10_000, 0)
    given = Limits(64, 200, 300, 1000, **limits)
    return Entry(Tokenizer(), given, Defaults(0.9, 0.9), marker, store)


@pytest.fixture
def client(recorder: Recorder) -> TestClient:
    return TestClient(build_app(recorder, make_entry(Marker())))


def request_body(path: str, **fields: Any) -> dict[str, Any]:
    """A good APE request for a route, with ``fields`` on top."""
    query: dict[str, Any] = {
        "/generate": {"text": "q"},
        "/v1/completions": {"prompt": "q"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "q"}]},
    }[path]
    return {**query, "contexts": ["ab", {"input_ids": [7]}], **fields}


def assert_refused(response: Any, param: str | None, recorder: Recorder, status: int = 400) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, status), error
    assert recorder.served == 0 or recorder.refusal is not None


# ---------------------------------------------------------------- plain requests


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b'{"text": "q",   "sampling_params": {"temperature": 1e-7}}',
        b'{"a": NaN, "big": 123456789012345678901234567890, "dup": 1, "dup": 2}',
        b'{"text": "\\ud83d\\ude00 \\u00e9 \xc3\xa9"}',
        b"not json at all \xff\xfe",
        b"",
        b"[1, 2]",
    ],
)
def test_a_body_without_ape_fields_passes_byte_for_byte(
    client: TestClient, recorder: Recorder, path: str, body: bytes
) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 200
    assert (recorder.body, recorder.call) == (body, None)
    assert recorder.headers["content-length"] == str(len(body))


@pytest.mark.parametrize(
    "body",
    [
        b'{"text": "the word \\"contexts\\" in a text",  "x": 1.50}',
        b'{"text": "q", "sampling_params": {"custom_params": {"contexts": ["a"]}}}',
        b'{"text": "q",  "contexts": null, "ape": null}',
        b'["contexts"]',
    ],
)
def test_a_body_that_only_mentions_the_names_passes_byte_for_byte(
    client: TestClient, recorder: Recorder, body: bytes
) -> None:
    assert client.post("/generate", content=body).status_code == 200
    assert (recorder.body, recorder.call) == (body, None)


def test_a_body_in_many_pieces_arrives_whole(client: TestClient, recorder: Recorder) -> None:
    pieces = [b'{"text"', b': "q"', b"}"]
    assert client.post("/generate", content=iter(pieces)).status_code == 200
    assert recorder.body == b"".join(pieces)


@pytest.mark.parametrize("path", ["/other", "/generate_more", "/api/generate"])
def test_other_paths_are_left_alone(client: TestClient, recorder: Recorder, path: str) -> None:
    body = json.dumps(request_body("/generate", ape={"temperature": -1})).encode()
    assert client.post(path, content=body).status_code == 200
    assert (recorder.body, recorder.call) == (body, None)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_other_methods_are_left_alone(client: TestClient, recorder: Recorder, method: str) -> None:
    body = json.dumps(request_body("/generate", contexts=[])).encode()
    assert client.request(method, "/generate", content=body).status_code == 200
    assert (recorder.body, recorder.call) == (body, None)


def test_a_large_body_of_another_path_is_not_read(recorder: Recorder) -> None:
    client = TestClient(build_app(recorder, make_entry(body_bytes=10)))
    assert client.post("/other", content=b"x" * 100).status_code == 200
    assert recorder.body == b"x" * 100


# ---------------------------------------------------------------- APE requests


@pytest.mark.parametrize("path", ROUTES)
def test_the_fields_are_removed_and_travel_beside_the_request(
    client: TestClient, recorder: Recorder, path: str
) -> None:
    body = request_body(path, ape={"temperature": 0.5, "scale": 0}, temperature=0.7, stream=False)
    response = client.post(path, json=body)
    assert response.status_code == 200
    assert response.json() == {"text": "answer"}
    seen = recorder.json()
    assert APE_FIELDS.isdisjoint(seen)
    kept = {name: body[name] for name in body if name not in (*APE_FIELDS, "messages")}
    assert {name: seen[name] for name in seen if name != "messages"} == kept
    call = recorder.call
    assert call is not None
    assert [item.contexts for item in call.items] == [[ids(*b"ab"), ids(7)]]
    options = call.items[0].options
    assert (options.temperature, options.scale) == (0.5, 0)


def test_prefixes_travel_too(client: TestClient, recorder: Recorder) -> None:
    client.post("/generate", json=request_body("/generate", prefix="P"))
    assert recorder.call is not None
    assert recorder.call.items[0].prefix == "P"
    client.post("/v1/completions", json=request_body("/v1/completions", prefix_ids=[4, 5]))
    assert recorder.call.items[0].prefix == ids(4, 5)


def test_the_content_length_is_that_of_the_new_body(client: TestClient, recorder: Recorder) -> None:
    client.post("/generate", json=request_body("/generate"))
    assert recorder.body is not None
    assert recorder.headers["content-length"] == str(len(recorder.body))


def test_the_first_message_is_marked(client: TestClient, recorder: Recorder) -> None:
    client.post("/v1/chat/completions", json=request_body("/v1/chat/completions"))
    assert recorder.json()["messages"] == [{"role": "user", "content": MARK + "q"}]


def test_no_call_outlives_its_request(client: TestClient, recorder: Recorder) -> None:
    client.post("/generate", json=request_body("/generate"))
    assert recorder.call is not None
    client.post("/generate", json={"text": "q"})
    assert recorder.call is None


def test_values_survive_the_rewriting(client: TestClient, recorder: Recorder) -> None:
    odd = {"text": 'é\u2028"\\\u0000😀', "big": 2**60, "small": 1e-300, "list": [None, True, {}]}
    client.post("/generate", json=request_body("/generate", **odd))
    seen = recorder.json()
    assert {name: seen[name] for name in odd} == odd


def test_a_batch_travels_as_a_batch(client: TestClient, recorder: Recorder) -> None:
    body = request_body("/generate", text=["q", "r"], contexts=[["a"], ["b"]])
    assert client.post("/generate", json=body).status_code == 200
    assert recorder.call is not None
    assert recorder.call.batched
    assert [item.contexts for item in recorder.call.items] == [[ids(97)], [ids(98)]]


def test_a_mounted_server_serves_its_own_paths(recorder: Recorder) -> None:
    """ASGI servers put ``root_path`` before the path."""
    app = build_app(recorder, make_entry(Marker()))
    client = TestClient(app, root_path="/api")
    response = client.post("/api/generate", json=request_body("/generate"))
    assert response.status_code == 200
    assert recorder.call is not None
    assert APE_FIELDS.isdisjoint(recorder.json())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"contexts": []}, "contexts"),
        ({"contexts": "a"}, "contexts"),
        ({"contexts": ["a", ""]}, "contexts[1]"),
        ({"contexts": ["a", "b", 3]}, "contexts[2]"),
        ({"contexts": [{"id": 1}]}, "contexts[0].id"),
        ({"ape": {"temperature": 0}}, "ape.temperature"),
        ({"ape": {"scale": -1}}, "ape.scale"),
        ({"ape": {"bogus": 1}}, "ape.bogus"),
    ],
)
def test_a_wrong_field_is_named(
    client: TestClient, recorder: Recorder, path: str, fields: dict[str, Any], param: str
) -> None:
    assert_refused(client.post(path, json=request_body(path, **fields)), param, recorder)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "scale"])
def test_numbers_that_json_does_not_have_are_named(
    client: TestClient, recorder: Recorder, literal: str, name: str
) -> None:
    ape = f'{{"{name}": {literal}}}'
    body = f'{{"text": "q", "contexts": ["a"], "ape": {ape}}}'
    assert_refused(client.post("/generate", content=body), f"ape.{name}", recorder)


def test_a_prefix_in_a_chat_is_refused(client: TestClient, recorder: Recorder) -> None:
    path = "/v1/chat/completions"
    assert_refused(client.post(path, json=request_body(path, prefix="P")), "prefix", recorder)
    wrong = request_body(path, messages="hello")
    assert_refused(client.post(path, json=wrong), "messages", recorder)


def test_a_chat_without_tokenizer_is_refused(recorder: Recorder) -> None:
    client = TestClient(build_app(recorder, make_entry(marker=None)))
    path = "/v1/chat/completions"
    assert_refused(client.post(path, json=request_body(path)), "contexts", recorder)


@pytest.mark.parametrize("name", ["input_ids", "input_embeds"])
def test_text_and_ids_together_are_refused(
    client: TestClient, recorder: Recorder, name: str
) -> None:
    body = request_body("/generate", **{name: [1]})
    assert_refused(client.post("/generate", json=body), name, recorder)


@pytest.mark.parametrize(
    "body",
    [
        b'{"contexts": ["a"], "text": "q"',
        b'{"contexts": ["a"], "text": "\xff\xfe"}',
        b'{"contexts": ["a"],}',
        b'\xef\xbb\xbf{"contexts"',
    ],
)
def test_a_body_that_is_not_json_is_refused(
    client: TestClient, recorder: Recorder, body: bytes
) -> None:
    assert_refused(client.post("/generate", content=body), None, recorder)


@pytest.mark.parametrize("escaped", ["\\ud800", "x\\udc00y"])
def test_lone_surrogates_are_refused_with_their_field(
    client: TestClient, recorder: Recorder, escaped: str
) -> None:
    body = f'{{"text": "q", "contexts": ["a", "{escaped}"]}}'
    assert_refused(client.post("/generate", content=body), "contexts[1]", recorder)


@pytest.mark.parametrize("where", ['{"@": 1}', '{"temperature": "@"}'])
def test_lone_surrogates_in_ape_give_an_answer(
    client: TestClient, recorder: Recorder, where: str
) -> None:
    ape = where.replace("@", "\\ud800")
    body = f'{{"text": "q", "contexts": ["a"], "ape": {ape}}}'
    response = client.post("/generate", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("ape")
    assert recorder.served == 0


@pytest.mark.parametrize("depth", [900, 985, 1000, 1010, 1020, 1030, 100_000])
@pytest.mark.parametrize("field", ["other", "contexts", "ape", "temperature", "id"])
def test_deep_nesting_never_breaks_the_server(
    client: TestClient, recorder: Recorder, depth: int, field: str
) -> None:
    deep = "[" * depth + "]" * depth
    body = {
        "other": f'"contexts": ["a"], "other": {deep}',
        "contexts": f'"contexts": {deep}',
        "ape": f'"contexts": ["a"], "ape": {deep}',
        "temperature": f'"contexts": ["a"], "ape": {{"temperature": {deep}}}',
        "id": f'"contexts": [{{"id": {deep}}}]',
    }[field]
    response = client.post("/generate", content=f'{{"text": "q", {body}}}')
    if response.status_code != 200:
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.status_code == 400 or field == "other"


def test_deep_nesting_beyond_any_parser_is_refused(client: TestClient, recorder: Recorder) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    body = f'{{"text": "q", "contexts": ["a"], "other": {deep}}}'
    assert_refused(client.post("/generate", content=body), None, recorder)


def test_a_body_beyond_the_limit_gets_413(recorder: Recorder) -> None:
    client = TestClient(build_app(recorder, make_entry(body_bytes=1000)))
    body = json.dumps(request_body("/generate", text="q" * 2000))
    response = client.post("/generate", content=body)
    assert_refused(response, None, recorder, status=413)
    message = response.json()["error"]["message"]
    assert str(len(body)) in message
    assert "1000" in message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"contexts": ["a"] * 4}, "contexts"),
        ({"contexts": [["a"], ["a"] * 4], "text": ["q", "r"]}, "contexts[1]"),
    ],
)
def test_more_contexts_than_allowed_are_refused_with_both_numbers(
    recorder: Recorder, fields: dict[str, Any], field: str
) -> None:
    client = TestClient(build_app(recorder, make_entry(contexts=3)))
    assert client.post("/generate", json=request_body("/generate")).status_code == 200
    response = client.post("/generate", json=request_body("/generate", **fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert "4 contexts" in error["message"] and "3 of --ape-max-contexts" in error["message"]


def test_a_body_at_the_limit_is_read(recorder: Recorder) -> None:
    body = json.dumps(request_body("/generate")).encode()
    client = TestClient(build_app(recorder, make_entry(body_bytes=len(body))))
    assert client.post("/generate", content=body).status_code == 200


# ---------------------------------------------------------------- by hand: pieces in and out


async def serve(
    app: Any, pieces: list[bytes], path: str = "/generate", end: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Run one request and return what was sent; ``end`` replaces the last piece."""
    incoming = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)}
        for i, piece in enumerate(pieces)
    ]
    if end is not None:
        incoming[-1] = end
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
    await app(scope, receive, send)
    return sent


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_nothing_of_an_oversized_body_is_kept() -> None:
    class Piece(bytearray):
        """Bytes that can be watched."""

    alive: list[int] = []
    watched: list[weakref.ref[Piece]] = []

    async def receive() -> dict[str, Any]:
        alive.append(sum(ref() is not None for ref in watched))
        piece = Piece(100)
        watched.append(weakref.ref(piece))
        return {"type": "http.request", "body": piece, "more_body": len(watched) < 20}

    with pytest.raises(ApeRequestError) as caught:
        run(http.read_body(receive, 250))
    assert caught.value.status_code == 413
    assert max(alive) <= 4, alive
    assert alive[-1] <= 1, alive


def test_a_client_that_leaves_before_its_body_ends_is_not_served() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("must not be called")

    pieces = [b'{"contexts"', b""]
    sent = run(serve(ApeMiddleware(app, make_entry()), pieces, end={"type": "http.disconnect"}))
    assert sent == []


def test_a_disconnect_after_the_body_reaches_the_application() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    run(serve(ApeMiddleware(app, make_entry()), [json.dumps(request_body("/generate")).encode()]))
    assert seen == ["http.request", "http.disconnect"]


# ---------------------------------------------------------------- refused behind the door


REFUSAL = ApeRequestError("too long", "contexts[3]")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_a_call_refused_behind_the_door_becomes_one_400(
    client: TestClient, recorder: Recorder, path: str, stream: bool
) -> None:
    recorder.stream, recorder.refusal = stream, REFUSAL
    response = client.post(path, json=request_body(path, stream=stream))
    assert_refused(response, "contexts[3]", recorder)
    assert response.json()["error"]["message"] == "too long"
    assert "SGLang" not in response.text


def test_an_accepted_stream_passes_unchanged(client: TestClient, recorder: Recorder) -> None:
    recorder.stream = True
    with client.stream("POST", "/generate", json=request_body("/generate")) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "".join(response.iter_text()) == "".join(EVENTS)


def test_an_accepted_stream_passes_chunk_by_chunk() -> None:
    sent: list[dict[str, Any]] = []
    seen_after: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        for i, event in enumerate(EVENTS):
            more = i + 1 < len(EVENTS)
            await send({"type": "http.response.body", "body": event.encode(), "more_body": more})
            seen_after.append(len(sent))

    async def go() -> None:
        body = json.dumps(request_body("/generate")).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        await ApeMiddleware(app, make_entry())(scope, receive, send)

    run(go())
    assert seen_after == [2, 3, 4], "every chunk is passed on at once, the first with the start"
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}
    assert [message["body"].decode() for message in sent[1:]] == EVENTS
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


def test_an_error_after_the_first_chunk_leaves_the_stream_as_it_is() -> None:
    """The status is out by then; SGLang reports the error inside the stream."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        call = current_call.get()
        assert call is not None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        call.error = REFUSAL
        await send({"type": "http.response.body", "body": b"second", "more_body": False})

    body = json.dumps(request_body("/generate")).encode()
    sent = run(serve(ApeMiddleware(app, make_entry()), [body]))
    assert [message.get("body", b"") for message in sent] == [b"", b"first", b"second"]


def test_an_empty_answer_passes() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    body = json.dumps(request_body("/generate")).encode()
    sent = run(serve(ApeMiddleware(app, make_entry()), [body]))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
