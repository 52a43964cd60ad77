"""The client of the context store: over HTTP against a small server, and in an Engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
import sglang as sgl

from sglang_ape import ContextStore
from sglang_ape.entry.expand import Defaults
from sglang_ape.entry.tokenizer_manager import Entry
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.store import contexts as known
from sglang_ape.store.register import Registered

Body = dict[str, Any]
TENANT = ("lora_path", "extra_key")


class FakeServer:
    """Answers as the routes of ``/ape/contexts`` do; a text has a token for each character.

    Attributes:
        contexts: what is known, by id, with what a GET tells of it.
        registrations: the bodies of all POSTs.
        requests: method and path, with the query, of everything that was asked.
        headers: of the latest request.
        page: contexts on a page.
        api_key: that requests must bring.
        answer: takes the place of the answer to every request.
        before_post: called with the number of POSTs before; True drops the connection.
    """

    def __init__(self, page: int = 100) -> None:
        self.contexts: dict[str, Body] = {}
        self.registrations: list[Body] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: Any = None
        self.page = page
        self.api_key: str | None = None
        self.answer: tuple[int, bytes] | None = None
        self.before_post: Callable[[int], bool | None] = lambda _: None
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def sent(self) -> list[Any]:
        """The contexts of all registrations, one after the other."""
        return [context for body in self.registrations for context in body["contexts"]]

    def restart(self) -> None:
        """Forget everything."""
        self.contexts.clear()

    def register(self, body: Body) -> Body:
        self.registrations.append(body)
        answers = []
        for context in body["contexts"]:
            own = context["input_ids"] if isinstance(context, dict) else context
            before = [body.get(name) for name in ("prefix", "messages", *TENANT)]
            digest = hashlib.sha256(json.dumps([before, own]).encode()).hexdigest()
            id = f"ctx-{digest[:32]}"
            known = self.contexts.get(id)
            entry = self.contexts.setdefault(id, {"id": id, "tokens": len(own), "pinned": False})
            entry |= {name: body.get(name) for name in TENANT} | {"cached_tokens": len(own)}
            entry["pinned"] |= body["pin"]
            answers.append(
                {"id": id, "tokens": len(own), "cached_tokens": len(own) if known else 0}
                | {"pinned": entry["pinned"]}
            )
        return {"contexts": answers}

    def list(self, query: dict[str, str]) -> Body:
        tenant = [query.get(name) for name in TENANT]
        found = [
            (number, one)
            for number, one in enumerate(self.contexts.values())
            if number > int(query.get("after", -1))
            and (not any(tenant) or [one[name] for name in TENANT] == tenant)
        ]
        shown = found[: self.page]
        next = shown[-1][0] if len(found) > self.page else None
        return {"contexts": [one for _, one in shown], "next": next}

    def serve(self, method: str, path: str, body: Body) -> tuple[int, Body]:
        url = urlsplit(path)
        if not url.path.startswith("/ape/contexts"):
            return 200, {"model_path": "a-model"}  # which an sgl.RuntimeEndpoint asks for
        if method == "POST":
            return 200, self.register(body)
        if url.path == "/ape/contexts":
            return 200, self.list({name: values[0] for name, values in parse_qs(url.query).items()})
        id = url.path.rpartition("/")[2]
        if id not in self.contexts:
            return 404, ApeRequestError(f"no context is known as {id!r}", "id", 404).body()
        if method == "GET":
            return 200, self.contexts[id]
        del self.contexts[id]
        return 200, {"id": id, "deleted": True}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def serve(self) -> None:
                method = self.command
                body = json.loads(
                    self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"null"
                )
                server.requests.append((method, self.path))
                server.headers = self.headers
                if method == "POST" and server.before_post(len(server.registrations)):
                    return  # nothing was said: the client sees the connection closed
                if server.api_key and self.headers["Authorization"] != f"Bearer {server.api_key}":
                    self.reply(401, b'{"error": "Unauthorized"}')
                elif server.answer:
                    self.reply(*server.answer)
                else:
                    status, answer = server.serve(method, self.path, body)
                    self.reply(status, json.dumps(answer).encode())

            do_GET = do_POST = do_DELETE = serve

            def reply(self, status: int, answer: bytes) -> None:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/ape/contexts")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(page=3)
    yield server
    server.close()


@pytest.fixture
def store(server: FakeServer) -> ContextStore:
    return ContextStore(server.url)


class FakeRegistry:
    """In the place of a running engine's: everything that is registered is cached at once."""

    def __init__(self, store: known.ContextStore) -> None:
        self.store = store
        self.refusal: Exception | None = None

    async def register(self, tenant: Any, prefix: Any, contexts: Any, pin: bool) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.store.add(tenant, prefix, contexts, pin)
        digest = known.digest_of(prefix)
        ids = [known.context_id(self.store.model, tenant, digest, own) for own in contexts]
        return [Registered(self.store.get(id), 0) for id in ids]

    async def cached_tokens(self, contexts: Any) -> list[int]:
        return [len(one.ids) for one in contexts]

    async def forget(self, id: str) -> bool:
        return self.store.remove(id) is not None


