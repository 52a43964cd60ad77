"""Tenants of a real server: nothing that one has sent or registered is of use to another.

Adapters, the other border, are tested on a GPU (``tests/gpu/test_lora.py``); who may ask at all is
a matter of ``test_store.py``.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.oracle import Oracle
from tests.support.server import Server

NEW_TOKENS = 6
TENANTS = ({"extra_key": "one"}, {"extra_key": "two"}, {})


@pytest.fixture
def server(store_server: Server) -> Iterator[Server]:
    store_server.flush()
    yield store_server
    store_server.assert_clean()


class Asked(NamedTuple):
    """The same request on any route."""

    prefix: list[int]
    contexts: list[list[int]]  # none: a plain request
    query: list[int]

    def fields(self, contexts: list[Any] | None = None) -> dict[str, Any]:
        if not self.contexts:
            return {}
        given = [{"input_ids": ids} for ids in self.contexts] if contexts is None else contexts
        return {"contexts": given, "prefix_ids": self.prefix}

    def answer(self, model: Path) -> list[int]:
        oracle = Oracle(model)
        if not self.contexts:
            return oracle.generate_plain(self.query, NEW_TOKENS).token_ids
        given = self.prefix, self.contexts, self.query
        return oracle.generate(*given, NEW_TOKENS, 0.9, 0.9).token_ids


class Answer(NamedTuple):
    tokens: list[int]
    cached: int


def ids(rng: random.Random, size: int) -> list[int]:
    return rng.choices(range(10, 500), k=size)


def asked(seed: int, plain: bool = False) -> Asked:
    rng = random.Random(seed)
    contexts = [] if plain else [ids(rng, 40), ids(rng, 25), ids(rng, 33)]
    return Asked([] if plain else ids(rng, 7), contexts, ids(rng, 30 if plain else 5))


def generate(server: Server, request: Asked, **tenant: str) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": request.query, "sampling_params": sampling}
    reply = server.generate(body | request.fields() | tenant)
    return Answer(reply["output_ids"], reply["meta_info"]["cached_tokens"])


def completions(server: Server, request: Asked, **tenant: str) -> Answer:
    sampling = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"model": "tiny", "prompt": request.query, "return_token_ids": True, **sampling}
    response = server.post("/v1/completions", body | request.fields() | tenant)
    assert response.status_code == 200, response.text
    reply = response.json()
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Answer(reply["choices"][0]["token_ids"], cached)


def with_salt(server: Server, request: Asked, **tenant: str) -> Answer:
    salt = {"cache_salt": tenant["extra_key"]} if tenant else {}
    return completions(server, request, **salt)


@pytest.mark.parametrize(
    ("ask", "plain"),
    # Of a plain request, SGLang's OpenAI routes do not say what was cached.
    [(generate, False), (generate, True), (completions, False), (with_salt, False)],
)
def test_each_tenant_computes_everything_once_and_gets_the_oracles_answer(
    server: Server, tiny_llama: Path, ask: Any, plain: bool
) -> None:
    request = asked(1, plain)
    expected = request.answer(tiny_llama)
    for tenant in TENANTS:
        first, again = (ask(server, request, **tenant) for _ in range(2))
        assert first == Answer(expected, 0), tenant
        assert again.tokens == expected
        assert again.cached > 0, tenant


def test_tenants_of_one_batch_share_nothing(server: Server, tiny_llama: Path) -> None:
    request = asked(2)
    expected = request.answer(tiny_llama)
    fields = {name: [value] * 2 for name, value in request.fields().items()}
    body = {
        **fields,
        "input_ids": [request.query] * 2,
        "extra_key": ["one", "two"],
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    }
    for cached in (False, True):
        replies = server.generate(body)
        assert [reply["output_ids"] for reply in replies] == [expected] * 2
        assert [reply["meta_info"]["cached_tokens"] > 0 for reply in replies] == [cached] * 2


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_an_id_of_another_tenant_is_as_unknown_as_one_that_never_was(
    server: Server, path: str
) -> None:
    whole = [{"role": "user", "content": "Which ship?"}]
    registration = {"contexts": ["The Heron brought salt."], "extra_key": "one"}
    if path == "/v1/chat/completions":
        registration["messages"] = whole
    known = server.post("/ape/contexts", registration).json()["contexts"][0]["id"]
    body: dict[str, Any] = {
        "/generate": {"text": "Which ship?", "sampling_params": {"max_new_tokens": 1}},
        "/v1/completions": {"model": "tiny", "prompt": "Which ship?", "max_tokens": 1},
        "/v1/chat/completions": {"model": "tiny", "messages": whole, "max_tokens": 1},
    }[path]

    def refusal(id: str, **tenant: str) -> dict[str, Any]:
        response = server.post(path, {**body, "contexts": [{"id": id}], **tenant})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        return {**error, "message": error["message"].replace(id, "ID")}

    for tenant in ({"extra_key": "two"}, {}):
        assert refusal(known, **tenant) == refusal("ctx-" + "0" * (len(known) - 4), **tenant)
        assert refusal(known, **tenant)["param"] == "contexts[0].id"
    own = server.post(path, {**body, "contexts": [{"id": known}], "extra_key": "one"})
    assert own.status_code == 200, own.text
    server.client.delete(f"/ape/contexts/{known}")
