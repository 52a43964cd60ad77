"""SGLang on a machine without a GPU: torch layers and ``torch_native`` attention.

Without it, stock SGLang 0.5.17 on such a machine looks for vllm's or sgl_kernel's CPU operators,
neither of which PyPI carries. It is for tests and for trying things out, not for speed.
Source: ``platforms/interface.py`` and ``platforms/cpu.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum


class ApeCpuPlatform(CpuSRTPlatform):
    """The CPU as an out-of-tree platform."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
