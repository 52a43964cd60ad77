"""Adaptive Parallel Encoding (APE) served by SGLang.

The paper: Yang, Chen, Chen, "APE: Faster and Longer Context-Augmented Generation via Adaptive
Parallel Encoding", ICLR 2025. Importing this package imports neither torch nor SGLang; it adds
``sgl.parallel_contexts`` to SGLang's frontend language, now or as soon as SGLang is imported.
"""

from typing import TYPE_CHECKING, Any

from sglang_ape.frontend.attach import attach_to_sglang

if TYPE_CHECKING:
    from sglang_ape.client import ContextStore as ContextStore

__version__ = "0.1.0"

attach_to_sglang()


def __getattr__(name: str) -> Any:
    if name == "ContextStore":
        from sglang_ape.client import ContextStore

        return ContextStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
