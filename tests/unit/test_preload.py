"""``python -m sglang_ape.preload`` against a small server that counts what it is sent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_ape.command import API_KEY_VARIABLE
from sglang_ape.errors import ApeRequestError
from sglang_ape.preload.__main__ import main
from sglang_ape.preload.documents import InputError
from sglang_ape.preload.id_file import IdFile, Record
from sglang_ape.preload.run import Preload
from tests.unit.test_client import FakeServer

TEXTS = [f"The {name} carries no cargo today.\n" for name in ("Heron", "Lark", "Ibis", "Rook", "é")]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer(page=2)
    yield server
    server.close()


class Command:
    """The command on a file of documents in a folder of its own."""

    def __init__(
        self, server: FakeServer, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.server = server
        self.path = folder / "documents.jsonl"
        self.ids = folder / "documents.jsonl.ids.jsonl"
        self._capsys = capsys
        self.write(TEXTS)

    def write(self, documents: Sequence[Any]) -> None:
        self.path.write_text("".join(json.dumps(one) + "\n" for one in documents))

    def arguments(self, *further: str) -> list[str]:
        return ["--url", self.server.url, "--batch-size", "2", *further, str(self.path)]

    def __call__(self, *further: str, status: int = 0) -> str:
        """Run it; what it printed."""
        assert main(self.arguments(*further)) == status
        printed = self._capsys.readouterr()
        assert bool(printed.err) == (status != 0), printed.err
        return printed.out + printed.err

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ids.read_text().splitlines()]

    def take_sent(self) -> list[Any]:
        """What was registered since the last time."""
        sent = self.server.sent
        self.server.registrations.clear()
        return sent


@pytest.fixture
def run(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(server, tmp_path, capsys)


##### A whole run


def test_every_document_is_registered_and_its_id_written_down(run: Command) -> None:
    output = run()
    assert [body["contexts"] for body in run.server.registrations] == [
        TEXTS[:2],
        TEXTS[2:4],
        TEXTS[4:],
    ]
    records = run.records()
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["id"] for record in records] == list(run.server.contexts)
    assert [record["tokens"] for record in records] == [len(text) for text in TEXTS]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in TEXTS]
    assert [record["sha256"] for record in records] == hashes
    tokens = sum(map(len, TEXTS))
    assert output.splitlines()[:-1] == [
        "documents   5, of which 5 were sent",
        f"tokens      {tokens}, of which {tokens} were sent",
        f"  computed  {tokens}",
        "  cached    0 already",
        f"cached now  5 documents; {tokens} tokens",
        f"ids         {run.ids}",
    ]
    assert output.splitlines()[-1].startswith("time  ")


def test_lines_may_be_strings_objects_or_token_ids(run: Command) -> None:
    run.write(["a", {"text": "b", "title": 3}, {"input_ids": [4, 5]}])
    with run.path.open("a") as file:
        file.write('\n  \n"without an end of line\\u2028"')
    run()
    assert run.take_sent() == ["a", "b", {"input_ids": [4, 5]}, "without an end of line\u2028"]
    assert [record["line"] for record in run.records()] == [1, 2, 3, 6]


def test_the_text_may_stand_in_another_field(run: Command) -> None:
    run.write([{"body": "b", "text": "t"}])
    run("--text-field", "body")
    assert run.take_sent() == ["b"]


def test_equal_documents_are_sent_once_and_each_has_a_line(run: Command) -> None:
    run.write(["a", "b", "a", "a", "c", "b"])
    output = run()
    assert run.take_sent() == ["a", "b", "c"]
    assert "documents   6, of which 3 were sent" in output
    ids = [record["id"] for record in run.records()]
    assert ids[0] == ids[2] == ids[3] and ids[1] == ids[5] and len(set(ids)) == 3


def test_a_text_is_never_taken_for_token_ids(run: Command) -> None:
    run.write(["[4,5]", {"input_ids": [4, 5]}])
    run()
    assert run.take_sent() == ["[4,5]", {"input_ids": [4, 5]}]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((), {}),
        (("--prefix", ""), {"prefix": ""}),
        (("--prefix", "P\n"), {"prefix": "P\n"}),
        (("--prefix-file", "{file}"), {"prefix": "one\r\ntwo é\n"}),
        (("--system", "S"), {"messages": [{"role": "system", "content": "S"}]}),
        (("--pin",), {"pin": True}),
        (("--lora-path", "l", "--extra-key", "k"), {"lora_path": "l", "extra_key": "k"}),
    ],
)
def test_options_go_into_every_registration(
    run: Command, tmp_path: Path, options: tuple[str, ...], fields: dict[str, Any]
) -> None:
    file = tmp_path / "prefix.txt"
    file.write_bytes("one\r\ntwo é\n".encode())
    run(*(option.format(file=file) for option in options))
    for body in run.server.registrations:
        del body["contexts"]
        assert body == {"pin": False, **fields}


def test_the_key_comes_from_the_option_or_the_environment(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.server.api_key = "key"
    output = run(status=1)
    assert "401 Unauthorized" in output and "Traceback" not in output
    run("--api-key", "key")
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    run()
    monkeypatch.setenv(API_KEY_VARIABLE, "another")
    run(status=1)


def test_the_summary_says_what_the_server_could_not_keep(run: Command) -> None:
    run()
    first, second = list(run.server.contexts)[:2]
    run.server.contexts[first]["cached_tokens"] = 3
    run.server.contexts[second]["cached_tokens"] = 0
    tokens = sum(map(len, TEXTS[2:])) + 3
    output = run()
    assert f"cached now  3 documents; {tokens} tokens" in output
    assert "Documents not, or not wholly, cached now: 2;" in output
    assert "--ape-store-max-tokens" not in output


def test_the_summary_says_what_the_server_has_forgotten_already(run: Command) -> None:
    def forget_the_oldest(posts: int) -> None:
        if posts == 2:
            del run.server.contexts[next(iter(run.server.contexts))]

    run.server.before_post = forget_the_oldest
    assert "Documents no longer known, whose ids requests cannot use: 1;" in run()


##### Wrong documents


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('""', "the text is empty"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": null}', "'text' must be a string, got null"),
        ('{"title": "x"}', "has neither of the fields 'text' and 'input_ids'"),
        ('{"text": "x", "input_ids": [4]}', "has both of the fields 'text' and 'input_ids'"),
        ('{"input_ids": []}', "'input_ids' is empty"),
        ('{"input_ids": [4, true]}', "'input_ids' must be a list of integers"),
        ('{"input_ids": [-1]}', "'input_ids' must be a list of integers"),
        ("[4]", "must be a string or an object, got list"),
        ("5", "must be a string or an object, got int"),
        ("null", "must be a string or an object, got null"),
        ("no json", "not JSON"),
        ('"one" "two"', "not JSON"),
        ('"\\ud800"', "not JSON"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_sent(run: Command, line: str, said: str) -> None:
    with run.path.open("a") as file:
        file.write(f"\n{line}\n")
    output = run(status=2)
    assert f"{run.path}, line 7: {said}" in output
    assert not run.server.requests
    assert not run.ids.exists()


def test_many_wrong_lines_are_counted(run: Command) -> None:
    run.write([*TEXTS, *[""] * 25])
    output = run(status=2)
    assert [f"line {n}:" in output for n in (5, 6, 15, 16)] == [False, True, True, False]
    assert output.splitlines()[-1] == "and 15 further lines"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_documents_is_wrong(run: Command, content: str) -> None:
    run.path.write_text(content)
    assert "holds no document" in run(status=2)


def test_files_and_urls_that_do_not_exist_are_wrong_input(run: Command, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in run("--prefix-file", str(tmp_path / "nothing"), status=2)
    assert "http(s) URL" in run("--url", "127.0.0.1:30000", status=2)
    assert "folder" in run("--ids", str(tmp_path / "folder" / "ids"), status=2)
    run.path.unlink()
    assert str(run.path) in run(status=2)


def test_a_document_that_the_server_refuses_is_named_by_its_line(run: Command) -> None:
    refused = ApeRequestError("contexts[1]: too many tokens", "contexts[1]")

    def refuse(posts: int) -> None:
        run.server.answer = (400, json.dumps(refused.body()).encode()) if posts else None

    run.server.before_post = refuse
    output = run(status=1)
    assert f"error: {run.path}, line 4: contexts[1]: too many tokens\n" in output
    assert "documents registered by this run: 2;" in output


def test_documents_that_change_meanwhile_are_noticed(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preload, "_resume", lambda _: run.write(TEXTS[1:]))
    assert f"error: {run.path} was changed while it was read\n" in run(status=1)
    assert run.take_sent() == TEXTS[1:]


##### Taking up again


def test_a_second_run_sends_nothing(run: Command) -> None:
    run()
    before = run.ids.read_bytes()
    run.server.requests.clear()
    output = run()
    assert {method for method, _ in run.server.requests} == {"GET"}
    assert run.ids.read_bytes() == before
    assert "documents   5, of which 0 were sent" in output


def test_only_what_the_server_does_not_know_is_sent_again(run: Command) -> None:
    run()
    run.take_sent()
    first = run.records()
    for i in (1, 4):
        del run.server.contexts[first[i]["id"]]
    run()
    assert run.take_sent() == [TEXTS[1], TEXTS[4]]
    assert run.records() == first


def test_after_a_restart_of_the_server_everything_is_sent(run: Command) -> None:
    run()
    run.take_sent()
    run.server.restart()
    run()
    assert run.take_sent() == TEXTS


def test_changed_documents_are_sent_and_moved_ones_are_not(run: Command) -> None:
    run()
    run.take_sent()
    changed = ["new", TEXTS[2], TEXTS[0], TEXTS[3] + "!"]
    run.write(changed)
    run()
    assert run.take_sent() == ["new", TEXTS[3] + "!"]
    assert [record["line"] for record in run.records()] == [1, 2, 3, 4]
    contexts = {context["id"]: context["tokens"] for context in run.server.contexts.values()}
    assert [contexts[record["id"]] for record in run.records()] == list(map(len, changed))


@pytest.mark.parametrize(
    "options",
    [("--prefix", "P"), ("--system", "P"), ("--lora-path", "k"), ("--extra-key", "k")],
)
def test_ids_of_another_prefix_or_tenant_are_not_taken_over(
    run: Command, options: tuple[str, ...]
) -> None:
    run()
    first = run.records()
    run.take_sent()
    run(*options)
    assert run.take_sent() == TEXTS
    assert not {record["id"] for record in first} & {record["id"] for record in run.records()}


def test_what_is_known_without_a_pin_is_sent_again_to_be_pinned(run: Command) -> None:
    run()
    run.take_sent()
    next(iter(run.server.contexts.values()))["pinned"] = True
    run("--pin")
    assert run.take_sent() == TEXTS[1:]
    run()
    assert run.take_sent() == []


def test_a_server_that_goes_away_costs_no_more_than_one_batch(run: Command) -> None:
    run.server.before_post = lambda posts: posts >= 2
    output = run(status=1)
    message, done = output.splitlines()
    assert message.startswith(f"error: no connection to {run.server.url}")
    assert "documents registered by this run: 4;" in done and str(run.ids) in done
    assert [record["line"] for record in run.records()] == [1, 2, 3, 4]
    assert run.take_sent() == TEXTS[:4]
    run.server.before_post = lambda _: None
    run()
    assert run.take_sent() == TEXTS[4:]
    assert [record["line"] for record in run.records()] == [1, 2, 3, 4, 5]


def test_a_batch_that_takes_too_long_is_an_error_of_one_line(run: Command) -> None:
    done = threading.Event()
    run.server.before_post = lambda _: done.wait(20)
    output = run("--timeout", "0.3", status=1)
    done.set()
    assert output.splitlines()[0] == (
        f"error: {run.server.url} did not answer within 0.3 s (--timeout)"
    )


def test_ctrl_c_ends_with_what_was_done(run: Command) -> None:
    waiting, over = threading.Event(), threading.Event()

    def wait(posts: int) -> bool:
        if posts < 2:
            return False
        waiting.set()
        return over.wait(30)

    run.server.before_post = wait
    command = [sys.executable, "-m", "sglang_ape.preload", *run.arguments()]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Children of a shell's background job inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert waiting.wait(30)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    over.set()
    assert process.returncode == 130
    assert error.startswith("interrupted: documents registered by this run: 4;")
    assert len(error.splitlines()) == 1
    assert [record["line"] for record in run.records()] == [1, 2, 3, 4]


def test_a_kill_leaves_the_ids_of_every_finished_batch(run: Command) -> None:
    waiting, over = threading.Event(), threading.Event()

    def wait(posts: int) -> bool:
        if posts < 1:
            return False
        waiting.set()
        return over.wait(30)

    run.server.before_post = wait
    process = subprocess.Popen([sys.executable, "-m", "sglang_ape.preload", *run.arguments()])
    assert waiting.wait(30)
    process.kill()
    process.wait(30)
    over.set()
    assert [record["line"] for record in run.records()] == [1, 2]


##### The id file


@pytest.mark.parametrize("kept", [1, 9, 40])
def test_a_line_that_a_crash_cut_off_is_dropped(run: Command, kept: int) -> None:
    run()
    run.take_sent()
    whole = run.ids.read_bytes().splitlines(keepends=True)
    run.ids.write_bytes(b"".join(whole[:4]) + whole[4][:kept])
    run.server.before_post = lambda _: True  # so that the file is not written anew
    run(status=1)
    assert run.ids.read_bytes() == b"".join(whole[:4])
    run.server.before_post = lambda _: None
    run()
    assert run.take_sent() == TEXTS[4:]
    assert run.ids.read_bytes() == b"".join(whole)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a note without an end of line", 1),
        ('"The Heron carries no cargo today.\\n"\n', 1),
        ("{record}\nnonsense\n{record}\n", 2),
        ("{record}\nnonsense", 2),
        ('{record}\n{"line": 1}\n', 2),
        ("{list}\n", 1),
    ],
)
def test_a_file_of_something_else_is_left_alone(run: Command, content: str, line: int) -> None:
    record = Record(1, "0", "ctx-0", 5, "0")._asdict()
    content = content.replace("{record}", json.dumps(record))
    content = content.replace("{list}", json.dumps({**record, "id": []}))
    run.ids.write_text(content)
    assert f"{run.ids}, line {line}: not a line of an id file" in run(status=2)
    assert run.ids.read_text() == content
    assert not run.server.requests


def test_the_documents_themselves_cannot_be_the_id_file(run: Command) -> None:
    before = run.path.read_bytes()
    run("--ids", str(run.path), status=2)
    assert run.path.read_bytes() == before


def test_the_ids_go_where_the_option_says(run: Command, tmp_path: Path) -> None:
    run("--ids", str(tmp_path / "elsewhere"))
    assert not run.ids.exists()
    assert len((tmp_path / "elsewhere").read_text().splitlines()) == 5


def test_a_rewrite_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = IdFile(tmp_path / "ids")
    old, new = Record(1, "0", "ctx-0", 5, "0"), Record(1, "1", "ctx-1", 6, "1")
    file.append([old])

    def fail(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            file.rewrite([new])
    assert file.open() == [old]
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]
    file.rewrite([new])
    assert file.open() == [new]
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_a_rewrite_never_shows_half_a_file(tmp_path: Path) -> None:
    """A reader that has the old file open goes on reading the old one."""
    file = IdFile(tmp_path / "ids")
    records = [Record(i, "0", f"ctx-{i}", 5, "0") for i in range(1000)]
    file.append(records)
    with file.path.open() as reader:
        first = reader.readline()
        file.rewrite(records[:1])
        assert len([first, *reader]) == 1000
    assert file.open() == records[:1]


def test_a_new_id_file_is_empty(tmp_path: Path) -> None:
    assert IdFile(tmp_path / "ids").open() == []
    with pytest.raises(InputError):
        (tmp_path / "other").write_text("5\n")
        IdFile(tmp_path / "other").open()
