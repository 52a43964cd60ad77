"""The self-check refuses a half-patched process, and the package is complete."""

import tomllib
from pathlib import Path

import pytest

from sglang_ape import arguments, plugin

ROOT = Path(__file__).parents[2]


def _all_in_place(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Make a process in which everything took; the set of hooked targets may be changed."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.mem_cache import registry
    from sglang.srt.plugins.hook_registry import HookRegistry

    def backend(runner: object) -> None:
        raise AssertionError("never built here")

    backend.serves_ape = True  # type: ignore[attr-defined]
    targets = {hook.target for hook in (*plugin.hooks(), plugin.http_hook())}
    monkeypatch.setattr(HookRegistry, "_patched", targets)
    monkeypatch.setattr(registry, "_RADIX_CACHE_REGISTRY", {arguments.TREE_BACKEND: backend})
    backends = dict.fromkeys(arguments.ATTENTION_BACKENDS, backend)
    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", backends)
    return targets


def test_a_process_in_which_everything_took_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    _all_in_place(monkeypatch)
    plugin.verify()


@pytest.mark.parametrize("target", [hook.target for hook in plugin.hooks()])
def test_a_missing_hook_is_named(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    _all_in_place(monkeypatch).remove(target)
    with pytest.raises(RuntimeError) as caught:
        plugin.verify()
    assert target in str(caught.value)


def test_a_missing_tree_or_attention_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.mem_cache import registry

    _all_in_place(monkeypatch)
    monkeypatch.setattr(registry, "_RADIX_CACHE_REGISTRY", {})
    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", {"torch_native": object()})
    message = "cache backend .ape., attention backend .flashinfer., attention backend .torch"
    with pytest.raises(RuntimeError, match=message):
        plugin.verify()


def test_every_package_is_listed_for_the_wheel() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("sglang_ape", "flashinfer_ext", "frontend")
        for init in (ROOT / top).rglob("__init__.py")
    }
    found = {f"sglang_ape.{name}" if name.split(".")[0] == "frontend" else name for name in found}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(found) == settings["tool"]["setuptools"]["packages"]
