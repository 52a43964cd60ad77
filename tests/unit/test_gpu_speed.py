"""The speed benchmark's own arithmetic: operation counts, decode steps, ratios, tables."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.shape import LLAMA_8B, TINY, write_config
from benchmarks.gpu_speed.__main__ import parse
from benchmarks.gpu_speed.client import Client
from benchmarks.gpu_speed.operations import (
    attention_operations,
    causal_pairs,
    decode_bytes,
    gemm_operations,
    parallel_operations,
    sequential_operations,
)
from benchmarks.gpu_speed.record import Record, read_records
from benchmarks.gpu_speed.report import (
    COST,
    EXTRA,
    GAIN,
    Figure,
    Value,
    compare,
    figures,
    floor_rows,
    ladder_rows,
    report,
    show_value,
    value_of,
)
from benchmarks.gpu_speed.run import engine_arguments
from benchmarks.gpu_speed.scale import FULL, TINY_SCALE
from benchmarks.gpu_speed.sections import Sections
from benchmarks.gpu_speed.texts import Documents, Prompt, Texts
from benchmarks.gpu_speed.timing import (
    Stream,
    all_intervals,
    common_decode_intervals,
    span,
    summarise,
)


def test_the_shape_has_the_weights_and_kv_of_llama_8b() -> None:
    matrices = LLAMA_8B.layers * LLAMA_8B.layer_weights + 2 * LLAMA_8B.vocab * LLAMA_8B.hidden
    norms = (2 * LLAMA_8B.layers + 1) * LLAMA_8B.hidden
    assert matrices + norms == 8_030_261_248  # parameters of meta-llama/Llama-3.1-8B
    assert LLAMA_8B.kv_bytes == 128 * 1024


def test_causal_pairs_equal_counting_a_mask() -> None:
    for new, past in ((1, 0), (5, 0), (3, 7), (0, 4)):
        counted = sum(past + row + 1 for row in range(new))
        assert causal_pairs(new, past) == counted


def test_a_prefill_in_two_parts_has_the_attention_of_one() -> None:
    assert causal_pairs(10) + causal_pairs(6, past=10) == causal_pairs(16)


def test_operations_of_one_token_are_two_a_weight_and_four_a_head_dimension() -> None:
    weights = TINY.layers * TINY.layer_weights + TINY.vocab * TINY.hidden
    assert gemm_operations(TINY, 1) == 2 * weights
    assert attention_operations(TINY, 1) == TINY.layers * TINY.heads * 4 * TINY.head_dim
    alone = gemm_operations(TINY, 1) + attention_operations(TINY, 9)
    assert sequential_operations(TINY, 1, cached=8) == alone


def test_one_context_costs_what_a_sequence_costs() -> None:
    sequence = sequential_operations(TINY, 8 + 100 + 16)
    assert parallel_operations(TINY, 8, 1, 100, 16) == sequence


def test_parallel_contexts_save_the_pairs_between_them() -> None:
    sequence = sequential_operations(TINY, 8 + 3 * 10 + 5)
    between = attention_operations(TINY, 3 * 10 * 10)
    assert sequence - parallel_operations(TINY, 8, 3, 10, 5) == between


def test_a_decode_step_reads_shared_kv_once() -> None:
    alone = decode_bytes(TINY, 1, shared=1000, own=10)
    assert decode_bytes(TINY, 5, shared=1000, own=10) - alone == 4 * 10 * TINY.kv_bytes


def test_config_names_the_shape(tmp_path: Path) -> None:
    write_config(LLAMA_8B, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert config["max_position_embeddings"] >= FULL.window


@pytest.mark.parametrize("scale", [FULL, TINY_SCALE], ids=lambda scale: scale.name)
def test_every_prompt_of_a_scale_fits_its_window(scale: Any) -> None:
    tokens = 2 * scale.decode_tokens  # a batch that hardly overlaps is sent again
    assert scale.prefix + scale.longest + scale.query + tokens < scale.window
    assert scale.prefix + scale.e2e_length + scale.e2e_query + scale.e2e_tokens < scale.window
    lengths = [*scale.ttft, *scale.cold, scale.e2e_length, *(length for length, _ in scale.decode)]
    assert all(length % scale.context == 0 for length in lengths)
    assert max(scale.e2e_batches) <= scale.e2e_length // scale.context


def test_few_samples_show_their_extremes_and_many_their_deciles() -> None:
    assert summarise([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    many = summarise([float(i) for i in range(101)])
    assert many == (50.0, pytest.approx(10.0), pytest.approx(90.0), 101)


def _stream(sent: float, *arrivals: tuple[float, int]) -> Stream:
    return Stream(sent, list(arrivals), 0)


def test_a_chunk_of_several_tokens_counts_as_several_steps() -> None:
    stream = _stream(0, (1.0, 1), (2.0, 2), (5.0, 5))
    assert all_intervals([stream]) == [1.0] * 4


def test_only_the_time_when_all_requests_decode_counts() -> None:
    early = _stream(0, (1.0, 1), (9.0, 2), (10.0, 3), (11.0, 4))
    late = _stream(0, (9.0, 1), (10.5, 2), (12.0, 3))
    assert common_decode_intervals([early, late]) == [1.0, 1.0, 1.5]
    assert span([early, late]) == 12.0


def test_requests_that_never_overlap_have_no_common_steps() -> None:
    first, second = _stream(0, (1.0, 1), (2.0, 2)), _stream(0, (3.0, 1), (4.0, 2))
    assert common_decode_intervals([first, second]) == []


def test_orders_of_a_batch_begin_with_different_contexts() -> None:
    texts = Texts(vocab=1000, seed=1)
    documents = texts.documents(4, 6, 3)
    orders = texts.different_orders(documents, 6)
    assert len({tuple(order.contexts[0]) for order in orders}) == 6
    for order in [*orders, texts.shuffled(documents)]:
        assert order.prefix == documents.prefix
        assert sorted(order.contexts) == sorted(documents.contexts)


def test_contexts_go_out_as_contexts_or_as_one_sequence() -> None:
    prompt = Prompt(Documents([1], [[2, 3], [4]]), [5])
    assert Client(None, parallel=False)._call(prompt, 1)["input_ids"] == [1, 2, 3, 4, 5]
    call = Client(None, parallel=True)._call(prompt, 1)
    assert (call["prefix_ids"], call["input_ids"]) == ([1], [5])
    assert call["contexts"] == [{"input_ids": [2, 3]}, {"input_ids": [4]}]
    assert "contexts" not in Client(None, parallel=True)._call(Prompt(Documents([], []), [5]), 1)


def test_a_rung_goes_out_beside_temperature_and_scale() -> None:
    prompt = Prompt(Documents([1], [[2, 3], [4]]), [5])
    client = Client(None, parallel=True)
    assert client._call(prompt, 1)["ape"] == {"temperature": 0.9, "scale": 0.9}
    assert client._call(prompt, 1, {"soft": 0.1})["ape"]["soft"] == 0.1
    assert "ape" not in client._call(Prompt(Documents([], []), [5]), 1, {"soft": 0.1})


class ScoringEngine:
    """Serves APE calls out of a cache that holds everything but queries and plain prompts."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.known: set[tuple[int, ...]] = set()
        self.loop = asyncio.new_event_loop()

    def generate(self, **call: Any) -> dict[str, Any]:
        self.calls.append(call)
        lengths = [len(context["input_ids"]) for context in call.get("contexts", [])]
        ape, query = call.get("ape", {}), tuple(call["input_ids"])
        rung = ape.get("soft") or ape.get("refine")
        scored = len(lengths) * (len(query) + 1) if rung and query not in self.known else 0
        self.known |= {query} if rung else set()
        cached = len(call.get("prefix_ids", [])) + sum(lengths) if len(self.calls) > 1 else 0
        refined = sum(lengths[: ape.get("refine", 0)])
        usage = {"scored_tokens": scored, "refined_tokens": refined}
        tokens = call["sampling_params"]["max_new_tokens"]
        meta = {"cached_tokens": cached, "completion_tokens": tokens, "ape": usage}
        scores = [{"id": str(i), "score": float(-i)} for i in range(len(lengths))] if rung else []
        return {"meta_info": meta | {"contexts": scores}}

    async def async_generate(self, stream: bool, **call: Any) -> Any:
        last = self.generate(**call)["meta_info"]

        async def chunks() -> Any:
            for tokens in range(1, last["completion_tokens"] + 1):
                await asyncio.sleep(0)
                yield {"meta_info": last | {"completion_tokens": tokens}}

        return chunks()


