"""The benchmarks of efficiency and cache hits against real servers of both kinds.

Each server is started once and asked by both; what they would be started with is put together here.
No time is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cache_hits, efficiency
from benchmarks.common.options import parser_of
from benchmarks.common.pairs import Kind, Model, PairServer, add_pair_options, pair_server
from benchmarks.common.traces import Order

POOL = 1000
SERVER = ("--device", "cpu", "--dtype", "float32", "--grammar-backend", "none")
SHARED = ["--max-total-tokens", str(POOL), "--enable-metrics"]
FLAGS = {Kind.STOCK: SHARED, Kind.APE: [*SHARED, "--ape-max-context-tokens", "200"]}
EFFICIENCY = ["--lengths", "96,2000", "--batches", "1,2", "--context-length", "32"]
EFFICIENCY += ["--prefix", "8", "--query", "4", "--generated", "4", "--repeats", "2"]
CACHE_HITS = ["--documents", "40", "--requests", "40", "--per-request", "3", "--concurrency", "2"]
CACHE_HITS += ["--document-tokens", "24", "--prefix", "8", "--query", "4", "--generated", "4"]
CACHE_HITS += ["--pool-tokens", str(POOL)]


@pytest.fixture(scope="module")
def servers(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Kind, PairServer]]:
    parser = parser_of("tests", None)
    add_pair_options(parser, "tests")
    folder = str(tmp_path_factory.mktemp("servers"))
    args = parser.parse_args(["--model", str(tiny_llama), "--out", folder, "--", *SERVER])
    model = Model(str(tiny_llama), "tiny", (), 512)
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(pair_server(kind, model, args, FLAGS)) for kind in Kind}


@pytest.fixture(autouse=True)
def both_started(servers: dict[Kind, PairServer], monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def running(kind: Kind, model: Model, args: argparse.Namespace, flags: Any) -> Any:
        assert all(flag in FLAGS[kind] for flag in flags[kind] if flag.startswith("--"))
        yield servers[kind]

    for module in (efficiency, cache_hits):
        monkeypatch.setattr(module, "pair_server", running)


def test_efficiency(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = [*EFFICIENCY, "--model", str(tiny_llama), "--out", str(tmp_path)]
    content = efficiency.measure(*efficiency.parse(arguments))
    efficiency.report(content, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(content))
    rows = {(row["way"], row["batch"], row["length"]): row for row in content["rows"]}
    assert len(rows) == len(efficiency.Way) * 2 * 2
    for way in efficiency.Way:
        for batch in (1, 2):
            row = rows[way.value, batch, 96]
            # What is checked of every single request, once more over the batch: the prefix of a
            # cold batch is computed once or for each.
            least = batch * (96 + 4) + 8 if way.is_cold else batch * 4
            assert least <= row["computed_tokens"] <= least + (batch - 1) * way.is_cold * 8
            assert 0 < row["first_token"] <= row["last_token"]
            assert len(row["first_token_all"]) == row["samples"] == 2
            assert "skipped" in rows[way.value, batch, 2000]
    assert (tmp_path / "efficiency_batch1.png").exists()
    assert (tmp_path / "efficiency_batch2.png").exists()


def test_cache_hits(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = [*CACHE_HITS, "--model", str(tiny_llama), "--out", str(tmp_path)]
    content = cache_hits.measure(*cache_hits.parse(arguments))
    cache_hits.report(content, tmp_path)
    rows = {(row["part"], row["kind"], row.get("order")): row for row in content["rows"]}
    assert rows["example", "stock", None]["hit_share"] == pytest.approx(5 / 12)
    assert rows["example", "ape", None]["hit_share"] == 1
    for order in Order:
        stock, ape = (rows["trace", kind.value, order.value] for kind in Kind)
        assert stock["requests"] == ape["requests"] == 34
        assert stock["prompt_tokens"] == ape["prompt_tokens"]
        assert stock["hit_share"] < ape["hit_share"] < 1
        assert ape["hit_share"] == pytest.approx(ape["ideal_hit_share"], abs=0.1)
        assert ape["evicted_tokens"] > 0 < stock["evicted_tokens"]
    assert (tmp_path / "cache_hits.png").exists()
