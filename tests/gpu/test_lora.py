"""Adapters: contexts under LoRA, and no KV or id shared between adapters.

The adapters change queries, keys and values in every layer, so that the KV of a context differs
between them and the base model. SGLang's LoRA layers need a GPU.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_oracle_equality import assert_equal
from tests.support import models
from tests.support.models import NUM_LAYERS, Shape
from tests.support.oracle import Oracle
from tests.support.server import Server

RANK = 4
ALPHA = 8
MODULES = ("q_proj", "k_proj", "v_proj")
PREFIX = [1, 20, 21]
CONTEXTS = [[30, 31, 32, 33], [40, 41], [50, 51, 52]]
QUERY = [60, 61, 62]
NEW_TOKENS = 8
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
BODY = {
    "prefix_ids": PREFIX,
    "input_ids": QUERY,
    "sampling_params": GREEDY,
    "return_logprob": True,
}
BY_IDS = [{"input_ids": ids} for ids in CONTEXTS]
NAMES = ("alpha", "beta")
SHAPE = Shape(num_heads=4, num_kv_heads=1, head_dim=64, dtype=torch.float16)
TOLERANCE = 0.04  # as in test_flashinfer.py


def _write_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A random adapter for the attention's inputs, in PEFT's layout."""
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module in MODULES:
            name = f"model.layers.{layer}.self_attn.{module}"
            rows, columns = weights[f"{name}.weight"].shape
            a = 0.2 * torch.randn(RANK, columns, generator=generator)
            b = 0.2 * torch.randn(rows, RANK, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(SHAPE.dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(SHAPE.dtype)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(MODULES),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _merge(directory: Path, model: Path, adapter: Path) -> Path:
    """The checkpoint that the adapter makes of the model."""
    shutil.copytree(model, directory)
    weights = load_file(model / "model.safetensors")
    changes = load_file(adapter / "adapter_model.safetensors")
    for name, a in changes.items():
        if ".lora_A." in name:
            b = changes[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[target] = weights[target].float() + ALPHA / RANK * (b.float() @ a.float())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    return {name: _write_adapter(base / name, model, seed) for seed, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="module")
def oracles(
    model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, Oracle]:
    base = tmp_path_factory.mktemp("merged")
    merged: dict[str | None, Oracle] = {
        name: Oracle(_merge(base / name, model, path)) for name, path in adapters.items()
    }
    return merged | {None: Oracle(model)}


@pytest.fixture(scope="module")
def shared_server(
    model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = (
        *("--device", "cuda", "--dtype", "float16", "--mem-fraction-static", "0.2"),
        *("--cuda-graph-max-bs", "16", "--sampling-backend", "pytorch"),
        *("--enable-ape", "--max-total-tokens", "6000", "--ape-max-pinned-tokens", "2000"),
        *("--lora-paths", *(f"{name}={path}" for name, path in adapters.items())),
    )
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(model, flags, log) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    shared_server.flush()
    yield shared_server
    listed = shared_server.client.get("/ape/contexts").json()["contexts"]
    for context in listed:
        shared_server.client.delete(f"/ape/contexts/{context['id']}")
    shared_server.assert_clean()


def _check(answer: dict[str, Any], oracle: Oracle) -> None:
    expected = oracle.generate(PREFIX, CONTEXTS, QUERY, NEW_TOKENS, 0.9, 0.9)
    assert_equal(answer, expected, TOLERANCE)


def _register(server: Server, adapter: str | None, **fields: Any) -> list[dict[str, Any]]:
    body = {"prefix_ids": PREFIX, "contexts": BY_IDS, "lora_path": adapter} | fields
    response = server.post("/ape/contexts", body)
    assert response.status_code == 200, response.text
    return response.json()["contexts"]


@pytest.mark.parametrize("adapter", [None, *NAMES])
def test_contexts_under_an_adapter_give_the_merged_models_answer(
    server: Server, oracles: dict[str | None, Oracle], adapter: str | None
) -> None:
    for _ in ("cold", "cached"):
        answer = server.generate(BODY | {"contexts": BY_IDS, "lora_path": adapter})
        _check(answer, oracles[adapter])
    assert answer["meta_info"]["ape"]["cached_context_tokens"] == 9


def test_adapters_share_neither_ids_nor_cache(
    server: Server, oracles: dict[str | None, Oracle]
) -> None:
    found = {adapter: _register(server, adapter) for adapter in (None, *NAMES)}
    ids = [context["id"] for contexts in found.values() for context in contexts]
    assert len(set(ids)) == 9
    cached = [context["cached_tokens"] for contexts in found.values() for context in contexts]
    assert cached == [0] * 9
    for adapter, contexts in found.items():
        by_id = [{"id": context["id"]} for context in contexts]
        answer = server.generate(BODY | {"contexts": by_id, "lora_path": adapter})
        _check(answer, oracles[adapter])
        assert answer["meta_info"]["ape"]["cached_context_tokens"] == 9
        for other in found.keys() - {adapter}:
            response = server.post("/generate", BODY | {"contexts": by_id, "lora_path": other})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "contexts[0].id"


def test_requests_of_all_adapters_in_one_batch_keep_apart(
    server: Server, oracles: dict[str | None, Oracle]
) -> None:
    order = [None, *NAMES] * 3
    answers = server.generate(
        {
            "input_ids": [QUERY] * len(order),
            "prefix_ids": PREFIX,
            "contexts": [BY_IDS] * len(order),
            "lora_path": order,
            "sampling_params": GREEDY,
            "return_logprob": True,
        }
    )
    for answer, adapter in zip(answers, order, strict=True):
        _check(answer, oracles[adapter])


def test_pins_under_an_adapter_hold(server: Server) -> None:
    found = _register(server, "alpha", pin=True)
    for seed in range(5):
        prompt = [10 + (seed * 7 + i) % 400 for i in range(1500)]
        server.generate({"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}})
    listed = server.client.get("/ape/contexts?lora_path=alpha").json()["contexts"]
    assert [context["id"] for context in listed] == [context["id"] for context in found]
    assert all(context["cached_tokens"] == context["tokens"] for context in listed)


def test_an_adapter_loaded_anew_starts_without_kv_and_keeps_its_ids(
    server: Server, adapters: dict[str, Path]
) -> None:
    before = _register(server, "beta", pin=True)
    server.post("/unload_lora_adapter", {"lora_name": "beta"}).raise_for_status()
    listed = server.client.get("/ape/contexts?lora_path=beta").json()["contexts"]
    assert [context["cached_tokens"] for context in listed] == [0, 0, 0]
    path = str(adapters["beta"])
    server.post("/load_lora_adapter", {"lora_name": "beta", "lora_path": path}).raise_for_status()
    again = _register(server, "beta", pin=True)
    assert [context["id"] for context in again] == [context["id"] for context in before]
    assert [context["cached_tokens"] for context in again] == [0, 0, 0]
