"""Warm items of the flag and of a profile: one P through every door, as the oracle sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang
from transformers import AutoTokenizer

from sglang_ape import ContextStore
from sglang_ape.calibrate import profile
from sglang_ape.calibrate.profile import Profile
from sglang_ape.warm import items
from sglang_ape.warm.check import copied, lengths_like, off_length
from tests.support.oracle import Oracle
from tests.support.server import Server

ITEMS = [
    "The ferry was built by Ada Lorn.\nIt sails on Fridays.\n",
    "The tower was built by Piet Marr.\n",
]
CONTEXTS = [
    "The harbour master keeps a ledger of every ship.\n",
    "A lighthouse stands on the northern cliff.\n",
    "The baker sells the loaves warm.\n",
]
CORPUS = [f"Note: {text}" for text in CONTEXTS]
QUERY = "Question: who keeps the ledger? Answer:"
NEW_TOKENS = 8
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer from the notes."},
    {"role": "user", "content": QUERY},
]


def _write(folder: Path) -> str:
    path = folder / "warm.jsonl"
    path.write_text(f"{json.dumps(ITEMS[0])}\n\n{json.dumps({'text': ITEMS[1]})}\n")
    return str(path)


class Expected:
    """What the oracle answers, with P put together here."""

    def __init__(self, model: Path) -> None:
        self._oracle = Oracle(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.items = [token for item in ITEMS for token in self.ids(item)]
        self.default = [self.tokenizer.bos_token_id, *self.ids("\n\n")]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def contexts(self) -> list[list[int]]:
        return list(map(self.ids, CONTEXTS))

    def answer(self, prefix: list[int], query: list[int]) -> list[int]:
        found = self._oracle.generate(prefix, self.contexts, query, NEW_TOKENS, 0.9, 0.9)
        return found.token_ids

    def chat(self) -> tuple[list[int], list[int]]:
        """P and Q of MESSAGES, P without items: the template cut before the user's text."""
        whole = self.tokenizer.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True
        )
        before, found, after = whole.partition(QUERY)
        return self.ids(before), self.ids(found + after)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Expected:
    return Expected(tiny_llama)


def test_an_engine_takes_the_items_of_a_file(
    tiny_llama: Path, tmp_path: Path, expected: Expected
) -> None:
    engine = sglang.Engine(
        model_path=str(tiny_llama),
        device="cpu",
        dtype="float32",
        max_total_tokens=4096,
        log_level="warning",
        enable_ape=True,
        ape_warm=_write(tmp_path),
    )
    try:
        call: dict[str, Any] = {"prompt": QUERY, "sampling_params": GREEDY}
        by_text = engine.generate(contexts=CONTEXTS, **call)
        prefix = expected.default + expected.items
        assert by_text["output_ids"] == expected.answer(prefix, expected.ids(QUERY))
        found = ContextStore(engine).register(CONTEXTS)
        by_id = engine.generate(contexts=[{"id": one["id"]} for one in found], **call)
        assert by_id["output_ids"] == by_text["output_ids"]
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("warm_server")
    path = folder / "profile.json"
    profile.write(Profile(model="tiny", temperature=0.9, scale=0.9, warm=ITEMS), path)
    flags = ("--enable-ape", "--ape-profile", str(path), "--max-total-tokens", "4096")
    with Server(tiny_llama, (*flags, "--served-model-name", "tiny"), folder / "log") as server:
        yield server
        server.assert_clean()


def _ask(server: Server, contexts: list[Any], **fields: Any) -> Any:
    body = {"contexts": contexts, "text": QUERY, "sampling_params": GREEDY}
    return server.generate({**body, **fields})


def _chat(server: Server, contexts: list[Any]) -> Any:
    body = {"model": "tiny", "messages": MESSAGES, "contexts": contexts, "temperature": 0}
    response = server.post("/v1/chat/completions", body | {"max_tokens": NEW_TOKENS})
    assert response.status_code == 200, response.text
    return response.json()


def _register(server: Server, **fields: Any) -> list[dict[str, Any]]:
    response = server.post("/ape/contexts", {"contexts": CONTEXTS, **fields})
    assert response.status_code == 200, response.text
    return response.json()["contexts"]


