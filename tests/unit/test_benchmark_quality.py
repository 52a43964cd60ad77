"""A quality benchmark from its options to its files, on a server that is made up."""

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from benchmarks import many_shot_icl, rag_qa
from benchmarks.common import demonstrations, invented, quality
from benchmarks.common.client import Refused, Timed
from benchmarks.common.controls import ControlError
from benchmarks.common.data import Unavailable
from benchmarks.common.methods import PLAIN, Method
from benchmarks.common.quality import another_order
from benchmarks.common.results import Axes
from benchmarks.common.script import exit_status
from benchmarks.common.server import ServerError
from benchmarks.rag_qa import question

WINDOW = 700
ANSWER = "Kelsund 1893"


class Server:
    """Answers by the tokens of the prompt, and refuses what the window does not hold."""

    url = "http://127.0.0.1:1"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_ape = True
        self.ignores_contexts = False
        self.streamed: list[dict[str, Any]] = []
        self.flushed = 0

    def info(self) -> dict[str, Any]:
        return {"enable_ape": self.has_ape, "dtype": "float32"}

    def model_path(self) -> str:
        return str(self.folder)

    def flush(self) -> None:
        self.flushed += 1

    def generate(
        self, bodies: Sequence[dict[str, Any]], concurrency: int = 1, label: str | None = None
    ) -> list[dict[str, Any] | Refused]:
        return [self._answer(body) for body in bodies]

    def stream(self, bodies: Sequence[dict[str, Any]]) -> list[Timed]:
        self.streamed += bodies
        answer = self._answer(bodies[0])
        if isinstance(answer, Refused):
            raise answer
        return [Timed(0.25, 0.5, answer["meta_info"])]

    def _answer(self, body: dict[str, Any]) -> dict[str, Any] | Refused:
        contexts = [one["input_ids"] for one in body.get("contexts", [])]
        joined = [*body.get("prefix_ids", []), *chain(*contexts), *body["input_ids"]]
        inside = len(joined) - sum(map(len, contexts)) + max(map(len, contexts), default=0)
        if inside > WINDOW:
            return Refused(f"{inside} positions")
        seen = body["input_ids"] if contexts and self.ignores_contexts else joined
        meta = {"prompt_tokens": len(joined), "cached_tokens": 3}
        return {"text": f" {ANSWER if sum(seen) % 2 else sum(seen)}\nmore", "meta_info": meta}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> Server:
    made = Server(tmp_path)

    @contextlib.contextmanager
    def running(*_: Any) -> Iterator[Server]:
        yield made

    encoder = quality.Encoder

    def plot(path: Path, title: str, axes: Sequence[Axes]) -> None:
        assert [len(line.x) for one in axes for line in one.lines]
        path.write_text(title)

    monkeypatch.setattr(quality, "ape_server", running)
    monkeypatch.setattr(quality, "plot", plot)  # drawing costs a second
    monkeypatch.setattr(quality, "Encoder", lambda _, chat: encoder(str(tiny_llama), chat))
    return made


def run(main: Callable[[Sequence[str]], None], out: Path, *options: str) -> dict[str, Any]:
    main(["--quick", "--url", "x", "--no-reference", "--out", str(out), *options])
    content = json.loads((out / "results.json").read_text())
    assert content["finished"]
    return content


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


##### Whole runs


