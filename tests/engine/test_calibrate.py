"""``python -m sglang_ape.calibrate`` on real engines, and a server with ``--ape-profile``."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sglang_ape.calibrate import backend as backends
from sglang_ape.calibrate import profile
from sglang_ape.calibrate.data import Example
from sglang_ape.calibrate.ladder import Rung
from sglang_ape.calibrate.measure import Measure, Options, RowError, Setting
from sglang_ape.calibrate.profile import Profile
from sglang_ape.calibrate.search import Point
from sglang_ape.calibrate.tokens import Encoder, Row
from tests.support.oracle import Oracle
from tests.support.server import Server

TEMPERATURE, SCALE, PREFIX = 0.4, 0.7, "Notes:\n"
NEW_TOKENS = 4
TOP = 10
TOLERANCE = 1e-4  # of a divergence, in nats
SENTENCES = (
    "The harbour master keeps a ledger of every ship that enters the bay.\n",
    "A lighthouse stands on the northern cliff.\n",
    "The baker sells the loaves warm before the school bell rings.\n",
    "Seven trains leave the station between noon and midnight.\n",
    "The gardener planted beans in rows.\n",
)
WARM = ("The ferryman keeps a list of every lamp that is lit.\n", "A mill stands by the brook.\n")
QUERY = "Question: who keeps the ledger? Answer:"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("profile_server")
    chosen = Profile(model="another", temperature=TEMPERATURE, scale=SCALE, prefix=PREFIX)
    profile.write(chosen, folder / "profile.json")
    flags = (
        *("--enable-ape", "--ape-profile", str(folder / "profile.json")),
        # Queries are cut in the middle, where their log-probabilities are wanted.
        *("--max-total-tokens", "8192", "--chunked-prefill-size", "16"),
        *("--served-model-name", "tiny"),
    )
    with Server(tiny_llama, flags, folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Oracle:
    return Oracle(tiny_llama)


@pytest.fixture
def backend(server: Server) -> Iterator[backends.Server]:
    backend = backends.Server(server.url, None, 120.0, None)
    yield backend
    backend.close()
    server.assert_clean()


# ---------------------------------------------------------------- --ape-profile


def _answer(server: Server, **fields: Any) -> list[int]:
    body = {"text": QUERY, "contexts": list(SENTENCES[:3]), "sampling_params": GREEDY}
    return server.generate({**body, **fields})["output_ids"]


def test_requests_have_t_s_and_prefix_of_the_profile(
    server: Server, oracle: Oracle, tiny_llama: Path
) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_llama))
    row = encoder.row(1, Example(contexts=list(SENTENCES[:3]), query=QUERY, prefix=PREFIX))
    expected = oracle.generate(row.prefix, row.contexts, row.query, 6, TEMPERATURE, SCALE)
    assert _answer(server) == expected.token_ids
    ape = {"temperature": TEMPERATURE, "scale": SCALE}
    assert _answer(server, ape=ape, prefix=PREFIX) == expected.token_ids


def test_what_a_request_gives_goes_before_the_profile(server: Server) -> None:
    changes: list[dict[str, Any]] = [
        {"ape": {"temperature": 1.0}},
        {"ape": {"scale": 1.0}},
        {"prefix": "Other notes:\n"},
    ]
    answers = [_answer(server, **change) for change in changes]
    assert _answer(server) not in answers
    whole = {"ape": {"temperature": 1.0, "scale": SCALE}, "prefix": PREFIX}
    assert _answer(server, **whole) == answers[0]


def test_contexts_in_the_store_follow_the_prefix_of_the_profile(server: Server) -> None:
    registered = server.post("/ape/contexts", {"contexts": list(SENTENCES[:3])}).json()
    contexts = [{"id": one["id"]} for one in registered["contexts"]]
    assert _answer(server, contexts=contexts, prefix=PREFIX) == _answer(server)
    body = {"text": QUERY, "contexts": contexts, "prefix": "Other notes:\n"}
    assert server.post("/generate", body).status_code == 400


def test_the_server_shows_the_numbers_and_warns_of_another_model(server: Server) -> None:
    info = server.client.get("/server_info").json()
    shown = [info[f"ape_{name}"] for name in ("temperature", "scale", "prefix")]
    assert shown == [TEMPERATURE, SCALE, PREFIX]
    log = server.log.read_text(errors="replace")
    assert log.count("was made for the model another") == 1


# ---------------------------------------------------------------- what is measured


def _rows(encoder: Encoder, count: int) -> list[Row]:
    rng = random.Random(5)
    return [
        encoder.row(line, Example(contexts=rng.sample(SENTENCES, 3), query=QUERY, answers=["x"]))
        for line in range(1, count + 1)
    ]


def _dense_divergence(oracle: Oracle, row: Row, prefix: list[int], point: Point) -> float:
    """By the formula, on whole distributions of the oracle with the rare tokens made one."""
    sequential = oracle.generate_plain(row.sequential, NEW_TOKENS)
    total = 0.0
    for i in range(NEW_TOKENS):
        query = [*row.query, *sequential.token_ids[:i]]
        ape = oracle.generate(prefix, row.contexts, query, 1, *point).logits[0]
        p, q = sequential.logits[i].double().softmax(-1), ape.double().softmax(-1)
        likely = p.topk(TOP).indices
        p, q = (torch.cat([d[likely], 1 - d[likely].sum(0, keepdim=True)]) for d in (p, q))
        total += (p * (p / q).log()).sum().item()
    return total / NEW_TOKENS


def test_divergences_are_those_of_the_oracle(backend: backends.Server, oracle: Oracle) -> None:
    encoder = Encoder(backend.facts.tokenizer)
    rows = _rows(encoder, 3)
    prefixes = {PREFIX: encoder.prefix(PREFIX)}
    settings = [
        Setting(Point(1.0, 1.0)),
        Setting(Point(0.3, 0.8)),
        Setting(Point(0.9, 0.9), PREFIX),
    ]
    # The answer may not end early: the oracle's does not.
    measure = Measure(backend, Options(NEW_TOKENS, (), TOP, 4), prefixes)
    measure.ask_sequentially(rows)
    for setting, measured in zip(settings, measure.divergences(rows, settings), strict=True):
        for row, found in zip(rows, measured, strict=True):
            prefix = list(prefixes.get(setting.prefix or "", row.prefix))
            expected = _dense_divergence(oracle, row, prefix, setting.point)
            assert expected > 100 * TOLERANCE
            assert found == pytest.approx(expected, abs=TOLERANCE)


def test_a_chat_has_the_tokens_of_the_chat_route(backend: backends.Server, server: Server) -> None:
    messages = [
        {"role": "system", "content": "Answer from the notes."},
        {"role": "user", "content": "Who keeps the ledger?"},
    ]
    example = Example.model_validate({"contexts": list(SENTENCES[:3]), "messages": messages})
    row = Encoder(backend.facts.tokenizer).row(1, example)
    measure = Measure(backend, Options(6, (), TOP, 4), {})
    mine = measure.texts([row], [Setting(Point(0.4, 0.7))])[0][0]
    chat = {"model": "tiny", "messages": messages, "contexts": list(SENTENCES[:3])}
    answer = server.post("/v1/chat/completions", {**chat, "max_tokens": 6, "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == mine
    assert answer["usage"]["prompt_tokens"] == len(row.sequential)


RUNGS = [Rung(*one) for one in itertools.product((0.0, 0.3), (0,), (False, True))]
RUNGS += [Rung(refine=2), Rung(refine=2, warm=True), Rung(refine=9)]


def test_a_rung_is_what_requests_with_its_fields_get(
    backend: backends.Server, server: Server
) -> None:
    encoder = Encoder(backend.facts.tokenizer)
    rows = _rows(encoder, 3)
    point = Point(0.4, 0.7)
    measure = Measure(backend, Options(6, (), TOP, 4), {}, encoder.warm(WARM))
    measured = measure.answers(rows, [Setting(point, rung=rung) for rung in RUNGS])
    for rung, answers in zip(RUNGS, measured, strict=True):
        for row, answer in zip(rows, answers, strict=True):
            warm = encoder.warm(WARM) if rung.warm else encoder.warm(())
            body = {
                "prefix_ids": (row.prefix + warm).tolist(),
                "contexts": [{"input_ids": ids.tolist()} for ids in row.contexts],
                "input_ids": row.query.tolist(),
                "ape": {**point._asdict(), "soft": rung.soft, "refine": rung.refine},
                "sampling_params": {"temperature": 0, "max_new_tokens": 6},
                "extra_key": f"{rung} {row.line}",  # nothing is known or cached
            }
            own = server.generate(body)
            assert answer.text == own["text"]
            assert answer.extra_tokens == _extra_tokens(row, rung, own["meta_info"])


def _extra_tokens(row: Row, rung: Rung, info: dict[str, Any]) -> int:
    """What the server computed to score, and the refined contexts behind the first."""
    if rung.soft == rung.refine == 0:
        assert "contexts" not in info
        return 0
    lengths = list(map(len, row.contexts))
    if rung.refine >= len(lengths):
        assert "contexts" not in info
        return sum(lengths[1:])
    assert info["ape"]["scored_tokens"] > 0
    scored = info["ape"]["scored_tokens"]
    if not rung.refine:
        return scored
    scores = [one["score"] for one in info["contexts"]]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: rung.refine]
    return scored + sum(lengths[i] for i in sorted(best)[1:])


def test_a_refused_row_is_named_by_its_line(backend: backends.Server) -> None:
    rows = _rows(Encoder(backend.facts.tokenizer), 3)
    rows[1] = rows[1]._replace(contexts=(rows[1].contexts[0], rows[1].contexts[1][:0]))
    measure = Measure(backend, Options(NEW_TOKENS, (), TOP, 4), {})
    with pytest.raises(RowError, match=r"^line 2: contexts"):
        measure.texts(rows, [Setting(Point(1.0, 1.0))])


# ---------------------------------------------------------------- the command


def _run(folder: Path, name: str, *options: str, status: int = 0) -> tuple[Path, str]:
    """Run the command on a file of rows; the profile and what was printed."""
    rows = folder / "rows.jsonl"
    rng = random.Random(9)
    lines = [
        {"contexts": rng.sample(SENTENCES, 3), "query": QUERY, "answers": [rng.choice("aeiou")]}
        for _ in range(6)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / name
    command = [sys.executable, "-m", "sglang_ape.calibrate", "--data", str(rows), "--out", str(out)]
    command += ["--temperatures", "0.3,0.6,1", "--scales", "0.7,1", "--max-new-tokens", "6"]
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return out, done.stdout + done.stderr


def _comparable(path: Path) -> dict[str, Any]:
    """A profile with its figures rounded: runs on a warm cache differ by rounding."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return pytest.approx(value, abs=TOLERANCE)
        if isinstance(value, dict):
            return {name: rounded(one) for name, one in value.items()}
        return [rounded(one) for one in value] if isinstance(value, list) else value

    return rounded(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "options",
    [("--search", "grid"), ("--objective", "accuracy", "--prefix", PREFIX)],
    ids=["match", "accuracy"],
)
def test_the_same_command_finds_the_same(
    server: Server, tmp_path: Path, options: tuple[str, ...]
) -> None:
    first, output = _run(tmp_path, "first.json", "--url", server.url, *options)
    second, _ = _run(tmp_path, "second.json", "--url", server.url, *options)
    assert json.loads(second.read_text()) == _comparable(first)
    found = profile.read(first)
    assert "chosen      T" in output and "held out" in output
    one, nine, chosen = found.report["validation"][1:]
    assert chosen["accuracy"]["mean"] >= one["accuracy"]["mean"]
    if "match" in found.report["objective"]:
        assert chosen["divergence"]["mean"] <= one["divergence"]["mean"]
    assert [len(found.report["cells"]), nine["setting"]] == [
        6 if found.report["search"] == "grid" else len(found.report["cells"]),
        "T = S = 0.9",
    ]
    server.assert_clean()


