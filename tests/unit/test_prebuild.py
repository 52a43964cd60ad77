"""The command that builds modules ahead of time; the build itself is stood in for."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashinfer_ext import prebuild, variant
from flashinfer_ext.variant import MODULE_DIR_VARIABLE, ModuleKey

WRITTEN = ("FLASHINFER_CUDA_ARCH_LIST", MODULE_DIR_VARIABLE, "CUDA_HOME", "CPATH", "LIBRARY_PATH")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command writes there is taken back."""
    for name in WRITTEN:
        monkeypatch.setenv(name, "")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every build."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(prebuild, "build", lambda *args, hopper: calls.append((*args, hopper)))
    monkeypatch.setattr(prebuild, "_complete_toolkit", lambda folder: None)
    return calls


@pytest.mark.parametrize(("arch", "hopper"), [("9.0a", True), ("8.9", False), ("10.0a", False)])
def test_an_architecture_alone_builds_the_modules_of_bf16_models(
    built: list[tuple[Any, ...]], arch: str, hopper: bool
) -> None:
    prebuild.main(["--arch", arch])
    assert built == [(["bfloat16"], ["auto"], [128], hopper)]
    assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == arch
    assert os.environ[MODULE_DIR_VARIABLE] == ""


def test_every_option_takes_several_values(built: list[tuple[Any, ...]], tmp_path: Path) -> None:
    options = "--arch 8.0 --dtype bfloat16 float16 --kv-dtype auto float8_e4m3fn --head-dim 64 256"
    prebuild.main([*options.split(), "--output", str(tmp_path / "x" / ".." / "y")])
    assert built == [(["bfloat16", "float16"], ["auto", "float8_e4m3fn"], [64, 256], False)]
    assert os.environ[MODULE_DIR_VARIABLE] == str(tmp_path / "y")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", "--arch"),
        ("--arch 9.0a --dtype float32", "--dtype"),
        ("--arch 9.0a --kv-dtype int8", "--kv-dtype"),
        ("--arch 9.0a --head-dim 80", "--head-dim"),
    ],
)
def test_an_option_that_cannot_be_built_is_named(
    built: list[tuple[Any, ...]],
    capsys: pytest.CaptureFixture[str],
    options: str,
    named: str,
) -> None:
    with pytest.raises(SystemExit):
        prebuild.main(options.split())
    assert named in capsys.readouterr().err
    assert not built


@pytest.mark.parametrize("name", [*prebuild._DTYPES, *prebuild._KV_DTYPES[1:]])
def test_every_dtype_on_offer_has_a_name_in_modules(name: str) -> None:
    assert getattr(torch, name) in variant._DTYPE_NAMES


@pytest.mark.parametrize("hopper", [False, True])
def test_each_combination_is_built_once_into_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hopper: bool
) -> None:
    built: list[ModuleKey] = []

    def jit_spec(key: ModuleKey) -> SimpleNamespace:
        library = tmp_path / "jit" / key.name
        library.parent.mkdir(exist_ok=True)
        built.append(key)
        return SimpleNamespace(
            jit_library_path=library, build=lambda verbose: library.write_text(key.name)
        )

    monkeypatch.setenv(MODULE_DIR_VARIABLE, str(tmp_path / "out"))
    monkeypatch.setattr(variant, "jit_spec", jit_spec)
    prebuild.build(["bfloat16", "float16"], ["auto", "float8_e4m3fn"], [64, 128], hopper)
    keys = {
        ModuleKey(q, kv, head_dim, template, with_bias)
        for q in (torch.bfloat16, torch.float16)
        for kv, template in ((q, "fa2"), (torch.float8_e4m3fn, "fa2"), (q, "fa3"))
        for head_dim in (64, 128)
        for with_bias in (False, True)
        if template == "fa2" or (hopper and not with_bias)
    }
    assert len(built) == len(keys)
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {variant.prebuilt_path(key) for key in keys}
    assert all(variant.prebuilt_path(key).read_text() == key.name for key in keys)


def test_the_compilers_search_paths_are_added_to_and_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setenv("CPATH", "/mine")
    prebuild._complete_toolkit(tmp_path)
    assert os.environ["CPATH"] == f"/mine:{tmp_path}"
    assert os.environ["LIBRARY_PATH"] == str(tmp_path)
    (command,) = commands
    assert str(tmp_path / "libcuda.so") in command
