"""The requests of the batch whose forward pass comes next, and its positions.

SGLang rebuilds ``ForwardBatch`` on its way to the attention backend and drops attributes it does
not know, so the hook on ``ForwardBatch.init_new`` leaves the specs here and the backend of the
same step, in the same thread, picks them up by request ids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_ape.attention.mass import AttentionMass
from sglang_ape.attention.rectangles import Reader
from sglang_ape.request import spec_of
from sglang_ape.spec import ApeSpec, ProbeSpec


class ApeBatch(NamedTuple):
    """A batch with at least one APE request, in batch order."""

    specs: Sequence[ApeSpec | None]  # None: a plain request
    # Equal for requests whose contexts hold the same KV and are read with the same T and S.
    context_sets: Sequence[Hashable | None]
    readers: Sequence[Reader | None] = ()  # of a decode step; the same objects at every step
    masses: Sequence[AttentionMass | None] = ()  # of a prefill batch: of requests with a ProbeSpec


_rids: list[str] = []
_batch: ApeBatch | None = None


def begin_batch(rids: list[str], batch: ApeBatch | None) -> None:
    """Remember what the next forward pass is about; None for a batch of plain requests."""
    global _rids, _batch
    _rids, _batch = rids, batch


_serves_bias = True


def set_serves_bias(value: bool) -> None:
    """Told by the attention backend of this process: whether contexts may have a bias."""
    global _serves_bias
    _serves_bias = value


def serves_bias() -> bool:
    return _serves_bias


def ape_batch(rids: Sequence[str] | None) -> ApeBatch | None:
    """The batch of these requests, None if no request of it is an APE request.

    Raises:
        RuntimeError: the batch is not the one announced last; attending to an APE row as if it
            were plain would give a wrong answer without a sign.
    """
    if rids is None or _batch is None:
        return None
    if list(rids) != _rids:
        raise RuntimeError(
            f"attention was planned for requests {list(rids)} but positions were computed for "
            f"{_rids}; {_OUT_OF_STEP}"
        )
    return _batch


def ape_batch_of_size(size: int) -> ApeBatch | None:
    """As :func:`ape_batch` where request ids do not arrive: replay of a decode graph.

    Raises:
        RuntimeError: the batch announced last has another size.
    """
    if _batch is not None and len(_rids) != size:
        raise RuntimeError(
            f"attention was planned for {size} requests but positions were computed for "
            f"{len(_rids)}; {_OUT_OF_STEP}"
        )
    return _batch


_OUT_OF_STEP = "the hook on ForwardBatch.init_new and the attention backend are out of step"


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


def reader_of(req: Any, spec: ApeSpec, whole: Hashable) -> Reader:
    """The contexts of a running request by their nodes in the tree; kept on the request.

    A node stands for its whole path, and so for the adapter, the tenant, P and the context. Where
    the tree does not hold all contexts to their ends yet, or there is no tree, only the whole set
    has a name, ``whole``.
    """
    handle = req.last_node
    kept: tuple[Any, ApeSpec, Reader] | None = getattr(req, "ape_reader", None)
    if kept is not None and kept[0] is handle and kept[1] is spec:
        return kept[2]
    nodes = None
    if req.cache_protected_len >= spec.context_end:  # else the last node may lie inside of one
        nodes = getattr(handle, "contexts", None)  # of ``cache.tree.Handle``
    reader = Reader.of(spec, nodes, whole, _prefix_of(req, spec))
    req.ape_reader = (handle, spec, reader)
    return reader


def _prefix_of(req: Any, spec: ApeSpec) -> Hashable:
    """What tells apart the KV of P."""
    if spec.prefix_len == 0:
        return None
    ids = np.asarray(req.origin_input_ids[: spec.prefix_len], np.int64)
    return req.extra_key, hashlib.sha256(ids.tobytes()).digest()


def after_init_new(forward_batch: Any, _cls: type, batch: Any, model_runner: Any, **_: Any) -> None:
    """AFTER hook on ``ForwardBatch.init_new``: give APE rows their positions."""
    if not model_runner.server_args.enable_ape:
        return
    specs = [spec_of(req) for req in batch.reqs]
    if not any(specs):
        begin_batch([], None)
        return
    is_decode = forward_batch.forward_mode.is_decode()
    starts = None if is_decode else forward_batch.extend_prefix_lens_cpu
    _announce(batch.reqs, specs, starts)
    positions = forward_batch.positions
    if positions is None or positions.numel() == 0:
        return
    if starts is None:
        hidden = torch.tensor([spec.hidden_tokens if spec else 0 for spec in specs])
        forward_batch.positions = positions - _beside(positions, hidden)
        return
    stops = [a + n for a, n in zip(starts, forward_batch.extend_seq_lens_cpu, strict=True)]
    computed = torch.from_numpy(positions_of(specs, starts, stops))
    forward_batch.positions = _beside(positions, computed)


def _still_asking(spec: ApeSpec | None, start: float) -> ApeSpec | None:
    """A scoring request generates nothing, but while its end is not known yet, a batch that
    overlaps with that has a row for it behind its last one. Nobody reads the row: it may attend
    like a plain one.
    """
    if spec is None or spec.row_len is None or start < spec.row_len:
        return spec
    return None


def _announce(
    reqs: Sequence[Any], specs: Sequence[ApeSpec | None], starts: Sequence[int] | None
) -> None:
    """``starts``: the first new row of each request; None in a decode step."""
    begins: Sequence[float] = [math.inf] * len(specs) if starts is None else starts
    specs = [_still_asking(*one) for one in zip(specs, begins, strict=True)]
    if not any(specs):
        begin_batch([], None)
        return
    # SGLang's cache key separates tenants and LoRA adapters, whose KV differs.
    sets = [
        (req.extra_key, spec.namespace) if spec else None
        for req, spec in zip(reqs, specs, strict=True)
    ]
    readers: list[Reader | None] = []
    masses: list[AttentionMass | None] = []
    if starts is None:
        readers = [
            reader_of(req, spec, whole) if spec else None
            for req, spec, whole in zip(reqs, specs, sets, strict=True)
        ]
    else:
        masses = [_mass_of(*one) for one in zip(reqs, specs, starts, strict=True)]
    begin_batch([req.rid for req in reqs], ApeBatch(specs, sets, readers, masses))


def _mass_of(req: Any, spec: ApeSpec | None, start: int) -> AttentionMass | None:
    """What is collected of a measured request; kept on it from its first row of Q to its last."""
    if not isinstance(spec, ProbeSpec):
        return None
    if start <= spec.context_end:
        req.ape_mass = AttentionMass(spec.query_len, spec.null_len)
    return req.ape_mass


def _beside(positions: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """``host`` on the device of ``positions``, without waiting for what runs there."""
    if positions.is_cuda:
        host = host.pin_memory()
    return host.to(positions, non_blocking=True)
