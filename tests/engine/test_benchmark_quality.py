"""The quality benchmarks against a real server with a tiny random model.

What such a model answers means nothing; that the controls hold does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ladder, many_shot_icl, rag_qa
from tests.engine.conftest import API_KEY
from tests.support.server import Server

RAG = ["--documents", "2", "20", "--questions", "4"]
LADDER = ["--documents", "3", "--facts", "3", "--questions", "3"]
LADDER += ["--shots", "6", "--per-context", "2"]
MANY_SHOT = ["--shots", "6", "--per-context", "2", "--questions", "4"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", API_KEY)


def measured(
    main: Callable[[Sequence[str]], None], server: Server, out: Path, *options: str
) -> tuple[dict[tuple[int, str], dict[str, Any]], dict[str, str], list[str]]:
    """Rows by level and method, what the controls saw, and the lines of answers."""
    main(["--quick", "--url", server.url, "--timed", "1", "--out", str(out), *options])
    content = json.loads((out / "results.json").read_text())
    assert content["finished"]
    rows = {(row["x"], row["method"]): row for row in content["rows"]}
    return rows, content["controls"]["invented"], (out / "answers.jsonl").read_text().splitlines()


def test_documents_beyond_the_window(store_server: Server, tmp_path: Path) -> None:
    rows, controls, _ = measured(rag_qa.main, store_server, tmp_path, *RAG)
    window = store_server.client.get("/v1/models").json()["data"][0]["max_model_len"]
    for method in ("parallel", "ape"):
        row = rows[20, method]
        assert (row["questions"], row["refused"]) == (4, 0)
        assert row["prompt_tokens"] > window
        assert row["warm_computed"] < row["prompt_tokens"] / 20
    for method in ("sequential", "one context"):
        assert (rows[20, method]["questions"], rows[20, method]["refused"]) == (0, 4)
        assert (rows[2, method]["questions"], rows[2, method]["refused"]) == (4, 0)
    assert (tmp_path / "invented.png").stat().st_size > 10_000
    assert controls["one context, 2 documents"].startswith("4 of 4 questions fit")
    assert controls["one context, 20 documents"].startswith("0 of 4 questions fit")
    assert controls["parallel"].startswith("log-probabilities of 2 answers within")


def test_demonstrations_are_computed_once(store_server: Server, tmp_path: Path) -> None:
    rows, controls, _ = measured(many_shot_icl.main, store_server, tmp_path, *MANY_SHOT)
    for method in ("sequential", "one context", "parallel", "ape"):
        row = rows[6, method]
        assert row["prompt_tokens"] < row["computed_tokens"] < 2 * row["prompt_tokens"]
        assert row["warm_computed"] < row["prompt_tokens"] / 4
    assert controls["one context, 6 shots in 3"].startswith("4 of 4 questions fit")
    assert controls["parallel"].startswith("log-probabilities of 2 answers within")


def test_every_rung_of_the_ladder_is_served(store_server: Server, tmp_path: Path) -> None:
    """On a real server: scores and tokens are counted, and rungs that change nothing do so."""
    ladder.main(["--quick", "--url", store_server.url, "--out", str(tmp_path), *LADDER])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["finished"]
    for data in ladder.QUICK_DATA:
        rows = {row["method"]: row for row in content["rows"] if row["data"] == data}
        for method in ("sequential", "parallel", "ape", "ape + warm"):
            assert not rows[method].get("scored_tokens"), method
        for method in ("ape + soft", "ape + refine", "ape + warm + soft"):
            assert rows[method]["scored_tokens"] > 3 * 3, method
        assert rows["ape + refine"]["refined_tokens"] > 0
        assert rows["ape + refine"]["prompt_tokens"] < rows["ape"]["prompt_tokens"]
        assert rows["ape"]["prompt_tokens"] < rows["ape + warm"]["prompt_tokens"]
        controls = content["controls"][data]
        assert "scores within" in controls.pop("scores")
        assert "log-probabilities of 2 answers within" in controls.pop("parallel")
        assert len(controls) == 2
        assert all(seen.startswith("3 of 3 questions fit") for seen in controls.values())


def test_the_same_seed_gives_the_same_answers(store_server: Server, tmp_path: Path) -> None:
    options = [*MANY_SHOT, "--no-reference", "--seed", "3"]
    first, again = (
        measured(many_shot_icl.main, store_server, tmp_path / name, *options) for name in "ab"
    )
    assert first[2] == again[2]
    for place, row in first[0].items():
        assert row["exact match"] == again[0][place]["exact match"]