def test_a_request_without_a_prefix_has_the_default_and_the_items(
    server: Server, expected: Expected
) -> None:
    prefix, query = expected.default + expected.items, expected.ids(QUERY)
    answer = _ask(server, CONTEXTS)
    assert answer["output_ids"] == expected.answer(prefix, query)
    tokens = len(prefix) + sum(map(len, expected.contexts)) + len(query)
    assert answer["meta_info"]["prompt_tokens"] == tokens
    body = {"model": "tiny", "prompt": QUERY, "contexts": CONTEXTS, "temperature": 0}
    completion = server.post("/v1/completions", {**body, "max_tokens": NEW_TOKENS}).json()
    assert completion["choices"][0]["text"] == answer["text"]
    assert completion["usage"]["prompt_tokens"] == tokens


@pytest.mark.parametrize("own", [{"prefix": ""}, {"prefix": "Notes:\n"}, {"prefix_ids": []}])
def test_a_prefix_that_a_request_gives_is_the_whole_of_p(
    server: Server, expected: Expected, own: dict[str, Any]
) -> None:
    bos = [expected.tokenizer.bos_token_id]
    prefix = own.get("prefix_ids", bos + expected.ids(own.get("prefix", "")))
    answer = _ask(server, CONTEXTS, **own)
    assert answer["output_ids"] == expected.answer(prefix, expected.ids(QUERY))


def test_a_chat_has_the_items_after_the_part_of_its_template(
    server: Server, expected: Expected
) -> None:
    before, query = expected.chat()
    answer = _chat(server, CONTEXTS)
    text = expected.tokenizer.decode(expected.answer(before + expected.items, query))
    assert answer["choices"][0]["message"]["content"] == text
    tokens = len(before) + len(expected.items) + sum(map(len, expected.contexts)) + len(query)
    assert answer["usage"]["prompt_tokens"] == tokens


def test_ids_stand_for_contexts_after_the_items_through_every_door(
    server: Server, expected: Expected
) -> None:
    before, _ = expected.chat()
    plain = _register(server)
    chat = _register(server, messages=MESSAGES[:1])
    for found, prefix in ((plain, expected.default), (chat, before)):
        spelt_out = _register(server, prefix_ids=prefix + expected.items)
        assert [one["id"] for one in found] == [one["id"] for one in spelt_out]
    for found, ask in ((plain, _ask), (chat, _chat)):
        by_text = ask(server, CONTEXTS)
        by_id = ask(server, [{"id": one["id"]} for one in found])
        mixed = ask(server, [{"id": found[0]["id"]}, *CONTEXTS[1:]])
        parts = [one.get("output_ids") or one["choices"] for one in (by_text, by_id, mixed)]
        assert parts[0] == parts[1] == parts[2]
    refused = server.post(
        "/generate", {"contexts": [{"id": plain[0]["id"]}], "text": QUERY, "prefix": ""}
    )
    assert refused.status_code == 400
    assert "another prefix" in refused.json()["error"]["message"]


# ---------------------------------------------------------------- python -m sglang_ape.warm


def _propose(server: Server, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    command = [sys.executable, "-m", "sglang_ape.warm", "--url", server.url, "--data", str(corpus)]
    return subprocess.run(
        [*command, "--out", str(folder / "warm.jsonl"), *options],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_proposed_items_are_no_copies_and_have_the_corpus_length_and_ending(
    server: Server, tmp_path: Path
) -> None:
    done = _propose(server, tmp_path, "--items", "1", "--tries", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    found = items.read(tmp_path / "warm.jsonl")
    assert len(found) == 1
    assert copied(found, CORPUS) == [None]
    for item in found:
        assert off_length(item, lengths_like(CORPUS)) is None
        assert item.endswith("\n") and "\n" not in item.strip()
        assert item.startswith("Note:")
    assert "items       1" in done.stdout


def test_too_few_items_leave_no_file(server: Server, tmp_path: Path) -> None:
    done = _propose(server, tmp_path, "--items", "20", "--tries", "1", "--temperature", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "good items of 20 after 1 tries" in done.stderr
    assert "try 1: rejected, " in done.stderr
    assert not (tmp_path / "warm.jsonl").exists()