def test_the_ladder_asks_nothing_twice_and_decodes_with_known_scores(tmp_path: Path) -> None:
    engine, record = ScoringEngine(), Record(tmp_path / "run.json", {"engine": "ape"})
    client = Client(engine, parallel=True)
    Sections(client, record, TINY_SCALE, seed=0, skip_largest_batch=False).ladder()
    engine.loop.close()
    ladder = TINY_SCALE.ladder
    assert record.content["warnings"] == []
    samples = record.content["samples"]
    for name in ("ttft/warm", "ttft/soft", "ttft/refine", "prefill"):
        assert len(samples[f"ladder/{name}"]) == ladder.repeats
    for batch in ladder.batches:
        for name in ("warm", "soft"):
            assert samples[f"ladder/decode/{batch}/{name}"]
    singles = [call for call in engine.calls if call["sampling_params"]["max_new_tokens"] == 1]
    queries = [tuple(call["input_ids"]) for call in singles]
    assert len(set(queries)) == len(queries)
    plain = [call for call in singles[1:] if "contexts" not in call]
    more = TINY_SCALE.prefix + ladder.refine * TINY_SCALE.context + ladder.query
    assert {len(call["input_ids"]) for call in plain} == {more}


def test_the_ladder_says_when_its_requests_were_not_what_they_should_be(tmp_path: Path) -> None:
    class Unscored(ScoringEngine):
        def generate(self, **call: Any) -> dict[str, Any]:
            answer = super().generate(**call)
            answer["meta_info"]["ape"] = {"scored_tokens": 0, "refined_tokens": 0}
            for context in answer["meta_info"]["contexts"]:
                context["score"] = -1.0
            return answer

    engine, record = Unscored(), Record(tmp_path / "run.json", {"engine": "ape"})
    client = Client(engine, parallel=True)
    Sections(client, record, TINY_SCALE, seed=0, skip_largest_batch=False).ladder()
    engine.loop.close()
    warnings = "\n".join(record.content["warnings"])
    assert "ladder/ttft/soft: 0 tokens scored, not 36" in warnings
    assert "ladder/ttft/refine: 0 tokens of contexts computed" in warnings
    assert "ladder/ttft/soft: all contexts have one score" in warnings


