"""From the host to the GPU without waiting for what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

_ALIGNMENT = 4  # int32 elements: Triton compiles anew for a pointer that is not 16-byte aligned


def staged(host: torch.Tensor) -> torch.Tensor:
    """Ready for a copy to the GPU that does not wait.

    CUDA stages up to 64 KB of ordinary memory by itself; more has to be pinned.
    """
    host = host.contiguous()
    return host if host.nbytes <= 65536 else host.pin_memory()


class Lists:
    """Integer arrays as int32 in one buffer, each at a multiple of 16 bytes.

    Args:
        arrays: any integer dtype, one dimension.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._lens = [len(array) for array in arrays]
        room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in self._lens]
        self._starts = [0, *accumulate(room)]
        host = np.zeros(self._starts[-1], np.int32)
        for start, array in zip(self._starts, arrays, strict=False):
            host[start : start + len(array)] = array
        self.host = staged(torch.from_numpy(host))

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The arrays in a copy of ``host``."""
        return [
            buffer[start : start + size]
            for start, size in zip(self._starts, self._lens, strict=False)
        ]
