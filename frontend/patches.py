"""Everything of ``sglang.lang`` that this package touches, in one list.

These are functions of the process that runs the programs. SGLang's HookRegistry is applied in
server processes only, so they are replaced here. A program without ``parallel_contexts`` passes
through each of them unchanged, but for ``end``, which is mended for every program.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from sglang.lang import interpreter
from sglang.lang.backend import runtime_endpoint

from sglang_ape import compat
from sglang_ape.frontend import program, runtime


class Patch(NamedTuple):
    """One method of SGLang, and the function that is put around it."""

    module: ModuleType
    owner: str  # a class of the module
    method: str
    parameters: tuple[str, ...]  # of the method as this package knows it
    around: Callable[..., Any]  # (original, *args, **kwargs)


_STREAM = ("self", "var_name")
_RUNTIME = ("self", "log_level", "launch_timeout", "args", "kwargs")

PATCHES = (
    # the program: where the contexts stand, and what went wrong
    Patch(interpreter, "StreamExecutor", "submit", ("self", "expr"), program.around_submit),
    Patch(interpreter, "StreamExecutor", "_execute", ("self", "other"), program.around_execute),
    Patch(
        interpreter,
        "StreamExecutor",
        "fork",
        ("self", "size", "position_ids_offset"),
        program.around_fork,
    ),
    Patch(interpreter, "StreamExecutor", "get_var", ("self", "name"), program.around_get_var),
    Patch(interpreter, "StreamExecutor", "end", ("self",), program.around_end),
    Patch(interpreter, "ProgramState", "text_iter", _STREAM, program.around_text_iter),
    Patch(
        interpreter,
        "ProgramState",
        "text_async_iter",
        (*_STREAM, "return_meta_data"),
        program.around_text_async_iter,
    ),
    # its requests: _add_images has every body for /generate last
    Patch(
        runtime_endpoint,
        "RuntimeEndpoint",
        "_add_images",
        ("self", "s", "data"),
        program.around_add_images,
    ),
    Patch(
        runtime_endpoint,
        "RuntimeEndpoint",
        "commit_lazy_operations",
        ("self", "s"),
        program.around_commit,
    ),
    # a server started from a program
    Patch(runtime_endpoint, "Runtime", "__init__", _RUNTIME, runtime.around_init),
)

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Put every patch in place; a second call changes nothing.

    Raises:
        RuntimeError: one of these methods is not as this package knows it.
    """
    global _installed
    with _lock:
        if _installed:
            return
        originals = [_find(patch) for patch in PATCHES]
        for patch, original in zip(PATCHES, originals, strict=True):
            owner = getattr(patch.module, patch.owner)
            setattr(owner, patch.method, _wrapped(original, patch.around))
        _installed = True


def _find(patch: Patch) -> Callable[..., Any]:
    method = getattr(getattr(patch.module, patch.owner, None), patch.method, None)
    found = None if method is None else tuple(inspect.signature(method).parameters)
    if method is None or found != patch.parameters:
        what = "is missing" if found is None else f"takes ({', '.join(found)})"
        raise RuntimeError(
            f"parallel_contexts needs SGLang {compat.SUPPORTED} as it was released: "
            f"{patch.module.__name__}.{patch.owner}.{patch.method} {what}"
        )
    return method


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return call
