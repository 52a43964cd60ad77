"""The efficiency benchmark's own parts: what is asked, what is checked, how results are joined."""

import argparse
import contextlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common import script
from benchmarks.common.client import Client, Refused, Timed
from benchmarks.common.controls import ControlError
from benchmarks.common.fresh import FIRST_ID, FreshIds
from benchmarks.common.pairs import Kind, Model, OtherSettingsError, PairResults, PairServer
from benchmarks.common.server import ServerError
from benchmarks.efficiency import (
    KEY,
    LENGTHS,
    Cell,
    Requests,
    Sample,
    Sizes,
    Way,
    bodies_of,
    check,
    measure,
    parse,
    ratio_rows,
    report,
    row_of,
    samples_of,
    why_skipped,
)

SIZES = Sizes(prefix=4, context=8, query=3, generated=5)
VOCAB = 4000


def _requests(shared: bool = False, seed: int = 0) -> Requests:
    return Requests(FreshIds(VOCAB, seed), SIZES, shared)


##### What is asked


@settings(deadline=None, max_examples=40)
@given(vocab=st.integers(10, 200), length=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_sequences_begin_differently_until_the_vocabulary_is_used_up(
    vocab: int, length: int, seed: int
) -> None:
    ids = FreshIds(vocab, seed)
    drawn = [ids.sequence(length) for _ in range(vocab - FIRST_ID)]
    assert len({one[0] for one in drawn}) == vocab - FIRST_ID
    assert all(len(one) == length and all(FIRST_ID <= i < vocab for i in one) for one in drawn)


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 60), batch=st.integers(1, 4), shared=st.booleans())
def test_contexts_add_up_to_the_length_after_one_prefix(
    length: int, batch: int, shared: bool
) -> None:
    prompts = _requests(shared).fresh(length, batch)
    assert len(prompts) == batch
    for prompt in prompts:
        assert sum(map(len, prompt.contexts)) == length
        assert all(len(context) == SIZES.context for context in prompt.contexts[:-1])
        assert (len(prompt.prefix), len(prompt.query)) == (SIZES.prefix, SIZES.query)
        assert prompt.prefix == prompts[0].prefix
    contexts = {prompt.contexts[0][0] for prompt in prompts}
    assert len(contexts) == (1 if shared else batch)
    assert len({prompt.query[0] for prompt in prompts}) == batch


def test_both_servers_get_the_same_tokens() -> None:
    prompts = _requests().fresh(20, 2)
    sequential, ape = (bodies_of(kind, prompts, 5) for kind in (Kind.STOCK, Kind.APE))
    for one, other in zip(sequential, ape, strict=True):
        parts = [other["prefix_ids"], *(c["input_ids"] for c in other["contexts"])]
        assert one["input_ids"] == [*chain.from_iterable(parts), *other["input_ids"]]
        assert one["sampling_params"] == other["sampling_params"]
        assert one["sampling_params"]["max_new_tokens"] == 5
        assert "contexts" not in one


def test_asked_again_only_the_query_is_new() -> None:
    requests = _requests()
    before = requests.fresh(24, 2)
    after = requests.same_contexts(before)
    assert [prompt.contexts for prompt in after] == [prompt.contexts for prompt in before]
    assert {p.query[0] for p in after}.isdisjoint({p.query[0] for p in before})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000))
def test_shuffled_is_a_permutation_with_a_new_query(seed: int) -> None:
    requests = _requests(seed=seed)
    before = requests.fresh(80, 2)
    after = requests.shuffled(before)
    for one, other in zip(before, after, strict=True):
        assert sorted(one.contexts) == sorted(other.contexts)
        assert one.prefix == other.prefix
        assert one.query[0] != other.query[0]
    assert [p.contexts for p in before] != [p.contexts for p in after]  # 10 contexts, twice


##### What is checked


def _metas(way: Way, prompts: list[Any], cached: list[int]) -> list[dict[str, Any]]:
    return [
        {"prompt_tokens": p.tokens, "completion_tokens": SIZES.generated, "cached_tokens": tokens}
        for p, tokens in zip(prompts, cached, strict=True)
    ]


