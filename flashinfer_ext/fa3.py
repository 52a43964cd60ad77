"""The lists that FlashInfer's FA3 kernel, for Hopper, reads its work from.

One thread block runs on each multiprocessor and works through a list of its own, whose entries name
a tile of queries, a range of keys and a head. Sources: ``BatchPrefillPersistentTileScheduler`` in
``flashinfer/attention/hopper/tile_scheduler.cuh``, ``PrefillPlanSM90Info`` and ``PrefillSM90Plan``
in ``flashinfer/attention/scheduler.cuh`` (0.6.15). FlashInfer never splits keys there; here, each
chunk is a range of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flashinfer_ext.worklist import Work, WorkSizes, counts, padded

TILES = {64: 192, 128: 128, 256: 128}
"""Packed rows of a tile by head dimension (``BatchPrefillWithPagedKVCacheDispatched``)."""

BLOCKS_PER_PROCESSOR = 1
MOST_ROUNDS = 16  # of a captured launch: room in its lists, no more


def lists_of(
    work: Work, group_size: int, heads: int, page_size: int, blocks: int, sizes: WorkSizes | None
) -> dict[str, np.ndarray]:
    """The lists; an entry is an item of one KV head, its "batch" is the chunk.

    Args:
        work: any.
        group_size: packed rows of a row.
        heads: KV heads.
        page_size: tokens of a page.
        blocks: of the grid, which is as many as the GPU has multiprocessors.
        sizes: what the launch was captured for, if it was: gives lists of fixed lengths.
    """
    # Tiles of one chunk and head stand side by side: they read the same keys at the same time.
    is_first = np.flatnonzero(work.item_tile == 0)
    chunk, tiles = work.item_chunk[is_first], np.diff(is_first, append=len(work.item_tile))
    of = np.repeat(np.arange(len(chunk)), tiles * heads)
    within = counts(tiles * heads)
    chunk, head, tile = chunk[of], within // tiles[of], within % tiles[of]
    kv_len = (work.end - work.begin - 1) * page_size + work.last_page_len

    block = _blocks_of(kv_len[chunk], blocks)
    order = np.argsort(block, kind="stable")
    chunk, head, tile = chunk[order], head[order], tile[order]
    entries = len(chunk) if sizes is None else sizes.items * heads
    lists = {
        "qo_tile_indices": tile,
        "qo_indptr": work.state_start[chunk] * group_size,
        "kv_indptr": work.begin[chunk],
        "qo_len": work.rows[chunk] * group_size,
        "kv_len": kv_len[chunk],
        "head_indices": head,
        "batch_indices": chunk,
    }
    lists = {name: padded(values, entries, 0) for name, values in lists.items()}
    lists["work_indptr"] = np.append(0, np.cumsum(np.bincount(block, minlength=blocks)))
    return lists


def plan_info(offset: Mapping[str, int]) -> list[int]:
    """FlashInfer's ``PrefillPlanSM90Info``, in the order of its ``ToVector``; offsets in bytes."""
    names = ("qo_tile_indices", "qo_indptr", "kv_indptr", "qo_len", "kv_len", "head_indices")
    lists = [offset[name] for name in (*names, "work_indptr", "batch_indices")]
    return [*lists, 0]  # each head has entries of its own


def _blocks_of(lengths: np.ndarray, blocks: int) -> np.ndarray:
    """Which thread block takes each entry; entries come longest first.

    In each round the longest of those left goes to the block with the least to read so far.
    """
    found = np.empty(len(lengths), np.int64)
    load = np.zeros(blocks, np.int64)
    for first in range(0, len(lengths), blocks):
        some = lengths[first : first + blocks]
        idle = np.argsort(load, kind="stable")[: len(some)]
        found[first : first + blocks] = idle
        load[idle] += some
    return found
