"""One engine, one process: start it, run the sections, shut it down."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.shape import write_config, write_tokenizer
from benchmarks.gpu_speed.client import SCALE, TEMPERATURE, Client
from benchmarks.gpu_speed.record import Record
from benchmarks.gpu_speed.scale import Scale
from benchmarks.gpu_speed.sections import Sections
from sglang_ape.arguments import ATTENTION

SECTIONS = ("floor", "plain", "cold", "ttft", "decode", "overlap", "ladder", "e2e", "memory")
_WITHOUT_ENGINE = ("floor", "memory")


def engine_arguments(
    engine: str, scale: Scale, model: str, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """What ``sgl.Engine`` is called with; ``settings`` come last and so may change anything."""
    arguments: dict[str, Any] = {
        "model_path": model,
        "skip_tokenizer_init": True,
        "dtype": scale.shape.dtype,
        "context_length": scale.window,
        "grammar_backend": "none",
        "random_seed": seed,
        "log_level": "warning",
        "attention_backend": "fa3" if engine == "fa3" else "flashinfer",
    }
    if engine in ("ape", "apart"):
        arguments |= {
            "enable_ape": True,
            "ape_disable_shared_reads": engine == "apart",
            "ape_max_context_tokens": scale.longest,
            "ape_temperature": TEMPERATURE,
            "ape_scale": SCALE,
        }
    if settings.get("ape_scorer") == ATTENTION:
        arguments["skip_tokenizer_init"] = False  # a null query is made of text
    return arguments | scale.engine | settings


def run(
    engine_name: str,
    scale: Scale,
    path: Path,
    sections: Sequence[str],
    settings: dict[str, Any],
    seed: int,
    skip_largest_batch: bool,
) -> int:
    """Measure one engine; returns the exit status, 1 if a section failed."""
    record = Record(
        path,
        {
            "engine": engine_name,
            "scale": scale.name,
            "command": sys.argv,
            "shape": scale.shape._asdict(),
            "machine": machine.describe(),
        },
    )
    record.say(f"{engine_name}, {scale.name}: {record.content['machine']}")
    if "floor" in sections:
        _guarded(record, "floor", lambda: _floor(record))
    on_engine = [name for name in sections if name not in _WITHOUT_ENGINE]
    if on_engine or "memory" in sections:
        with tempfile.TemporaryDirectory() as folder:
            write_config(scale.shape, Path(folder))
            arguments = engine_arguments(engine_name, scale, folder, seed, settings)
            if not arguments["skip_tokenizer_init"]:
                write_tokenizer(Path(folder))
            record.content["engine_arguments"] = arguments
            _guarded(
                record,
                "engine",
                lambda: _with_engine(record, scale, arguments, on_engine, seed, skip_largest_batch),
            )
    record.content["finished"] = True
    record.say("done" if not record.content["errors"] else "done, with errors")
    record.write()
    return int(bool(record.content["errors"]))


def _with_engine(
    record: Record,
    scale: Scale,
    arguments: dict[str, Any],
    sections: Sequence[str],
    seed: int,
    skip_largest_batch: bool,
) -> None:
    record.say("import sglang")
    import sglang

    from benchmarks.gpu_speed.weights import MadeUpWeights

    record.say("start the engine")
    start = time.perf_counter()
    engine = sglang.Engine(**{"load_format": MadeUpWeights, **arguments})
    try:
        record.add("startup", [time.perf_counter() - start])
        info = engine._scheduler_init_result.scheduler_infos[0]
        record.content["pool_tokens"] = info["max_total_num_tokens"]
        record.say(f"started; the KV pool holds {record.content['pool_tokens']} tokens")
        client = Client(engine, parallel=bool(arguments.get("enable_ape")))
        by_attention = arguments.get("ape_scorer") == ATTENTION
        measured = Sections(client, record, scale, seed, skip_largest_batch, by_attention)
        gc.collect()
        gc.freeze()  # what is there now is not collected on any request's time
        if sections:
            measured.warm_up()
        for name in sections:
            record.say(name)
            _guarded(record, name, getattr(measured, name))
            _read_memory(record)
        if not sections:
            _read_memory(record)
    finally:
        engine.shutdown()


def _floor(record: Record) -> None:
    """What the device does at best; the least times of the report follow from it."""
    for name, rate in machine.measure_floor().items():
        record.add(f"floor/{name}", [rate])
        record.say(f"floor/{name}: {rate:.4g} a second")


def _read_memory(record: Record) -> None:
    used = machine.used_memory()
    if used is not None:
        record.add("memory", [used])


def _guarded(record: Record, name: str, action: Callable[[], None]) -> None:
    """Run a section; if it fails, say so, keep the trace and go on."""
    try:
        action()
    except Exception:
        record.fail(name, traceback.format_exc())
