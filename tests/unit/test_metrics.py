"""The metrics, in a registry of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sglang_ape.metrics import EntryMetrics, Usage, context_evictions, decode_steps, entry_metrics

MODEL = {"model_name": "m"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    registry = CollectorRegistry()
    for kind in (Counter, Gauge, Histogram):
        monkeypatch.setattr(prometheus_client, kind.__name__, partial(kind, registry=registry))
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"sglang:ape_{name}", {**MODEL, **labels})


def context_tokens(registry: CollectorRegistry, by: str) -> list[float | None]:
    """From the cache, and computed."""
    name = "context_tokens_total"
    return [value(registry, name, by=by, source=source) for source in ("cache", "computed")]


def server_args(**extra: str) -> SimpleNamespace:
    return SimpleNamespace(served_model_name="m", extra_metric_labels=extra or None)


def test_a_request_counts_its_contexts_and_their_tokens(registry: CollectorRegistry) -> None:
    metrics = EntryMetrics(MODEL)
    metrics.observe_request(Usage(3, 100, 40))
    metrics.observe_request(Usage(30, 50, 50))
    assert value(registry, "requests_total") == 2
    assert value(registry, "contexts_per_request_count") == 2
    assert value(registry, "contexts_per_request_sum") == 33
    assert [value(registry, "contexts_per_request_bucket", le=le) for le in ("2.0", "4.0")] == [
        0,
        1,
    ]
    assert context_tokens(registry, "request") == [90, 60]
    assert context_tokens(registry, "registration") == [0, 0]


def test_a_registration_is_no_request(registry: CollectorRegistry) -> None:
    metrics = EntryMetrics(MODEL)
    metrics.observe_registration(Usage(2, 30, 10))
    assert value(registry, "requests_total") == 0
    assert value(registry, "contexts_per_request_count") == 0
    assert context_tokens(registry, "registration") == [10, 20]
    assert context_tokens(registry, "request") == [0, 0]


def test_the_store_is_shown_as_it_is_now(registry: CollectorRegistry) -> None:
    metrics = EntryMetrics(MODEL)
    names = ("store_contexts", "store_tokens", "pinned_tokens")
    for numbers in ((3, 500, 200), (1, 100, 0)):
        metrics.observe_store(*numbers)
        assert tuple(value(registry, name) for name in names) == numbers


def test_nothing_is_missing_before_the_first_request(registry: CollectorRegistry) -> None:
    """A counter that appears with its first value cannot be told from one that stood still."""
    EntryMetrics(MODEL)
    context_evictions(SimpleNamespace(server_args=server_args()))
    decode_steps(server_args())
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    assert {name.removeprefix("sglang:ape_") for name in names if "_created" not in name} == {
        "requests_total",
        "contexts_per_request_bucket",
        "contexts_per_request_count",
        "contexts_per_request_sum",
        "context_tokens_total",
        "store_contexts",
        "store_tokens",
        "pinned_tokens",
        "evicted_contexts_total",
        "decode_steps_total",
        "ladder_tokens_total",
    }


def test_every_metric_carries_sglangs_labels(registry: CollectorRegistry) -> None:
    manager = SimpleNamespace(enable_metrics=True, server_args=server_args(zone="z"))
    metrics = entry_metrics(manager)
    assert metrics is not None
    metrics.observe_request(Usage(1, 1, 0))
    context_evictions(manager).inc()
    decode_steps(manager.server_args)["shared"].inc()
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    assert {(s.labels["model_name"], s.labels["zone"]) for s in samples} == {("m", "z")}
    assert value(registry, "evicted_contexts_total", zone="z") == 1
    assert value(registry, "decode_steps_total", zone="z", reads="shared") == 1
    assert value(registry, "decode_steps_total", zone="z", reads="apart") == 0


def test_where_sglangs_metrics_are_off_there_are_none(registry: CollectorRegistry) -> None:
    manager = SimpleNamespace(enable_metrics=False, server_args=server_args())
    assert entry_metrics(manager) is None
    assert generate_latest(registry) == b""


# ---------------------------------------------------------------- several processes


def python(code: str, **environment: Any) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_is_not_imported_before_it_is_needed() -> None:
    """SGLang names the folder of shared values first, and the client reads it when imported."""
    code = "import sys; from sglang_ape import metrics; print('prometheus_client' in sys.modules)"
    assert python(code).strip() == "False"


def test_the_values_of_all_processes_are_served_together(tmp_path: Path) -> None:
    """As SGLang's multi-process mode shares them: one process counts, another one serves."""
    count = (
        "from sglang_ape.metrics import *; m = EntryMetrics({'model_name': 'm'});"
        "m.observe_request(Usage(2, 5, 1)); m.observe_store(%d, 7, 3)"
    )
    serve = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess as many;"
        "r = CollectorRegistry(); many.MultiProcessCollector(r); print(generate_latest(r).decode())"
    )
    for contexts in (4, 1):
        python(count % contexts, PROMETHEUS_MULTIPROC_DIR=tmp_path)
    shown = python(serve, PROMETHEUS_MULTIPROC_DIR=tmp_path).splitlines()
    assert 'sglang:ape_requests_total{model_name="m"} 2.0' in shown
    assert 'sglang:ape_store_contexts{model_name="m"} 1.0' in shown