@pytest.mark.parametrize(
    ("way", "shared", "cached", "page_size"),
    [
        (Way.SEQUENTIAL_COLD, False, [0, 0], 1),
        (Way.SEQUENTIAL_COLD, False, [0, 4], 1),  # the prefix that the first request left
        (Way.APE_COLD, True, [0, 28], 1),
        (Way.SEQUENTIAL_HIT, False, [28, 28], 1),
        (Way.SEQUENTIAL_HIT, False, [16, 16], 16),
        (Way.APE_SHUFFLED, True, [28, 28], 1),
    ],
)
def test_counts_as_they_should_be_pass(
    way: Way, shared: bool, cached: list[int], page_size: int
) -> None:
    prompts = _requests(shared).fresh(24, 2)
    check(way, prompts, _metas(way, prompts, cached), SIZES.generated, shared, page_size)


@pytest.mark.parametrize(
    ("way", "shared", "cached", "said"),
    [
        (Way.SEQUENTIAL_COLD, False, [0, 5], r"\[0, 1\] context tokens"),
        (Way.APE_COLD, False, [28, 28], r"\[24, 24\] context tokens"),
        (Way.APE_COLD, True, [28, 28], r"\[24, 24\] context tokens"),
        (Way.SEQUENTIAL_HIT, False, [28, 27], r"\[28, 27\] .* not \[28, 28\]"),
        (Way.SEQUENTIAL_HIT, False, [28, 29], r"\[28, 29\] .* not \[28, 28\]"),
        (Way.APE_WARM, False, [0, 0], r"\[0, 0\] .* not \[28, 28\]"),
        (Way.APE_SHUFFLED, False, [28, 12], r"\[28, 12\] .* not \[28, 28\]"),
    ],
)
def test_wrong_counts_of_cached_tokens_are_noticed(
    way: Way, shared: bool, cached: list[int], said: str
) -> None:
    prompts = _requests(shared).fresh(24, 2)
    with pytest.raises(ControlError, match=said):
        check(way, prompts, _metas(way, prompts, cached), SIZES.generated, shared)


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
def test_other_lengths_are_noticed(field: str) -> None:
    prompts = _requests().fresh(24, 1)
    metas = _metas(Way.APE_WARM, prompts, [28])
    metas[0][field] -= 1
    with pytest.raises(ControlError, match=str(metas[0][field])):
        check(Way.APE_WARM, prompts, metas, SIZES.generated, False)


##### Measuring


def test_a_sample_is_of_the_slowest_request() -> None:
    timed = [
        Timed(0.5, 2.0, {"prompt_tokens": 10, "cached_tokens": 4}),
        Timed(0.7, 1.5, {"prompt_tokens": 20, "cached_tokens": 0}),
    ]
    assert Sample.of(timed) == Sample(0.7, 2.0, 30, 26)


def test_rows_hold_medians_extremes_and_samples() -> None:
    samples = [Sample(t, 2 * t, 30, 26) for t in (3.0, 1.0, 1.5)]
    row = row_of(Way.APE_COLD, Cell(2, 64), samples)
    assert (row["way"], row["batch"], row["length"]) == ("APE, cold", 2, 64)
    assert (row["first_token"], row["last_token"]) == (1.5, 3.0)
    assert (row["first_token_low"], row["first_token_high"]) == (1.0, 3.0)
    assert row["last_token_all"] == [6.0, 2.0, 3.0]
    assert (row["samples"], row["prompt_tokens"], row["computed_tokens"]) == (3, 30, 26)


@pytest.mark.parametrize(("seconds", "expected"), [(100.0, 3), (5.0, 1), (1e-6, 1)])
def test_sampling_stops_before_the_time_is_over(seconds: float, expected: int) -> None:
    taken = samples_of(lambda: Sample(1.0, 10.0, 1, 1), 3, seconds)
    assert len(taken) == expected