def test_documents_beyond_the_window(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(rag_qa.main, tmp_path, "--documents", "1", "2", "12", "--questions", "4")
    rows = {(row["x"], row["method"]): row for row in content["rows"]}
    with_contexts = [own.value for own in PLAIN if own is not Method.NONE]
    without_half = [name for name in with_contexts if name != Method.HALF]
    assert list(rows) == [
        (0, "none"),
        *((1, name) for name in without_half),
        *((count, name) for count in (2, 12) for name in with_contexts),
    ]
    for (count, method), row in rows.items():
        alone = count == 12 and method not in (Method.PARALLEL, Method.APE)
        assert (row["questions"], row["refused"]) == ((0, 4) if alone else (4, 0)), row
        assert ("warm_ms" in row) is not alone
    ape = rows[12, "ape"]
    assert ape["cold_ms"] == ape["warm_ms"] == 250
    assert ape["prompt_tokens"] > WINDOW
    assert content["controls"]["invented"] == {
        "parallel": "not checked: --no-reference",
        "one context, 1 document": "4 of 4 questions fit, all answered alike",
        "one context, 2 documents": "4 of 4 questions fit, all answered alike",
        "one context, 12 documents": "0 of 4 questions fit, all answered alike",
    }
    assert "checks the machinery" in (tmp_path / "invented.png").read_text()
    printed = capsys.readouterr().out
    assert "checks the machinery, not quality" in printed
    assert max(map(len, printed.splitlines())) <= 140


def test_answers_are_written_one_a_line(server: Server, tmp_path: Path) -> None:
    content = run(rag_qa.main, tmp_path, "--documents", "2", "12", "--questions", "4")
    entries = answers(tmp_path)
    assert len(entries) == 4 * len(content["rows"])
    for row in content["rows"]:
        own = [e for e in entries if (e["level"], e["method"]) == (row["x"], row["method"])]
        assert [entry["question"] for entry in own] == [0, 1, 2, 3]
        given = [entry for entry in own if "refused" not in entry]
        assert len(given) == row["questions"]
        for name in rag_qa.SCORES if given else ():
            assert row[name] == pytest.approx(sum(entry[name] for entry in given) / len(given))
        for entry in given:
            assert "\n" not in entry["answer"]
            assert {"data", "asked", "accepted"} <= set(entry)
        for entry in own:
            assert "positions" in entry.get("refused", "positions")


def test_the_seed_decides_everything(server: Server, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(rag_qa.main, tmp_path / name, "--documents", "2", "--seed", seed)
    assert answers(tmp_path / "a") == answers(tmp_path / "b")
    assert answers(tmp_path / "a") != answers(tmp_path / "c")


def test_timed_contexts_come_again_in_another_order(server: Server, tmp_path: Path) -> None:
    run(rag_qa.main, tmp_path, "--documents", "3", "--questions", "2", "--timed", "1")
    cold, warm = [body for body in server.streamed if body.get("ape", {}).get("scale") == 0.9]
    assert cold["input_ids"] != warm["input_ids"]
    ids = [[one["input_ids"] for one in body["contexts"]] for body in (cold, warm)]
    assert ids[0] != ids[1]
    assert sorted(ids[0]) == sorted(ids[1])


def test_demonstrations_are_the_same_for_all_questions(server: Server, tmp_path: Path) -> None:
    content = run(many_shot_icl.main, tmp_path, "--shots", "10", "--per-context", "4")
    assert [row["level"] for row in content["rows"]] == ["0 shots"] + 5 * ["10 shots in 3"]
    cold, warm, *_ = [body for body in server.streamed if body.get("ape", {}).get("scale") == 0.9]
    assert cold["contexts"] == warm["contexts"]
    assert len(cold["contexts"]) == 3
    halves = {row["method"]: row["prompt_tokens"] for row in content["rows"]}
    assert halves["none"] < halves["sequential, half"] < halves["sequential"] == halves["ape"]


def test_several_data_sets_are_reported_apart(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(given: str, seed: int) -> demonstrations.Examples:
        if given == "away":
            raise Unavailable("away cannot be loaded: no network")
        return invented.requests(seed)._replace(name=given)

    monkeypatch.setattr(demonstrations, "load", load)
    content = run(many_shot_icl.main, tmp_path, "--data", "one", "away", "two", "--shots", "4")
    assert {row["data"] for row in content["rows"]} == {"one", "two"}
    assert set(content["controls"]) == {"one", "two"}
    assert (tmp_path / "one.png").exists()
    assert (tmp_path / "two.png").exists()
    assert "left out: away cannot be loaded" in capsys.readouterr().err


##### Runs that fail


def status(main: Callable[[Sequence[str]], None], out: Path, *options: str) -> int:
    return exit_status(lambda: main(["--quick", "--url", "x", "--out", str(out), *options]))


def test_nothing_measured_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(given: str, seed: int) -> demonstrations.Examples:
        raise Unavailable("no network")

    monkeypatch.setattr(demonstrations, "load", load)
    assert status(many_shot_icl.main, tmp_path, "--data", "trec") == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_wrong_data_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert status(rag_qa.main, tmp_path, "--data", str(tmp_path / "data.jsonl")) == 1
    assert "data.jsonl, line 1" in capsys.readouterr().err


def test_a_server_without_ape_is_no_server(server: Server, tmp_path: Path) -> None:
    server.has_ape = False
    with pytest.raises(ServerError, match="--enable-ape"):
        run(rag_qa.main, tmp_path)


def test_a_server_that_drops_contexts_fails_the_control(server: Server, tmp_path: Path) -> None:
    server.ignores_contexts = True
    with pytest.raises(ControlError, match="as an ordinary prompt"):
        run(rag_qa.main, tmp_path, "--documents", "2")
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]


def test_a_reference_without_weights_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="--no-reference goes without"):
        rag_qa.main(["--quick", "--url", "x", "--out", str(tmp_path), "--documents", "2"])


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (rag_qa.main, ["--documents", "-1"]),
        (rag_qa.main, ["--questions", "0"]),
        (many_shot_icl.main, ["--per-context", "0"]),
        (many_shot_icl.main, ["--shots", "-8"]),
        (many_shot_icl.main, ["--timed", "-1"]),
    ],
)
def test_options_out_of_range(main: Callable[[Sequence[str]], None], options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", *options])
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "x"])  # no --data