@pytest.fixture
def engine() -> Iterator[Any]:
    """What the client sees of an ``sgl.Engine``."""
    store = known.ContextStore("a-model", 10**6, 10**6)
    registry: Any = FakeRegistry(store)
    entry = Entry(None, Limits(100, 100, 1000, 512), Defaults(1, 1), None, store, registry)
    loop = asyncio.new_event_loop()
    yield SimpleNamespace(
        server_args=SimpleNamespace(enable_ape=True),
        tokenizer_manager=SimpleNamespace(ape_entry=entry),
        loop=loop,
    )
    loop.close()


def _refusal(call: Callable[[], Any]) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        call()
    return caught.value


##### The import


def test_importing_the_package_imports_nothing_large_and_yet_it_has_the_client() -> None:
    code = (
        "import sys, sglang_ape\n"
        "large = {'torch', 'sglang', 'requests'}\n"
        "assert not large & set(sys.modules), large & set(sys.modules)\n"
        "from sglang_ape import ContextStore\n"
        "ContextStore('http://127.0.0.1:1')\n"
        "assert large & set(sys.modules) == {'requests'}, large & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_has_no_attribute_that_it_does_not_have() -> None:
    import sglang_ape

    with pytest.raises(AttributeError, match="'ContextShop'"):
        sglang_ape.ContextShop  # noqa: B018


##### Over HTTP


def test_a_registration_sends_what_was_given_and_nothing_else(
    server: FakeServer, store: ContextStore
) -> None:
    store.register(["a"])
    store.register(["a"], prefix="P", pin=True, lora_path="l", extra_key="k")
    messages = [{"role": "system", "content": "s"}]
    store.register(["a"], messages=messages, tools=[], chat_template_kwargs={"x": 1})
    store.register([{"input_ids": [4]}], prefix_ids=[])
    assert server.registrations == [
        {"contexts": ["a"], "pin": False},
        {"contexts": ["a"], "prefix": "P", "pin": True, "lora_path": "l", "extra_key": "k"},
        {"contexts": ["a"], "messages": messages, "tools": [], "chat_template_kwargs": {"x": 1}}
        | {"pin": False},
        {"contexts": [{"input_ids": [4]}], "prefix_ids": [], "pin": False},
    ]


def test_a_registration_returns_the_entries_in_the_given_order(store: ContextStore) -> None:
    first = store.register(["salt", "wool!"], pin=True)
    assert [(one["tokens"], one["cached_tokens"]) for one in first] == [(4, 0), (5, 0)]
    again = store.register(["wool!", "salt"])
    assert [one["id"] for one in again] == [first[1]["id"], first[0]["id"]]
    assert [(one["cached_tokens"], one["pinned"]) for one in again] == [(5, True), (4, True)]


def test_what_is_known_can_be_got_until_it_is_forgotten(store: ContextStore) -> None:
    id = store.register(["salt"])[0]["id"]
    assert store.get(id)["tokens"] == 4
    store.forget(id)
    for call in (store.get, store.forget):
        error = _refusal(lambda call=call: call(id))
        assert (error.status_code, error.param) == (404, "id")
        assert str(error) == f"no context is known as {id!r}"


def test_all_pages_are_listed(server: FakeServer, store: ContextStore) -> None:
    ids = [one["id"] for one in store.register([f"document {i}" for i in range(8)])]
    assert [one["id"] for one in store.contexts()] == ids
    assert server.requests[1:] == [
        ("GET", "/ape/contexts"),
        ("GET", "/ape/contexts?after=2"),
        ("GET", "/ape/contexts?after=5"),
    ]


def test_a_listing_can_be_of_one_tenant(server: FakeServer, store: ContextStore) -> None:
    store.register(["a"])
    store.register(["b"] * 2, extra_key="k & k")
    store.register([*"cdef"], lora_path="l", extra_key="k & k")
    assert [one["extra_key"] for one in store.contexts(extra_key="k & k")] == ["k & k"]
    assert len(list(store.contexts(lora_path="l", extra_key="k & k"))) == 4
    assert server.requests[-1] == ("GET", "/ape/contexts?lora_path=l&extra_key=k+%26+k&after=4")


def test_a_refusal_has_the_servers_message_field_and_status(
    server: FakeServer, store: ContextStore
) -> None:
    refused = ApeRequestError("pin: there is no room", "pin", 507)
    server.answer = 507, json.dumps(refused.body()).encode()
    error = _refusal(lambda: store.register(["a"], pin=True))
    assert error.body() == refused.body()


@pytest.mark.parametrize("call", ["register", "get", "contexts", "forget"])
def test_a_server_without_the_route_is_told_from_an_unknown_id(
    server: FakeServer, store: ContextStore, call: str
) -> None:
    server.answer = 404, b'{"detail": "Not Found"}'
    calls: dict[str, Callable[[], Any]] = {
        "register": lambda: store.register(["a"]),
        "get": lambda: store.get("ctx-0"),
        "contexts": lambda: list(store.contexts()),
        "forget": lambda: store.forget("ctx-0"),
    }
    error = _refusal(calls[call])
    assert "started without --enable-ape" in str(error)
    assert f"{server.url}/ape/contexts" in str(error)
    assert error.status_code == 404


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (500, b"<html>", "500 Internal Server Error"),
        (200, b"<html>", "200 OK"),
        (200, b"[]", "200 OK"),
        (502, b'{"error": {"message": 5}}', "502 Bad Gateway"),
        (403, b'{"error": "Forbidden by us"}', "403 Forbidden by us"),
    ],
)
def test_any_other_answer_is_an_error_with_its_status(
    server: FakeServer, store: ContextStore, status: int, answer: bytes, said: str
) -> None:
    server.answer = status, answer
    error = _refusal(lambda: store.register(["a"]))
    assert str(error) == f"{server.url}/ape/contexts answered {said}"
    assert error.status_code == status


