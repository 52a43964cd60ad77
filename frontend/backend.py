"""Which backends of the frontend language serve contexts."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_ape.errors import ApeRequestError

_serving: WeakSet[Any] = WeakSet()  # endpoints that have been asked already
_lock = threading.Lock()


def check_backend(backend: Any) -> None:
    """Refuse a backend that would drop the contexts without a word.

    Raises:
        ApeRequestError: no SGLang server, or one that was started without ``--enable-ape``.
    """
    if not isinstance(backend, RuntimeEndpoint):
        raise ApeRequestError(
            "parallel_contexts needs an SGLang server as backend (sgl.RuntimeEndpoint or "
            f"sgl.Runtime), got {type(backend).__name__}",
            "backend",
        )
    with _lock:  # programs of one batch ask once
        if backend in _serving:
            return
        if backend.get_server_info().get("enable_ape") is not True:
            raise ApeRequestError(
                f"parallel_contexts: the server at {backend.base_url} was started without "
                "--enable-ape and would answer without the contexts",
                "backend",
            )
        _serving.add(backend)
