"""SGLang on a machine without a GPU: torch layers and ``torch_native`` attention.

Without it, stock SGLang 0.5.17 on such a machine looks for vllm's or sgl_kernel's CPU operators,
neither of which PyPI carries. It is for tests and for trying things out, not for speed.
Source: ``platforms/interface.py`` and ``platforms/cpu.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum


class ApeCpuPlatform(CpuSRTPlatform):
    """The CPU as an out-of-tree platform."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose what works without a GPU.

        Raises:
            ValueError: ``--grammar-backend xgrammar``, whose token masks live in pinned memory and
                are applied on a GPU: the first structured output would end the scheduler.
        """
        # torch.compile would take a minute of the first request, and need a C++ compiler, for
        # functions of a few elementwise operations. The engine's processes inherit the setting.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if server_args.grammar_backend == "xgrammar":
            raise ValueError("--grammar-backend xgrammar needs a GPU; use llguidance")
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "llguidance"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
