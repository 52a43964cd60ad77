"""``sgl.Runtime(enable_ape=True)``: a server started from a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_ape.arguments import FLAGS


def around_init(original: Callable[..., None], runtime: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``Runtime.__init__``: load the plugins first, as ``Engine`` does.

    SGLang's ``Runtime`` makes ``ServerArgs`` in the process of its caller, where no plugin has
    been loaded: it would know no ``enable_ape``.
    """
    if any(flag.name in kwargs for flag in FLAGS):
        from sglang.srt.plugins import load_plugins

        load_plugins()
    original(runtime, *args, **kwargs)
