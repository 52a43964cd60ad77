"""Attention pieces for parallel contexts, usable without SGLang.

``ApeCascadeAttentionWrapper``, ``merge_state_scaled`` and ``merge_states_scaled`` follow
FlashInfer's conventions. They are imported on first use: the torch reference
(``flashinfer_ext.reference``) needs neither FlashInfer nor Triton.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ApeCascadeAttentionWrapper": "flashinfer_ext.cascade",
    "context_lse": "flashinfer_ext.lse",
    "gather_kv_indices": "flashinfer_ext.gather",
    "merge_state_scaled": "flashinfer_ext.merge",
    "merge_states_scaled": "flashinfer_ext.merge",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
