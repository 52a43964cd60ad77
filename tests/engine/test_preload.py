"""``python -m sglang_ape.preload`` as a process of its own, against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_ape import ContextStore
from sglang_ape.errors import ApeRequestError
from tests.engine.conftest import API_KEY
from tests.support.server import Server

# The server is shared with other tests; nobody else has this key.
KEY = "preload-tests"
PREFIX = "Preloaded notes:\n"
TEXTS = [
    "The Ossel ferry crosses the lake six times a day.\n",
    "The clock of Grenn has a single hand.\n",
    "The bees of Thornby belong to the village.\n",
    "The Kestrel leaves Dunmore at ten.\n",
    "The bridge of Anvers has five arches.\n",
]


class Command:
    """The command on a file with ``TEXTS``, for the tests' own prefix and key."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.path = folder / "documents.jsonl"
        self.ids = folder / "documents.jsonl.ids.jsonl"
        self.write(TEXTS)

    def write(self, documents: list[Any]) -> None:
        self.path.write_text("".join(json.dumps(one) + "\n" for one in documents))

    def __call__(self, *options: str, key: str = API_KEY, status: int = 0) -> str:
        """What it printed."""
        command = [sys.executable, "-m", "sglang_ape.preload", "--url", self.server.url]
        command += ["--extra-key", KEY, "--batch-size", "2", *options, str(self.path)]
        environment = {**os.environ, "SGLANG_API_KEY": key}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ids.read_text().splitlines()]


@pytest.fixture
def store(store_server: Server) -> ContextStore:
    return ContextStore(store_server.url, API_KEY)


@pytest.fixture
def run(store_server: Server, store: ContextStore, tmp_path: Path) -> Command:
    """The command, with nothing known or cached of its texts."""
    for one in list(store.contexts(extra_key=KEY)):
        store.forget(one["id"])
    store_server.flush()
    return Command(store_server, tmp_path)


def _sent(output: str) -> int:
    """How many documents the summary says were sent."""
    line = next(line for line in output.splitlines() if line.startswith("documents"))
    return int(line.split()[-3])


def _registered_tokens(server: Server) -> float:
    """Of all contexts that the server was asked to register so far, again and again."""
    lines = server.client.get("/metrics").text.splitlines()
    ours = [line for line in lines if line.startswith("sglang:ape_context_tokens_total")]
    return sum(float(line.split()[-1]) for line in ours if 'by="registration"' in line)


def test_ids_stand_for_the_texts_in_a_request(run: Command, store_server: Server) -> None:
    run("--prefix", PREFIX)
    body = {
        "text": "Question: when does the Kestrel leave? Answer:",
        "extra_key": KEY,
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
    }
    by_id = {**body, "contexts": [{"id": record["id"]} for record in run.records()]}
    by_text = {**body, "contexts": TEXTS, "prefix": PREFIX}
    first = store_server.generate(by_id)
    assert first["meta_info"]["cached_tokens"] >= sum(one["tokens"] for one in run.records())
    assert store_server.generate(by_text)["output_ids"] == first["output_ids"]
    other = store_server.generate({**by_text, "contexts": TEXTS[:2]})
    assert other["output_ids"] != first["output_ids"]  # they do depend on the contexts


def test_the_summary_tells_what_was_computed_and_what_is_cached(run: Command) -> None:
    run.write([{"input_ids": [20 + i] * 10} for i in range(5)])  # no two begin alike
    output = run("--prefix", PREFIX)
    assert "computed  50\n" in output and "cached    0 already" in output
    assert "cached now  5 documents; 50 tokens\n" in output
    run.ids.unlink()
    output = run("--prefix", PREFIX)
    assert "computed  0\n" in output and "cached    50 already" in output


def test_a_second_run_registers_nothing_and_later_what_was_deleted(
    run: Command, store: ContextStore, store_server: Server
) -> None:
    assert _sent(run()) == 5
    first = run.records()
    counted = _registered_tokens(store_server)
    assert counted >= sum(record["tokens"] for record in first)
    assert _sent(run()) == 0
    assert _registered_tokens(store_server) == counted
    store.forget(first[3]["id"])
    assert _sent(run()) == 1
    assert _registered_tokens(store_server) == counted + first[3]["tokens"]
    assert store.get(first[3]["id"])["tokens"] == first[3]["tokens"]
    assert run.records() == first


def test_pinned_documents_outlive_a_flush_of_the_others(
    run: Command, store: ContextStore, store_server: Server
) -> None:
    run("--prefix", PREFIX)
    assert _sent(run("--prefix", PREFIX, "--pin")) == 5
    listed = list(store.contexts(extra_key=KEY))
    assert [one["pinned"] for one in listed] == [True] * 5
    for one in listed:
        store.forget(one["id"])
    assert not list(store.contexts(extra_key=KEY))
    store_server.flush()


def test_a_system_message_prepares_chats_with_it(run: Command, store_server: Server) -> None:
    run("--system", "Answer from the notes.")
    chat = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Answer from the notes."},
            {"role": "user", "content": "When does the Kestrel leave?"},
        ],
        "contexts": [{"id": record["id"]} for record in run.records()],
        "extra_key": KEY,
        "max_tokens": 2,
    }
    assert store_server.post("/v1/chat/completions", chat).status_code == 200
    chat["messages"][0]["content"] = "Another one."
    assert store_server.post("/v1/chat/completions", chat).status_code == 400


def test_token_ids_give_the_id_of_the_text(run: Command) -> None:
    run("--prefix", PREFIX)
    texts = run.records()
    from transformers import AutoTokenizer

    model = run.server.client.get("/model_info").json()["model_path"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    run.write([{"input_ids": one} for one in ids])
    output = run("--prefix", PREFIX)
    assert "computed  0\n" in output
    assert [one["id"] for one in run.records()] == [one["id"] for one in texts]


def test_more_documents_than_the_pool_holds_are_said_to_be_so(run: Command) -> None:
    run.write([{"input_ids": [5 + i, *range(100, 500), *range(100, 500)]} for i in range(9)])
    output = run()  # 9 of 801 tokens; the pool has 6,000
    assert "Documents not, or not wholly, cached now: " in output
    assert "tokens      7,209, of which 7,209 were sent" in output


def test_a_document_that_fits_no_request_is_named_by_its_line(run: Command) -> None:
    run.write([*TEXTS, {"input_ids": [5] * 2048}])
    output = run(status=1)
    assert f"error: {run.path}, line 6: contexts[1]" in output
    assert len(run.records()) == 4


def test_pins_beyond_the_cap_end_the_run_with_the_servers_words(run: Command) -> None:
    run.write([{"input_ids": [5 + i] * 700} for i in range(6)])
    output = run("--pin", status=1)
    assert "--ape-max-pinned-tokens 2000" in output and "Traceback" not in output
    assert len(run.records()) == 2


@pytest.mark.parametrize("key", ["", "another"])
def test_without_the_key_nothing_is_served(run: Command, key: str) -> None:
    output = run(key=key, status=1)
    assert "answered 401 Unauthorized" in output and "Traceback" not in output


def test_the_client_gets_the_servers_own_refusals(store: ContextStore) -> None:
    calls = {
        "contexts[1]": lambda: store.register(["a", ""], extra_key=KEY),
        "prefix_ids": lambda: store.register(["a"], prefix="P", prefix_ids=[5]),
        "tools": lambda: store.register(["a"], tools=[]),
        "id": lambda: store.get("ctx-0"),
    }
    for param, call in calls.items():
        with pytest.raises(ApeRequestError) as caught:
            call()
        assert caught.value.param == param
        assert caught.value.status_code == (404 if param == "id" else 400)
