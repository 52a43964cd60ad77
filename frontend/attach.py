"""Adds ``sgl.parallel_contexts`` as soon as SGLang is imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sglang_ape import compat

_LAST = "sglang.lang.backend.runtime_endpoint"  # it imports all else that is patched


def attach_to_sglang() -> None:
    """Attach now if SGLang's frontend is imported, else right after its import."""
    module = sys.modules.get(_LAST)
    if module is None:
        sys.meta_path.insert(0, _AfterImport())
    elif hasattr(module, "Runtime"):  # otherwise it is being imported at this moment
        _attach()


class _AfterImport(MetaPathFinder):
    """Finds one module as ever, and attaches when that has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LAST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_attach(module: ModuleType) -> None:
            execute(module)
            sys.modules[name] = module
            _attach()

        spec.loader.exec_module = execute_and_attach  # type: ignore[method-assign]
        return spec


def _attach() -> None:
    """Set ``sglang.parallel_contexts``: to the real one, or on another SGLang to an explanation."""
    try:
        compat.load()
        from sglang_ape.frontend import patches
        from sglang_ape.frontend.expression import parallel_contexts

        patches.install()
    except (RuntimeError, ImportError) as error:
        parallel_contexts = _unavailable(str(error))
    sys.modules["sglang"].parallel_contexts = parallel_contexts  # type: ignore[attr-defined]


def _unavailable(reason: str) -> Callable[..., Any]:
    def parallel_contexts(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"sgl.parallel_contexts is not available: {reason}")

    return parallel_contexts