##### Parts


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_another_order(count: int) -> None:
    drawn = random.Random(0)
    for _ in range(50):
        order = another_order(count, drawn)
        assert sorted(order) == list(range(count))
        assert count < 2 or order[0] != 0


def test_half_is_the_better_half(tiny_llama: Path) -> None:
    encoder = quality.Encoder(str(tiny_llama))
    data = invented.places(seed=0, documents=40)
    for count in (1, 2, 5, 8):
        for one in data.questions[:10]:
            made = question(encoder, one, data.collection, count, seed=0)
            assert len(made.prompt.contexts) == count
            assert len(made.half) == (count + 1) // 2
            gold = encoder.prompt("", [rag_qa.shown(one.gold)], "").contexts[0]
            assert [made.prompt.contexts[i] for i in made.half].count(gold) == 1
            assert made.prompt.contexts.count(gold) == 1


def test_gold_stands_anywhere(tiny_llama: Path) -> None:
    encoder = quality.Encoder(str(tiny_llama))
    data = invented.places(seed=0, documents=40)
    made = [question(encoder, one, data.collection, 4, seed=0) for one in data.questions]
    golds = [encoder.prompt("", [rag_qa.shown(one.gold)], "").contexts[0] for one in data.questions]
    places = {one.prompt.contexts.index(gold) for one, gold in zip(made, golds, strict=True)}
    assert places == {0, 1, 2, 3}


def test_a_server_gets_room_for_the_longest_question(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[str] = []

    @contextlib.contextmanager
    def running(args: Any, parser: Any, given: Sequence[str]) -> Iterator[Server]:
        flags.extend(given)
        yield server

    monkeypatch.setattr(quality, "ape_server", running)
    rag_qa.main(
        ["--quick", "--model", "x", "--no-reference", "--out", str(tmp_path), "--documents", "12"]
    )
    longest = max(
        sum(len(one["input_ids"]) for one in body["contexts"])
        for body in server.streamed
        if "contexts" in body
    )
    assert flags[:2] == ["--context-length", str(rag_qa.QUICK_WINDOW)]
    assert flags[2] == "--ape-max-context-tokens"
    assert int(flags[3]) >= longest > WINDOW
