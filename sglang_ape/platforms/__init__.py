"""SGLang's out-of-tree platform for machines without an accelerator."""

from __future__ import annotations

import os


def cpu_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the CPU platform, or None to stay out of the way.

    Runs very early in every process that imports SGLang's platforms; it stands back wherever an
    accelerator is found, and where SGLang's own CPU engine was asked for.
    """
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():  # ROCm reports as cuda
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    return "sglang_ape.platforms.cpu.ApeCpuPlatform"