def test_the_ladder_knows_what_scoring_by_attention_computes(tmp_path: Path) -> None:
    class Measuring(ScoringEngine):
        def generate(self, **call: Any) -> dict[str, Any]:
            answer = super().generate(**call)
            spent = answer["meta_info"]["ape"]
            query, null = len(call["input_ids"]), len("N/A") + 4  # half of a query of 8
            spent["scored_tokens"] = min(spent["scored_tokens"], query + null)
            return answer

    record = Record(tmp_path / "run.json", {"engine": "ape"})
    for by_attention in (True, False):
        engine = Measuring()
        client = Client(engine, parallel=True)
        Sections(client, record, TINY_SCALE, 0, False, by_attention).ladder()
        engine.loop.close()
        assert bool(record.content["warnings"]) == (not by_attention)


def test_made_up_matrices_keep_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_speed.weights import DummyModelLoader, MadeUpWeights  # imports SGLang

    def load(_loader: Any, **_given: Any) -> torch.nn.Module:
        model = torch.nn.ModuleDict({"proj": torch.nn.Linear(4096, 512, bias=False)})
        model["norm"] = torch.nn.LayerNorm(4096, bias=False)
        for weight in model.parameters():
            torch.nn.init.uniform_(weight, -1e-3, 1e-3, torch.Generator().manual_seed(3))
        return model

    monkeypatch.setattr(DummyModelLoader, "load_model", load)
    model: Any = MadeUpWeights.load_model(object.__new__(MadeUpWeights), model_config=None)
    drawn = torch.randn(64, 4096, generator=torch.Generator().manual_seed(4))
    assert model["proj"](drawn).std().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(model["norm"].weight, torch.ones(4096))


