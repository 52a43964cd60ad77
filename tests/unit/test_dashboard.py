"""The Grafana dashboard and docs/serving.md name metrics that exist."""

import importlib.util
import json
import re
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sglang_ape.metrics import EntryMetrics, Usage, context_evictions, decode_steps

DOCS = Path(__file__).parents[2] / "docs"
SERVING = (DOCS / "serving.md").read_text()
SOURCE = (DOCS / "grafana" / "sglang-ape.json").read_text()
DASHBOARD = json.loads(SOURCE)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS: list[dict[str, Any]] = [target for panel in PANELS for target in panel["targets"]]

COLUMNS = 24  # of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
KINDS = {"Counter": Counter, "Gauge": Gauge, "Histogram": Histogram}
MODEL = {"model_name": "m"}


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Our metrics, as ``prometheus_client`` collects them."""
    registry = CollectorRegistry()
    for name, kind in KINDS.items():
        monkeypatch.setattr(prometheus_client, name, partial(kind, registry=registry))
    metrics = EntryMetrics(MODEL)
    metrics.observe_request(Usage(1, 2, 1))
    args = SimpleNamespace(served_model_name="m", extra_metric_labels=None)
    context_evictions(SimpleNamespace(server_args=args))
    decode_steps(args)
    return list(registry.collect())


def _series(metrics: list[Any]) -> set[str]:
    return {metric.name + suffix for metric in metrics for suffix in SUFFIXES[metric.type]}


def _metrics_of_sglang() -> list[Any]:
    """Their names and types, read from SGLang's source."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    text = (folder / "srt" / "observability" / "metrics_collector.py").read_text()
    made = re.findall(rf'({"|".join(KINDS)})\(\s*name="(sglang:\w+)"', text)
    assert made, "SGLang makes its metrics in another way now"
    return [
        SimpleNamespace(name=name.removesuffix("_total"), type=kind.lower()) for kind, name in made
    ]


def _named(text: str) -> set[str]:
    return set(re.findall(r"sglang:\w+", text))


def test_the_dashboard_asks_for_series_that_exist(ours: list[Any]) -> None:
    named = _named(SOURCE)
    assert named - _series(ours + _metrics_of_sglang()) == set()
    assert any("ape_" in name for name in named)


def test_the_dashboard_asks_for_every_metric_of_ours(ours: list[Any]) -> None:
    named = _named(SOURCE)
    for metric in ours:
        assert named & _series([metric]), metric.name


def test_the_guide_names_metrics_that_exist(ours: list[Any]) -> None:
    metrics = ours + _metrics_of_sglang()
    histograms = {metric.name for metric in metrics if metric.type == "histogram"}
    assert _named(SERVING) - _series(metrics) - histograms == set()


def test_the_table_of_the_guide_lists_every_metric_with_its_type_and_labels(
    ours: list[Any],
) -> None:
    rows = re.findall(r"^\| `(sglang:\w+)` \| (\w+) \| ([^|]*) \|", SERVING, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    expected = {}
    for metric in ours:
        name = metric.name + ("_total" if metric.type == "counter" else "")
        labels = {label for sample in metric.samples for label in sample.labels}
        expected[name] = (metric.type, labels - MODEL.keys() - {"le"})
    assert listed == expected


def test_values_of_labels_that_are_asked_for_exist(ours: list[Any]) -> None:
    counted = {
        (name, value)
        for metric in ours
        for sample in metric.samples
        for name, value in sample.labels.items()
    }
    expressions = " ".join(target["expr"] for target in TARGETS)
    asked = set(re.findall(r'(by|source|reads|rung)="(\w+)"', expressions + SERVING))
    assert asked and asked <= counted


def test_every_expression_is_of_the_chosen_model() -> None:
    for target in TARGETS:
        selectors = re.findall(r"sglang:\w+(\{[^}]*\})?", target["expr"])
        assert selectors, target["expr"]
        assert all('model_name=~"$model_name"' in selector for selector in selectors), target
        assert target["expr"].count("(") == target["expr"].count(")"), target["expr"]


def test_every_panel_and_target_asks_the_chosen_datasource() -> None:
    for asking in (*PANELS, *TARGETS):
        assert asking["datasource"] == DATASOURCE, asking


def test_the_variables_that_are_used_are_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([A-Za-z]\w*)", SOURCE))
    assert used == defined == {"DS_PROMETHEUS", "model_name"}


def test_ids_are_unique() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]


def test_panels_lie_side_by_side_within_the_grid() -> None:
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["y"] >= 0 and at["h"] > 0 and at["w"] > 0, panel["title"]
        assert at["x"] + at["w"] <= COLUMNS, panel["title"]
    for one, other in combinations(PANELS, 2):
        assert not _overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_the_file_is_written_as_it_is_kept() -> None:
    assert json.dumps(DASHBOARD, indent=2) + "\n" == SOURCE
