"""``python -m sglang_ape.warm``: what is shown to the model, what is rejected, what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape.calibrate.backend import Facts
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.warm import __main__ as command
from sglang_ape.warm import items
from sglang_ape.warm.check import copied, lengths_like, named, off_length, words_of
from sglang_ape.warm.prompt import form_of, prompt_ids
from sglang_ape.warm.propose import Proposer, Settings, WarmFailure
from tests.unit.test_expand import CharTokenizer

CORPUS = [
    "Title: Mill\nThe mill of Orrin is made of oak and was built by Tessa Vale in 1701.\n\n",
    "Title: Bridge\nThe bridge of Lunn is made of brick and was built by Marek Osk in 1822.\n\n",
    "Title: Tower\nThe tower of Grenn is made of slate and was built by Ilse Brandt in 1650.\n\n",
]
GOOD = " Barn\nThe barn of Vask is made of clay and was built by Petra Sund in 1744."
OTHER = " Well\nThe well of Pellam is made of stone and was built by Ruben Quist in 1803."
COPY = " Mill\nThe mill of Orrin is made of oak and was built by Petra Sund in 1799."
texts = st.text(st.characters(exclude_categories=["Cs"]))


# ---------------------------------------------------------------- the file


@given(found=st.lists(texts.filter(bool), min_size=1))
def test_what_is_written_is_read(found: list[str], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("items") / "warm.jsonl"
    items.write(found, path)
    assert items.read(path) == tuple(found)


def test_a_crash_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "warm.jsonl"
    items.write(["old"], path)

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        items.write(["new"], path)
    assert items.read(path) == ("old",)
    assert list(tmp_path.iterdir()) == [path]


def test_reading_items_imports_nothing_large() -> None:
    code = (
        "import sys, sglang_ape.warm.items\n"
        "large = {'torch', 'sglang', 'numpy', 'pydantic', 'transformers'}\n"
        "assert not large & set(sys.modules), large & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("item", "shared"),
    [
        ("The barn of Vask was built by Petra Sund in the wet year 1744.", None),
        ("See: the MILL, of Orrin is made of oak; and so on.", "the mill of orrin is made of oak"),
        ("was built by Tessa Vale in 1701", "was built by tessa vale in 1701"),
        ("", None),
    ],
)
def test_words_in_a_row_from_the_corpus_make_a_copy(item: str, shared: str | None) -> None:
    assert copied([item], CORPUS) == [shared]


def test_words_that_many_documents_have_in_a_row_are_the_format() -> None:
    line = "Published by the department of roads and bridges in the capital.\n"
    corpus = [line + text for text in CORPUS]
    item = line + "The barn of Vask is made of clay."
    assert copied([item], corpus) == [None]
    assert copied([item], [corpus[0], *CORPUS]) == [
        "published by the department of roads and bridges"
    ]


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ("Tessa Vale lives there.", "Tessa Vale"),
        ("The Marek Osk house", "Marek Osk"),
        ("tessa vale, Marek, Osk and Ilse. Brandt", None),
        ("Petra Sund lives there.", None),
    ],
)
def test_names_of_the_corpus_are_found(item: str, name: str | None) -> None:
    assert named([item], CORPUS) == [name]
    assert named([item], ["Tessa Vale and Marek Osk wrote: " + text for text in CORPUS]) == [None]


def test_an_item_like_one_before_it_is_a_copy() -> None:
    assert copied([GOOD, GOOD, OTHER], CORPUS)[0] is None
    assert copied([GOOD, GOOD, OTHER], CORPUS)[1] is not None
    assert copied([GOOD, GOOD, OTHER], CORPUS)[2] is None


@given(
    words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30),
    corpus=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=30), max_size=4),
)
def test_copies_are_those_of_a_search_by_substrings(
    words: list[str], corpus: list[list[str]]
) -> None:
    size = min(8, len(words))
    texts = [" ".join(own) for own in corpus]
    rows = [" ".join(words[at : at + size]) for at in range(len(words) - size + 1)]
    counts = [sum(f" {row} " in f" {text} " for text in texts) for row in rows]
    form = max(2, 0.1 * len(texts))
    expected = next((row for row, n in zip(rows, counts, strict=True) if 0 < n < form), None)
    assert copied([" ".join(words)], texts) == [expected]


def test_letters_without_blanks_between_them_count_as_words() -> None:
    assert words_of("橋は1822年に") == ["橋", "は", "1822", "年", "に"]
    assert copied(["その橋は石で造られた長い橋です"], ["昔その橋は石で造られた"]) != [None]


def test_items_have_about_the_length_of_the_corpus() -> None:
    allowed = lengths_like(["a" * 10, "a" * 20, "a" * 90])
    assert allowed == (10, 40)
    assert [off_length("x" * n, allowed) is None for n in (9, 10, 40, 41)] == [
        False,
        True,
        True,
        False,
    ]
    assert off_length(" \n", allowed) == "empty"


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("corpus", "opening", "ending", "stop"),
    [
        (CORPUS, "Title:", "\n\n", "\n\n"),
        (["The mill.\n", "The bridge.\n", "The mine. "], "The", "\n", "\n"),
        (["Three", "Thirty"], "", "", "\n"),
        (["Note\n1", "Note\n2"], "Note\n", "", "\n\n"),
        (["alone\n"], "", "\n", "\n"),
        (["Mill", "Mill of Orrin\n\nis old"], "Mill", "", None),
    ],
)
def test_the_form_is_what_all_begin_and_most_end_with(
    corpus: list[str], opening: str, ending: str, stop: str | None
) -> None:
    assert form_of(corpus) == (opening, ending, stop)


@given(corpus=st.lists(texts, min_size=1, unique=True))
def test_every_text_has_the_opening_of_its_corpus(corpus: list[str]) -> None:
    form = form_of(corpus)
    assert all(text.startswith(form.opening) for text in corpus)


def test_an_item_is_the_opening_the_answer_and_the_ending() -> None:
    form = form_of(CORPUS)
    assert form.item(" Barn\nIt is red.  \n") == "Title: Barn\nIt is red.\n\n"
    assert form.item(" \n") == ""
    assert form_of(["a\n", "b\n"]).item("\n c") == "c\n"


class ChatTokenizer(CharTokenizer):
    """One that renders a chat as its text between brackets."""

    chat_template = "a template"

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt
        return f"<{messages[0]['content']}>"


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_the_answer_goes_on_after_the_opening() -> None:
    form = form_of(CORPUS)
    asked = text_of(prompt_ids(ChatTokenizer(), CORPUS[:2], form, with_template=True))
    assert asked.endswith(">Title:")
    assert all(text.strip() in asked for text in CORPUS[:2])
    listed = text_of(prompt_ids(CharTokenizer(), CORPUS[:2], form, with_template=False)[1:])
    assert listed.startswith("Text 1:\nTitle: Mill") and listed.endswith("\n\nText 3:\nTitle:")


# ---------------------------------------------------------------- rounds


class Model:
    """Gives answers in turn."""

    def __init__(self, *answers: str, tokenizer: Any = None, window: int = 4000) -> None:
        limits = Limits(window, window, 10_000, 1 << 32)
        self.facts = Facts("/models/fake", tokenizer or ChatTokenizer(), limits, window, None)
        self.bodies: list[Mapping[str, Any]] = []
        self.closed = False
        self.error: Exception | None = None
        self.reason = {"type": "stop"}
        self._answers = list(answers)

    def ask(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.bodies.append(body)
        if self.error is not None:
            raise self.error
        info = {"finish_reason": self.reason, "completion_tokens": 7}
        return [{"text": self._answers.pop(0), "meta_info": info} for _ in body["input_ids"]]

    def close(self) -> None:
        self.closed = True


def proposer(model: Model, corpus: Sequence[str] = CORPUS, **changes: Any) -> Proposer:
    settings = Settings(items=2, shown=2, tries=3, temperature=0.0, seed=0)
    return Proposer(model, corpus, settings._replace(**changes))


def test_only_what_is_missing_is_asked_for_again() -> None:
    famous = OTHER.replace("Ruben Quist", "Tessa Vale")
    model = Model(GOOD, COPY, famous, OTHER)
    found = proposer(model)
    assert found.run() == [f"Title:{GOOD}\n\n", f"Title:{OTHER}\n\n"]
    assert [len(body["input_ids"]) for body in model.bodies] == [2, 1, 1]
    assert [(one.attempt, one.reason.partition(":")[0]) for one in found.rejected] == [
        (1, "copied"),
        (2, "a name of the corpus"),
    ]


def test_an_answer_without_an_end_is_rejected() -> None:
    model = Model(*[GOOD, OTHER] * 3)
    model.reason = {"type": "length"}
    with pytest.raises(WarmFailure, match="0 good items of 2 after 3 tries"):
        proposer(model).run()


def test_each_try_shows_other_contexts_and_the_same_seed_the_same() -> None:
    def shown(seed: int) -> list[Any]:
        model = Model(*[COPY] * 6)
        with pytest.raises(WarmFailure):
            proposer(model, seed=seed).run()
        return [ids for body in model.bodies for ids in body["input_ids"]]

    assert shown(0) == shown(0) != shown(1)
    assert len(set(map(tuple, shown(0)))) > 1


def test_a_model_without_a_template_goes_on_with_a_list() -> None:
    model = Model(GOOD, OTHER, tokenizer=CharTokenizer())
    assert len(proposer(model).run()) == 2
    assert all(text_of(ids[-6:]) == "Title:" for ids in model.bodies[0]["input_ids"])
    assert model.bodies[0]["sampling_params"][0]["stop"] == ["\n\n"]
    paragraphs = [text + "More.\n\n" for text in CORPUS]
    model = Model(GOOD, OTHER, tokenizer=CharTokenizer())
    assert len(proposer(model, paragraphs).run()) == 2
    assert model.bodies[0]["sampling_params"][0]["stop"] == ["\n\nText "]


def test_fewer_contexts_are_shown_where_the_window_is_small() -> None:
    window = 900
    model = Model(GOOD, OTHER, window=window)
    proposer(model, shown=3).run()
    for ids, params in zip(
        model.bodies[0]["input_ids"], model.bodies[0]["sampling_params"], strict=True
    ):
        assert len(ids) + params["max_new_tokens"] < window
    with pytest.raises(WarmFailure, match="do not fit the 300 tokens"):
        proposer(Model(window=300)).run()


def test_what_the_engine_gives_up_is_an_error() -> None:
    model = Model(GOOD, OTHER)
    model.reason = {"type": "abort", "message": "out of luck"}
    with pytest.raises(ApeRequestError, match="out of luck"):
        proposer(model).run()


# ---------------------------------------------------------------- the command


class Command:
    """``main`` on a corpus, with a :class:`Model`."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.model = Model(COPY, GOOD, OTHER)
        self.corpus = folder / "corpus.jsonl"
        self.out = folder / "warm.jsonl"
        self._capsys = capsys
        self.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
        monkeypatch.setattr(command, "open_backend", lambda args, flags: self.model)

    def __call__(self, *options: str, status: int = 0) -> str:
        argv = ["--url", "http://nowhere", "--data", str(self.corpus), "--out", str(self.out)]
        assert command.main([*argv, *options]) == status
        captured = self._capsys.readouterr()
        assert self.out.exists() == (status == 0)
        return captured.out + captured.err


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def test_the_command_writes_items_that_a_server_takes(run: Command) -> None:
    output = run()
    assert set(items.read(run.out)) == {f"Title:{GOOD}\n\n", f"Title:{OTHER}\n\n"}
    assert "try 1: rejected, copied: " in output
    assert "rejected    1 (1 copied)" in output
    assert f"file        {run.out}" in output
    assert run.model.closed


