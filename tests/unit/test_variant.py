"""Where the attention modules are looked for, and when one counts as available; none is built."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashinfer_ext import cascade, variant
from flashinfer_ext.variant import MODULE_DIR_VARIABLE, ModuleKey, jit_spec

HALVES = (torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HEAD_DIMS = (64, 128, 256)
FA2_KEYS = [
    ModuleKey(q, kv, head_dim) for q, head_dim in product(HALVES, HEAD_DIMS) for kv in (q, *FLOAT8)
]
FA3_KEYS = [ModuleKey(q, q, head_dim, "fa3") for q, head_dim in product(HALVES, HEAD_DIMS)]
BIAS_KEYS = [key._replace(with_bias=True) for key in FA2_KEYS]
KEYS = FA2_KEYS + FA3_KEYS + BIAS_KEYS
KEY = ModuleKey(torch.bfloat16, torch.bfloat16, 128)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """FlashInfer's cache for sm_90a, no prebuilt module, no compiler."""
    cache = tmp_path / "flashinfer"
    monkeypatch.setattr(variant.jit_env, "FLASHINFER_CACHE_DIR", cache)
    monkeypatch.setattr(variant.jit_env, "FLASHINFER_WORKSPACE_DIR", cache / "0.6.15" / "90a")
    monkeypatch.setenv(MODULE_DIR_VARIABLE, str(tmp_path / "modules"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(variant, "jit_spec", lambda key: SimpleNamespace(is_aot=False))
    cached = (cascade.temperature_module, cascade.bias_module, variant.load_module)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def put_executable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)


def put_prebuilt(key: ModuleKey) -> Path:
    path = variant.prebuilt_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_every_key_has_a_name_and_a_file_of_its_own() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert len({variant.prebuilt_path(key) for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_name_is_an_identifier(key: ModuleKey) -> None:
    """FlashInfer registers operators under it and writes it into C++ source."""
    assert key.name.isidentifier()


def test_hoppers_template_takes_keys_of_the_queries_dtype_alone() -> None:
    assert [key.on_hopper for key in FA2_KEYS if key.kv_dtype == key.q_dtype] == FA3_KEYS
    assert not any(key.on_hopper for key in FA2_KEYS if key.kv_dtype in FLOAT8)
    assert not any(key.on_hopper for key in BIAS_KEYS)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_each_template_gets_the_variant_in_its_own_form(
    monkeypatch: pytest.MonkeyPatch, key: ModuleKey
) -> None:
    monkeypatch.setattr("flashinfer.jit.gen_customize_batch_prefill_module", lambda *args: args)
    template, name, *_, source = jit_spec(key)
    assert (template, name) == (key.template, key.name)
    assert ("GetAttentionUpdater" in source) == (key.template == "fa3")
    assert ("params.bias" in source) == key.with_bias


def test_a_prebuilt_module_lies_in_the_named_folder_by_version_and_architecture(
    tmp_path: Path,
) -> None:
    expected = tmp_path / "modules" / "0.6.15" / "90a" / f"{KEY.name}.so"
    assert variant.prebuilt_path(KEY) == expected


@pytest.mark.parametrize("unset", ["", None])
def test_without_a_named_folder_it_lies_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unset: str | None
) -> None:
    if unset is None:
        monkeypatch.delenv(MODULE_DIR_VARIABLE)
    else:
        monkeypatch.setenv(MODULE_DIR_VARIABLE, unset)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / ".cache" / "flashinfer_ext"
    assert variant.prebuilt_path(KEY) == root / "0.6.15" / "90a" / f"{KEY.name}.so"


def test_a_module_of_another_version_or_architecture_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_prebuilt(KEY)
    assert variant.is_available(KEY)
    for other in ("0.6.16/90a", "0.6.15/100a"):
        workspace = variant.jit_env.FLASHINFER_CACHE_DIR / other
        monkeypatch.setattr(variant.jit_env, "FLASHINFER_WORKSPACE_DIR", workspace)
        assert not variant.is_available(KEY)


def test_with_nothing_built_and_no_compiler_no_module_is_available() -> None:
    assert not any(variant.is_available(key) for key in KEYS)


def test_a_prebuilt_module_makes_its_own_key_available_and_no_other() -> None:
    put_prebuilt(KEY)
    assert [key for key in KEYS if variant.is_available(key)] == [KEY]


def test_a_module_that_flashinfer_ships_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "jit_spec", lambda key: SimpleNamespace(is_aot=True))
    assert variant.is_available(KEY)


@pytest.mark.parametrize("place", ["path", "CUDA_HOME", "CUDA_PATH"])
def test_nvcc_with_ninja_makes_every_module_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.delenv("CUDA_HOME")
    if place == "path":
        put_executable(tmp_path / "nvcc")
    else:
        monkeypatch.setenv(place, str(tmp_path / "toolkit"))
        put_executable(tmp_path / "toolkit" / "bin" / "nvcc")
    assert not variant.is_available(KEY)
    put_executable(tmp_path / "ninja")
    assert variant.is_available(KEY)


def test_an_nvcc_that_cannot_be_executed_does_not_count(tmp_path: Path) -> None:
    put_executable(tmp_path / "ninja")
    put_executable(tmp_path / "cuda" / "bin" / "nvcc")
    (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o644)
    assert not variant.is_available(KEY)


class FakeSpec:
    """Takes note of what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def load(self, path: Path) -> str:
        self.calls.append(path)
        return "loaded"

    def build_and_load(self) -> str:
        self.calls.append("build")
        return "built"


@pytest.mark.parametrize("prebuilt", [False, True])
def test_a_prebuilt_module_is_loaded_once_and_not_compiled(
    monkeypatch: pytest.MonkeyPatch, prebuilt: bool
) -> None:
    spec = FakeSpec()
    monkeypatch.setattr(variant, "jit_spec", lambda key: spec)
    monkeypatch.setattr(variant, "get_batch_prefill_jit_module", lambda name, it: (name, it))
    path = put_prebuilt(KEY) if prebuilt else None
    for _ in range(2):
        assert variant.load_module(KEY) == (KEY.name, "loaded" if prebuilt else "built")
    assert spec.calls == [path if prebuilt else "build"]


def test_the_cascade_says_once_that_it_uses_the_stock_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cascade.temperature_module(KEY) is None
    assert cascade.temperature_module(KEY) is None
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "flashinfer_ext.cascade")
    assert KEY.name in record.message
    assert "flashinfer_ext.prebuild" in record.message


def test_the_cascade_has_no_stock_kernel_with_a_bias() -> None:
    key = KEY._replace(with_bias=True)
    with pytest.raises(RuntimeError, match=key.name):
        cascade.bias_module(key)


def test_the_cascade_takes_an_available_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant, "load_module", lambda key: key.name)
    put_prebuilt(KEY)
    assert cascade.temperature_module(KEY) == KEY.name
    with_bias = KEY._replace(with_bias=True)
    put_prebuilt(with_bias)
    assert cascade.bias_module(with_bias) == with_bias.name