def test_the_ladder_is_tried_and_the_choice_is_in_the_profile(
    server: Server, tmp_path: Path
) -> None:
    warm = tmp_path / "warm.jsonl"
    warm.write_text("".join(json.dumps(item) + "\n" for item in WARM))
    options = ("--soft", "0.1,1", "--refine", "1", "--warm", str(warm), "--budget", "1000")
    path, output = _run(tmp_path, "ladder.json", "--url", server.url, *options)
    found = profile.read(path)
    ladder = found.report["ladder"]
    assert len(ladder["validation"]) == 8
    assert [step["extra_tokens"] > 0 for step in ladder["validation"]] == [
        False,
        True,
        True,
        True,
    ] * 2
    best = max(step["accuracy"]["mean"] for step in ladder["validation"])
    (chosen,) = [
        step
        for step in ladder["validation"]
        if (step["soft"], step["refine"], step["warm"])
        == (found.soft, found.refine, bool(found.warm))
    ]
    assert chosen["accuracy"]["mean"] == best
    assert "extra tokens/request" in output
    server.assert_clean()


def test_an_engine_of_its_own_finds_what_a_server_finds(
    server: Server, tmp_path: Path, tiny_llama: Path
) -> None:
    over_http, _ = _run(tmp_path, "server.json", "--url", server.url)
    flags = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192"]
    in_process, _ = _run(tmp_path, "engine.json", "--model", str(tiny_llama), "--", *flags)
    assert json.loads(in_process.read_text()) == _comparable(over_http)
