"""The lists that FlashInfer's FA2 kernel reads its work from.

Sources: ``PrefillPlanInfo`` and ``PrefillSplitQOKVIndptr`` in
``flashinfer/attention/scheduler.cuh``, and ``BatchPrefillWithPagedKVCacheDevice`` in
``flashinfer/attention/prefill.cuh`` (0.6.15). Here they are for the mode without split KV, in which
a thread block computes the whole range of a group and writes the state where ``o_indptr`` says:
each chunk is a group of its own. Ranges of groups need not be adjacent: chunk c is the kernel's
group 2c, whose bounds are entries 2c and 2c + 1 of each list. The last pair is empty; items that
only fill up a captured launch belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flashinfer_ext.worklist import Work, WorkSizes, padded

TILES = (16, 64, 128)
"""Packed rows of a tile for which the kernel is compiled (``FA2DetermineCtaTileQ``)."""

BLOCKS_PER_PROCESSOR = 2
MOST_ROUNDS = 4  # of a captured launch: items that only fill it up cost a little each

_WHOLE_GROUP = 1 << 30  # chunk length, which must not be 0; not used without split KV


def tile_for(packed_rows: int, head_dim: int) -> int:
    """The smallest tile that holds so many packed rows, or the largest there is."""
    tiles = TILES if head_dim < 256 else TILES[:-1]
    return next((tile for tile in tiles if tile >= packed_rows), tiles[-1])


def lists_of(work: Work, group_size: int, sizes: WorkSizes | None) -> dict[str, np.ndarray]:
    """The lists; chunk c is the kernel's group 2c.

    Args:
        work: any.
        group_size: packed rows of a row.
        sizes: what the launch was captured for, if it was: gives lists of fixed lengths.
    """
    chunks = len(work.rectangle) if sizes is None else sizes.items
    items = len(work.item_chunk) if sizes is None else sizes.items
    first = work.state_start * group_size

    def pairs(left: np.ndarray, right: np.ndarray, empty: int) -> np.ndarray:
        given = np.stack([left, right], axis=1).ravel()
        return padded(given, 2 * chunks + 2, empty)

    last_page = int(work.end.max(initial=0))
    return {
        "item_group": padded(2 * work.item_chunk, items, 2 * chunks),
        "item_tile": padded(work.item_tile, items, 0),
        "item_kv_tile": np.zeros(items, np.int32),
        "qo_indptr": pairs(first, first + work.rows * group_size, 0),
        "kv_indptr": pairs(work.begin, work.end, last_page),
        "last_page_len": pairs(work.last_page_len, work.last_page_len, 1),
        "o_indptr": pairs(first, first, 0),
        "kv_chunk_size": np.array([_WHOLE_GROUP]),
    }


def plan_info(offset: Mapping[str, int], tile: int, items: int) -> list[int]:
    """FlashInfer's ``PrefillPlanInfo``, in the order of its ``ToVector``; offsets in bytes."""
    return [
        items,  # blocks of the grid
        0,  # rows in all and where that number lies: of split KV
        0,
        tile,
        offset["item_group"],
        offset["item_tile"],
        offset["item_kv_tile"],
        0,  # merge lists of split KV
        offset["o_indptr"],
        offset["kv_chunk_size"],
        0,  # workspace and valid blocks of split KV
        0,
        0,
        0,  # CUDA graph: says where the number of rows lies
        0,  # no split KV
    ]
