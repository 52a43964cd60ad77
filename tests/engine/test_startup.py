"""A server that cannot serve APE as asked refuses to start, naming the flag."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def _start(model: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    """Run the launcher, which must fail; its output."""
    result = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(env or {})},
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--enable-ape", "--page-size", "16"), "--page-size 16"),
        (("--enable-ape", "--ape-temperature", "nan"), "--ape-temperature must be in (0, 10]"),
        (("--ape-scale", "0.5"), "--ape-scale has no effect without --enable-ape"),
        (
            ("--enable-ape", "--ape-soft", "0.3", "--ape-refine", "2"),
            "--ape-soft 0.3 and --ape-refine 2 cannot be combined",
        ),
        (("--enable-ape", "--ape-warm", "no.jsonl"), "--ape-warm: no.jsonl: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flags_are_refused_by_name(tiny_llama: Path, flags: tuple[str, ...], message: str) -> None:
    assert message in _start(tiny_llama, "--device", "cpu", *flags)


def test_a_whitelist_without_the_plugin_leaves_the_flag_unknown(tiny_llama: Path) -> None:
    output = _start(
        tiny_llama, "--device", "cpu", "--enable-ape", env={"SGLANG_PLUGINS": "ape_cpu"}
    )
    assert "unrecognized arguments: --enable-ape" in output


def test_a_model_with_length_dependent_rotary_scaling_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(config))
    output = _start(model, "--device", "cpu", "--enable-ape", "--max-total-tokens", "512")
    assert "length-dependent rotary scaling (dynamic)" in output