def test_the_ladder_is_not_for_stock_engines(tmp_path: Path) -> None:
    record = Record(tmp_path / "run.json", {"engine": "fa3"})
    client = Client(None, parallel=False)
    Sections(client, record, TINY_SCALE, seed=0, skip_largest_batch=False).ladder()
    assert record.content["samples"] == {}


def test_soft_by_attention_is_held_to_its_own_aim(tmp_path: Path) -> None:
    samples = {"ladder/ttft/warm": [0.040], "ladder/ttft/soft": [0.050]}
    for scorer, expected in (("attention", "≤ 1.15: **missed**"), ("likelihood", "≤ 0.3: met")):
        record = {"samples": samples, "engine_arguments": {"ape_scorer": scorer}}
        assert expected in ladder_rows({"ape": record}, TINY_SCALE)[0][-1]


def test_rungs_are_reported_beside_requests_without_them(tmp_path: Path) -> None:
    samples = {
        "ladder/ttft/warm": [0.08],
        "ladder/ttft/soft": [0.38],
        "ladder/ttft/refine": [0.4],
        "ladder/prefill": [0.06],
        "ladder/decode/1/warm": [0.01],
        "ladder/decode/1/soft": [0.0104],
    }
    records = read_records([_record(tmp_path, "ape", samples)])
    soft, refine, bound, decode = ladder_rows(records, FULL)
    assert soft[1:] == ["380 ms", "80 ms", "+0.300 s (≤ 0.3: met)"]
    assert refine[3] == "+0.320 s"
    assert bound[2:] == ["360 ms (sum)", "1.111 (≤ 1: **missed**)"]
    assert decode[3] == "1.040 (≤ 1.03: **missed**)"
    assert "### The quality ladder: 128 cached contexts of 1024" in report(records)
    assert ladder_rows(read_records([_record(tmp_path, "fa3", {"x": [1.0]})]), FULL) == []


def test_engines_differ_in_nothing_but_attention_and_ape() -> None:
    ape, flashinfer, fa3 = (
        engine_arguments(name, FULL, "model", 0, {}) for name in ("ape", "flashinfer", "fa3")
    )
    assert fa3 == flashinfer | {"attention_backend": "fa3"}
    assert {name: value for name, value in ape.items() if "ape" not in name} == flashinfer
    assert engine_arguments("ape", FULL, "model", 0, {"dtype": "half"})["dtype"] == "half"


def _value(number: float) -> Value:
    return Value(number, summarise([number]))


@pytest.mark.parametrize(
    ("comparison", "ape", "stock", "target", "shown"),
    [
        (COST, 1.15, 1.0, 1.15, "1.150 (≤ 1.15: met)"),
        (COST, 1.2, 1.0, 1.15, "1.200 (≤ 1.15: **missed**)"),
        (GAIN, 1.0, 150.0, 150.0, "150.00 times as fast (≥ 150: met)"),
        (GAIN, 1.0, 149.0, 150.0, "149.00 times as fast (≥ 150: **missed**)"),
        (EXTRA, 70.0, 62.0, 10.0, "+8.0 s (≤ 10: met)"),
        (EXTRA, 75.0, 62.0, 10.0, "+13.0 s (≤ 10: **missed**)"),
    ],
)
def test_targets_are_met_up_to_and_with_their_limit(
    comparison: Any, ape: float, stock: float, target: float, shown: str
) -> None:
    figure = Figure("", "a", "b", "s", comparison, {"flashinfer": target})
    assert compare(figure, _value(ape), _value(stock), "flashinfer") == shown
    assert "(" not in compare(figure, _value(ape), _value(stock), "fa3")
    assert compare(figure, None, _value(stock), "flashinfer") == "-"