def test_too_few_items_end_with_1_and_no_file(run: Command) -> None:
    assert "1 good items of 2 after 1 tries" in run("--tries", "1", status=1)
    assert run.model.closed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('"a"\n{', "line 2: not JSON"),
        ('"a"\n{"input_ids": [1]}', "line 2: token ids cannot be shown"),
        ("\n", "holds no document"),
    ],
)
def test_a_wrong_corpus_ends_with_2_and_nothing_is_asked(
    run: Command, content: str, reason: str
) -> None:
    run.corpus.write_text(content)
    assert reason in run(status=2)
    assert not run.model.bodies


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ApeRequestError("answered 401 Unauthorized", None, 401), 1, "error: answered 401"),
        (requests.ConnectionError("gone"), 1, "no answer from http://nowhere: gone"),
        (KeyboardInterrupt(), 130, "interrupted: no file was written"),
    ],
)
def test_what_goes_wrong_is_said_and_no_file_is_written(
    run: Command, error: Exception, status: int, said: str
) -> None:
    run.model.error = error
    assert said in run(status=status)
    assert run.model.closed


def test_a_folder_is_no_place_for_the_items(run: Command, tmp_path: Path) -> None:
    assert "is a folder" in run("--out", str(tmp_path), status=2)
    assert not run.model.bodies


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--items", "0"), "--items"),
        (("--temperature", "-1"), "--temperature: must be 0 or more"),
        (("--", "--dtype", "float32"), "server flags after -- go with --model"),
        (("--model", "m"), "not allowed with argument --url"),
    ],
)
def test_wrong_options_are_named(run: Command, options: tuple[str, ...], reason: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
    assert reason in run._capsys.readouterr().err