def _server(pool: int, limit: int) -> PairServer:
    info = {"max_total_num_tokens": pool, "max_req_input_len": limit, "page_size": 1}
    return PairServer(None, [], 1.0, info | {"attention_backend": "x", "dtype": "y"})


@pytest.mark.parametrize(
    ("kind", "pool", "limit", "reason"),
    [
        (Kind.STOCK, 10**6, 10**6, None),
        (Kind.STOCK, 10**6, 2000, "2,112 positions"),
        (Kind.APE, 10**6, 200, None),
        (Kind.APE, 10**6, 100, "128 positions"),
        (Kind.STOCK, 4351, 10**6, "do not fit the KV pool of 4,351"),
        (Kind.STOCK, 4352, 10**6, None),
    ],
)
def test_what_does_not_fit_is_skipped_with_the_reason(
    kind: Kind, pool: int, limit: int, reason: str | None
) -> None:
    arguments = ["--lengths", "2048", "--context-length", "64", "--prefix", "32"]
    arguments += ["--query", "16", "--generated", "16", "--repeats", "2"]
    args, _ = parse(arguments)
    found = why_skipped(Cell(2, 2048), _server(pool, limit), kind, args)
    assert (found is None) if reason is None else (found and reason in found)


def test_metrics_are_summed_over_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '# HELP a b\na{x="1 }"} 2.0\na{x="2"} 3.0\nb 1e3\n'
    monkeypatch.setattr(Client, "_get_text", lambda self, path: text)
    assert Client("http://nowhere").metrics() == {"a": 5.0, "b": 1000.0}


##### Results


def test_ratios_are_of_a_cold_prompt() -> None:
    rows = [
        {"way": way.value, "batch": 1, "length": 64, "first_token": seconds}
        for way, seconds in ((Way.SEQUENTIAL_COLD, 6.0), (Way.APE_COLD, 2.0))
    ]
    rows.append({"way": Way.APE_SHUFFLED.value, "batch": 1, "length": 64, "skipped": "no room"})
    rows.append({"way": Way.APE_SHUFFLED.value, "batch": 4, "length": 64, "first_token": 1.0})
    (row,) = ratio_rows(rows, 1, "first_token")
    assert row == {"length": 64, "sequential, cold": 6.0, "APE, cold": 2.0, "cold": 3.0}


def _results(folder: Path, adds: bool, length: int = 8) -> PairResults:
    return PairResults(folder, "efficiency", {"model": "m", "context": length}, KEY, adds)


def test_results_of_two_commands_are_joined(tmp_path: Path) -> None:
    first = _results(tmp_path, adds=False)
    first.begin(Kind.STOCK, _server(100, 100), {"repeats": 1})
    first.add({"way": "a", "batch": 1, "length": 2, "first_token": 1.0})
    first.add({"way": "a", "batch": 1, "length": 4, "first_token": 2.0})
    second = _results(tmp_path, adds=True)
    second.begin(Kind.APE, _server(200, 200), {"repeats": 1})
    second.add({"way": "a", "batch": 1, "length": 4, "first_token": 3.0})
    content = json.loads((tmp_path / "results.json").read_text())
    assert [(row["length"], row["first_token"], row["run"]) for row in content["rows"]] == [
        (2, 1.0, 0),
        (4, 3.0, 1),
    ]
    assert [(run["kind"], run["pool_tokens"]) for run in content["runs"]] == [
        ("stock", 100),
        ("ape", 200),
    ]
    assert all("gpu" in run["machine"] for run in content["runs"])


def test_rows_of_other_settings_are_not_joined(tmp_path: Path) -> None:
    _results(tmp_path, adds=False).begin(Kind.STOCK, _server(100, 100), {})
    with pytest.raises(OtherSettingsError, match="context 8 there, 16 here"):
        _results(tmp_path, adds=True, length=16)
    assert json.loads((tmp_path / "results.json").read_text())["runs"]


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(OtherSettingsError, match=r"results\.json is damaged"):
        _results(tmp_path, adds=True)