def test_a_redirect_is_not_followed_into_another_method(
    server: FakeServer, store: ContextStore
) -> None:
    server.answer = 302, b""
    assert _refusal(lambda: store.register(["a"])).status_code == 302
    assert [method for method, _ in server.requests] == ["POST"]


def test_the_api_key_is_sent_whatever_netrc_says(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.api_key = "key"
    assert ContextStore(server.url, "key").register(["a"])
    error = _refusal(lambda: ContextStore(server.url, "another").register(["a"]))
    assert (error.status_code, str(error).split()[-1]) == (401, "Unauthorized")


def test_an_id_that_was_never_given_out_is_unknown_without_asking(
    server: FakeServer, store: ContextStore
) -> None:
    for id in ("", "..", "a/b", "a?b", "x" * 81, "ctx-é"):
        for call in (store.get, store.forget):
            error = _refusal(lambda call=call, id=id: call(id))
            assert (error.status_code, error.param) == (404, "id")
    assert not server.requests


def test_a_server_that_does_not_answer_in_time_is_given_up(server: FakeServer) -> None:
    done = threading.Event()
    server.before_post = lambda _: done.wait(20)
    with pytest.raises(requests.ReadTimeout):
        ContextStore(server.url, timeout=0.2).register(["a"])
    done.set()


def test_no_connection_is_an_error_of_requests(server: FakeServer) -> None:
    server.before_post = lambda _: True
    with pytest.raises(requests.ConnectionError):
        ContextStore(server.url).register(["a"])


##### Other targets


def test_an_endpoint_brings_its_url_and_key(server: FakeServer) -> None:
    server.api_key = "key"
    endpoint = sgl.RuntimeEndpoint(server.url, api_key="key")
    assert ContextStore(endpoint).register(["a"])
    assert ContextStore(SimpleNamespace(endpoint=endpoint, url="")).register(["a"])  # a Runtime
    error = _refusal(lambda: ContextStore(endpoint, "another").register(["a"]))
    assert error.status_code == 401


@pytest.mark.parametrize("target", ["127.0.0.1:30000", "ftp://host", "", None, 5])
def test_a_target_of_another_kind_is_refused(target: Any) -> None:
    error = _refusal(lambda: ContextStore(target))
    assert error.param == "target"
    assert "URL" in str(error)


def test_an_engine_gives_the_same_answers_as_a_server(engine: Any, server: FakeServer) -> None:
    answers = []
    for target in (engine, server.url):
        store = ContextStore(target)
        one, two = store.register(
            [{"input_ids": [5, 6]}, {"input_ids": [7]}], prefix_ids=[], pin=True, extra_key="k"
        )
        store.register([{"input_ids": [8]}], prefix_ids=[])
        store.forget(two["id"])
        listed = list(store.contexts(extra_key="k"))
        everything = list(store.contexts())
        error = _refusal(lambda store=store, id=two["id"]: store.get(id))
        for row in (one, *listed, *everything):
            assert row.pop("id")
            row.pop("prefix_tokens", None)
        answers.append([one, listed, everything, error.status_code, error.param])
    assert answers[0] == answers[1]


def test_an_engines_contexts_come_in_pages_as_well(engine: Any) -> None:
    store = ContextStore(engine)
    contexts = [{"input_ids": [i]} for i in range(250)]
    ids = [one["id"] for one in store.register(contexts, prefix_ids=[1])]
    assert [one["id"] for one in store.contexts()] == ids
    assert store.get(ids[0]) == next(store.contexts())


def test_an_engine_refuses_a_chat(engine: Any) -> None:
    context = {"input_ids": [5]}
    error = _refusal(lambda: ContextStore(engine).register([context], messages=[{"role": "user"}]))
    assert (error.param, "chat template" in str(error)) == ("messages", True)


def test_what_the_engine_itself_refuses_is_the_same_error(engine: Any) -> None:
    engine.tokenizer_manager.ape_entry.registry.refusal = ValueError("there is no such adapter")
    error = _refusal(lambda: ContextStore(engine).register([{"input_ids": [5]}], prefix_ids=[1]))
    assert (str(error), error.status_code) == ("there is no such adapter", 400)


@pytest.mark.parametrize("args", [SimpleNamespace(enable_ape=False), SimpleNamespace()])
def test_an_engine_without_ape_is_refused_at_once(engine: Any, args: Any) -> None:
    engine.server_args = args
    error = _refusal(lambda: ContextStore(engine))
    assert "started without --enable-ape" in str(error)


def test_an_engine_registers_into_its_own_store(engine: Any) -> None:
    entry = engine.tokenizer_manager.ape_entry
    one = ContextStore(engine).register([{"input_ids": [5, 6]}], prefix_ids=[1])[0]
    stored = entry.store.get(one["id"])
    assert (stored.ids, stored.prefix.ids) == (array("I", [5, 6]), array("I", [1]))
