"""The APE side of a scheduler request (``managers/schedule_batch.py: Req``)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from sglang_ape.spec import ApeSpec


def spec_of(req: Any) -> ApeSpec | None:
    """The spec of a request in its present row order, None for a plain one.

    An aborted request carries a one-token stub instead of its row
    (``Req.set_finish_with_abort``) and counts as plain.
    """
    if not hasattr(req, "ape_spec"):
        req.ape_spec = _read_spec(req)
    spec = req.ape_spec
    if spec is None or len(req.origin_input_ids) <= spec.context_end:
        return None
    return spec


def _read_spec(req: Any) -> ApeSpec | None:
    """SGLang adds the request itself to its custom parameters, for a custom logit processor.

    Without a processor that only keeps finished requests, with their tokens and nodes of the tree,
    in memory until the next full garbage collection, which a large process seldom has.
    """
    params = req.sampling_params.custom_params
    spec = ApeSpec.from_custom_params(params)
    if spec is not None and req.custom_logit_processor is None:
        params.pop("__req__", None)
    return spec


def reorder_contexts(req: Any, spec: ApeSpec, order: Sequence[int]) -> ApeSpec:
    """Put context ``order[k]`` at place k of the request's row.

    Allowed only while no row is allocated (``req.req_pool_idx is None``): afterwards slots and
    tokens would part.
    """
    lens, starts = spec.context_lens, spec.context_starts

    def permuted(ids: array) -> array:
        out = ids[:]
        source, target, at = memoryview(ids), memoryview(out), spec.prefix_len
        for i in order:
            target[at : at + lens[i]] = source[starts[i] : starts[i] + lens[i]]
            at += lens[i]
        return out

    shared = req.origin_input_ids_unpadded is req.origin_input_ids
    req.origin_input_ids = permuted(req.origin_input_ids)
    if shared:
        req.origin_input_ids_unpadded = req.origin_input_ids
    if len(req.full_untruncated_fill_ids) >= spec.context_end:
        req.full_untruncated_fill_ids = permuted(req.full_untruncated_fill_ids)
    req.ape_spec = spec.reordered(order)
    return req.ape_spec
