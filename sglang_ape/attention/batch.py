"""The specs of the batch whose forward pass comes next, and its positions.

SGLang rebuilds ``ForwardBatch`` on its way to the attention backend and drops attributes it does
not know, so the hook on ``ForwardBatch.init_new`` leaves the specs here and the backend of the
same step, in the same thread, picks them up by request ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_ape.request import spec_of
from sglang_ape.spec import ApeSpec

_rids: list[str] = []
_specs: list[ApeSpec | None] = []


def begin_batch(rids: list[str], specs: list[ApeSpec | None]) -> None:
    """Remember the specs of the next forward pass; a batch of plain requests clears them."""
    global _rids, _specs
    _rids, _specs = rids, specs


def specs_of_batch(rids: Sequence[str] | None) -> list[ApeSpec | None] | None:
    """The specs in batch order, None if no request of the batch is an APE request.

    Raises:
        RuntimeError: the batch is not the one announced last; attending to an APE row as if it
            were plain would give a wrong answer without a sign.
    """
    if rids is None or not any(_specs):
        return None
    if list(rids) != _rids:
        raise RuntimeError(
            f"attention was planned for requests {list(rids)} but positions were computed for "
            f"{_rids}; the hook on ForwardBatch.init_new and the attention backend are out of step"
        )
    return _specs


def specs_of_current_batch(size: int) -> list[ApeSpec | None] | None:
    """As :func:`specs_of_batch` where request ids do not arrive: replay of a decode graph.

    Raises:
        RuntimeError: the batch announced last has another size.
    """
    if not any(_specs):
        return None
    if len(_specs) != size:
        raise RuntimeError(
            f"attention was planned for {size} requests but positions were computed for "
            f"{len(_specs)}; the hook on ForwardBatch.init_new and the attention backend are out "
            "of step"
        )
    return _specs


def positions_of(
    specs: Sequence[ApeSpec | None], starts: Sequence[int], stops: Sequence[int]
) -> np.ndarray:
    """Positions of the new rows of a batch, int64 of shape (sum of new rows,)."""
    return np.concatenate(
        [
            np.arange(start, stop, dtype=np.int64) if spec is None else spec.positions(start, stop)
            for spec, start, stop in zip(specs, starts, stops, strict=True)
        ]
    )


def after_init_new(forward_batch: Any, _cls: type, batch: Any, model_runner: Any, **_: Any) -> None:
    """AFTER hook on ``ForwardBatch.init_new``: give APE rows their positions."""
    if not model_runner.server_args.enable_ape:
        return
    specs = [spec_of(req) for req in batch.reqs]
    begin_batch([req.rid for req in batch.reqs], specs)
    positions = forward_batch.positions
    if not any(specs) or positions is None or positions.numel() == 0:
        return
    if forward_batch.forward_mode.is_decode():
        hidden = torch.tensor([spec.hidden_tokens if spec else 0 for spec in specs])
        forward_batch.positions = positions - _beside(positions, hidden)
        return
    starts = forward_batch.extend_prefix_lens_cpu
    stops = [a + n for a, n in zip(starts, forward_batch.extend_seq_lens_cpu, strict=True)]
    computed = torch.from_numpy(positions_of(specs, starts, stops))
    forward_batch.positions = _beside(positions, computed)


def _beside(positions: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """``host`` on the device of ``positions``, without waiting for what runs there."""
    if positions.is_cuda:
        host = host.pin_memory()
    return host.to(positions, non_blocking=True)
