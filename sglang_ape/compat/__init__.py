"""What depends on the SGLang version: a gate, and one module a supported version."""

from __future__ import annotations

from importlib.metadata import version
from types import ModuleType

SUPPORTED = "0.5.17"


def load() -> ModuleType:
    """The module for the installed SGLang.

    Raises:
        RuntimeError: the installed version is not supported.
    """
    installed = version("sglang")
    if installed.split("+")[0] != SUPPORTED and not installed.startswith(f"{SUPPORTED}.post"):
        raise RuntimeError(
            f"sglang-ape supports SGLang {SUPPORTED}, but {installed} is installed; install "
            f"'sglang=={SUPPORTED}', or remove sglang-ape"
        )
    from sglang_ape.compat import v0_5_17

    return v0_5_17