def test_a_batch_left_out_is_estimated_and_says_so() -> None:
    samples = {"e2e/1": [18.0], "e2e/1/ttft": [15.0]}
    value = value_of({"engine": "fa3", "samples": samples}, "e2e/4")
    assert value == Value(4 * 15.0 + 3.0, None)
    assert show_value(value, "s") == "63 s (estimate)"
    assert value_of({"engine": "ape", "samples": samples}, "e2e/4") is None
    measured = {"engine": "fa3", "samples": samples | {"e2e/4": [70.0]}}
    assert show_value(value_of(measured, "e2e/4"), "s") == "70 s"


def test_memory_is_the_largest_reading() -> None:
    value = value_of({"samples": {"memory": [1e9, 3e9, 2e9]}}, "memory")
    assert value is not None and value.number == 3e9


def test_values_are_shown_with_their_spread() -> None:
    assert show_value(value_of({"samples": {"x": [0.01, 0.03, 0.02]}}, "x"), "ms") == (
        "20 ms (10–30)"  # noqa: RUF001
    )
    assert show_value(None, "ms") == "-"


def _record(tmp_path: Path, engine: str, samples: dict[str, list[float]]) -> Path:
    facts = {
        "engine": engine,
        "scale": "full",
        "command": ["run"],
        "machine": {"gpu": "H100", "packages": {"sglang": "0.5.17"}, "commit": None},
    }
    path = tmp_path / f"{engine}-{len(list(tmp_path.iterdir()))}.json"
    record = Record(path, facts)
    for figure, values in samples.items():
        record.add(figure, values)
    return path


def test_a_report_names_every_figure_and_leaves_dashes_where_nothing_was_measured(
    tmp_path: Path,
) -> None:
    ape = _record(tmp_path, "ape", {"ttft/131072": [0.08]})
    fa3 = _record(tmp_path, "fa3", {"cold/131072": [10.4]})
    text = report(read_records([ape, fa3]))
    for title, rows in figures(FULL).items():
        assert title in text
        assert all(row.title in text for row in rows)
    assert "130.00 times as fast (≥ 130: met)" in text
    assert "### Floors" not in text
    assert text.count("stopped before its end") == 2


def test_files_of_one_engine_are_joined(tmp_path: Path) -> None:
    paths = [_record(tmp_path, "ape", {"ttft/2048": [value]}) for value in (1.0, 3.0)]
    assert read_records(paths)["ape"]["samples"] == {"ttft/2048": [1.0, 3.0]}


def test_floors_are_the_work_over_the_measured_rate(tmp_path: Path) -> None:
    work = sequential_operations(LLAMA_8B, 256, cached=64 + 131072)
    samples = {"floor/matmul": [7e14], "ttft/131072": [2 * work / 7e14]}
    records = read_records([_record(tmp_path, "ape", samples)])
    (row,) = floor_rows(records, FULL)
    assert row[1] == "ape" and row[-1] == "50%"


def test_a_record_keeps_what_was_added_before_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record = Record(path, {"engine": "ape"})
    record.add("x", [0.123456789])
    record.fail("cold", "trace\nValueError: no")
    read = json.loads(path.read_text())
    assert read["samples"] == {"x": [0.123457]}
    assert read["errors"]["cold"].endswith("ValueError: no")


def test_settings_are_read_as_json_or_text() -> None:
    run = ["run", "--engine", "ape", "--json", "x", "--only", "ttft,cold"]
    given = parse([*run, "--set", "a=1", "--set", "b=disabled", "--set", "c=true"])
    assert dict(given.set) == {"a": 1, "b": "disabled", "c": True}
    assert given.only == ("ttft", "cold")
    for wrong in (["--set", "a"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            parse([*run, *wrong])