def test_without_only_a_folder_begins_anew(tmp_path: Path) -> None:
    _results(tmp_path, adds=False).begin(Kind.STOCK, _server(100, 100), {})
    _results(tmp_path, adds=False, length=16)
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == []


class FakeClient:
    """A server that counts as a radix cache does, as far as one prompt after another goes."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._seen: set[tuple[int, ...]] = set()

    def flush(self) -> None:
        self._seen.clear()

    def stream(self, bodies: list[dict[str, Any]]) -> list[Timed]:
        return [Timed(0.1, 0.2, self._meta(body)) for body in bodies]

    def _meta(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["input_ids"]
        if self._kind is Kind.STOCK:
            heads = [tuple(ids[: i + 1]) for i in range(len(ids))]
            cached = sum(head in self._seen for head in heads)
            self._seen.update(heads)
            tokens = len(ids)
        else:
            parts = [body["prefix_ids"], *(c["input_ids"] for c in body["contexts"])]
            cached = sum(len(part) for part in parts if tuple(part) in self._seen)
            self._seen.update(map(tuple, parts))
            tokens = sum(map(len, parts)) + len(ids)
        generated = body["sampling_params"]["max_new_tokens"]
        return {"prompt_tokens": tokens, "completion_tokens": generated, "cached_tokens": cached}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def server(kind: Kind, model: Model, args: argparse.Namespace, flags: Any) -> Any:
        yield _server(2000, 500)._replace(client=FakeClient(kind), flags=list(flags[kind]))

    monkeypatch.setattr("benchmarks.efficiency.pair_server", server)
    monkeypatch.setattr(
        "benchmarks.efficiency.pair_model", lambda *_: Model("path", "fake", (), VOCAB)
    )


def test_a_whole_run_and_its_report(
    fakes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lengths", "32,64,1024", "--batches", "1,2", "--context-length", "16"]
    options += ["--prefix", "8", "--generated", "4", "--repeats", "2", "--out", str(tmp_path)]
    args, parser = parse([*options, "--only", "stock"])
    measure(args, parser)
    args, parser = parse([*options, "--only", "ape"])
    content = measure(args, parser)
    measured = [row for row in content["rows"] if "skipped" not in row]
    assert {(row["way"], row["batch"], row["length"]) for row in measured} >= {
        (way.value, batch, length) for way in Way for batch in (1, 2) for length in (32, 64)
    }
    computed = {(r["way"], r["batch"], r["length"]): r["computed_tokens"] for r in measured}
    assert computed["sequential, cold", 1, 64] == 88
    assert computed["sequential, exact hit", 2, 64] == 2 * 16
    assert computed["APE, shuffled", 2, 64] == 2 * 16
    skipped = [row for row in content["rows"] if "skipped" in row]
    assert {row["length"] for row in skipped} == {1024}
    assert content["finished"]
    report(content, tmp_path)
    shown = capsys.readouterr().out
    assert "a request takes 1,052 positions" in shown
    assert (tmp_path / "efficiency_batch2.png").stat().st_size > 0


def test_usual_settings_are_those_of_the_figure() -> None:
    args, _ = parse([])
    assert args.lengths == LENGTHS == (2048, 4096, 8192, 16384, 32768, 65536, 131072)
    assert args.batches == (1, 4)
    assert args.query + args.generated == 256


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--lengths", "a"], ["--repeats", "0"]])
def test_wrong_options_end_with_a_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ServerError("no server"), 1, "error: no server"),
        (ControlError("wrong"), 1, "error: wrong"),
        (Refused("too long"), 1, "refused a request: too long"),
        (OtherSettingsError("differ"), 1, "error: differ"),
        (PermissionError(13, "Permission denied", "out"), 1, "Permission denied: 'out'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (None, 0, ""),
    ],
)
def test_how_a_script_ends(
    error: BaseException | None, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if error:
            raise error

    assert script.exit_status(main) == status
    assert said in capsys.readouterr().err
