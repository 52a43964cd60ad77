"""The work of one attention launch over rectangles, laid out as FlashInfer's paged kernel reads it.

A rectangle is a group of rows over a group of pages; a row may stand in several (*virtual rows*).
Its pages are cut into *chunks*; a chunk over a tile of rows is an *item*, which is one thread block
for each KV head and leaves a partial state for each of its rows.

Sources: ``PrefillPlanInfo`` and ``PrefillSplitQOKVIndptr`` in
``flashinfer/attention/scheduler.cuh``, and the kernel that reads their lists,
``BatchPrefillWithPagedKVCacheDevice`` in ``flashinfer/attention/prefill.cuh`` (0.6.15). Here the
lists are for its mode without split KV, in which a block computes the whole range of a group and
writes the state where ``o_indptr`` says: each chunk is a group of its own. The ranges of groups
need not be adjacent: chunk c is the kernel's group 2c, whose bounds are entries 2c and 2c + 1 of
each list. The last pair is empty; items that only fill up a captured launch belong to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TILES = (16, 64, 128)
"""Packed rows of a tile for which the kernel is compiled (``FA2DetermineCtaTileQ``)."""

_ROUNDS = 4  # at most so many thread blocks, one after the other, in each place of the GPU
_CHUNK_TOKENS = 64  # a multiple of the tokens that the kernel reads at once
_NEVER_SPLIT = 1 << 30


class WorkSizes(NamedTuple):
    """What a captured launch is made for."""

    tile: int  # packed rows, one of TILES
    items: int  # and chunks
    states: int  # and virtual rows


class Groups(NamedTuple):
    """Rectangles: the rows and the pages of each, as ``plan`` takes a level. All int32."""

    qo_indptr: np.ndarray  # (groups + 1,) into ``rows``
    rows: np.ndarray  # (virtual rows,) which row of the batch
    kv_indptr: np.ndarray  # (groups + 1,) into the page indices
    last_page_len: np.ndarray  # (groups,)


class Shape(NamedTuple):
    """What the layout depends on beside the rectangles."""

    rows: int  # of the batch
    group_size: int  # query heads for each KV head; a row is so many packed rows
    page_size: int
    slots: int  # thread blocks of one KV head that the GPU runs at once


class WorkList(NamedTuple):
    """One launch, its queries and its states; int32 arrays."""

    tile: int
    query_row: np.ndarray  # (virtual rows,) the row of the batch that a query is copied from
    item_group: np.ndarray  # (items,) the kernel's group: twice the chunk
    item_tile: np.ndarray  # (items,) the tile among those of the rectangle
    qo_indptr: np.ndarray  # (2 * chunks + 2,) bounds among the virtual rows
    kv_indptr: np.ndarray  # (2 * chunks + 2,) bounds among the page indices
    last_page_len: np.ndarray  # (2 * chunks + 2,)
    state_start: np.ndarray  # (2 * chunks + 2,) first state
    rectangle: np.ndarray  # (2 * chunks + 2,) the chunk's rectangle, 0 for the empty pair
    state_indptr: np.ndarray  # (rows + 1,) a row's states are state_index[indptr[i]:indptr[i + 1]]
    state_index: np.ndarray  # (states,)

    @property
    def states(self) -> int:
        return len(self.state_index)

    def padded(self, sizes: WorkSizes) -> WorkList:
        """The same work in lists of fixed lengths.

        Raises:
            ValueError: it does not fit.
        """
        chunks = len(self.qo_indptr) // 2 - 1
        needed = WorkSizes(
            self.tile, max(len(self.item_group), chunks), max(len(self.query_row), self.states)
        )
        if needed.tile != sizes.tile or needed.items > sizes.items or needed.states > sizes.states:
            raise ValueError(f"work of {needed} does not fit a launch captured for {sizes}")
        bounds = 2 * sizes.items + 2
        return WorkList(
            self.tile,
            _pad(self.query_row, sizes.states, 0),
            _pad(self.item_group, sizes.items, bounds - 2),
            _pad(self.item_tile, sizes.items, 0),
            _pad(self.qo_indptr, bounds, 0),
            _pad(self.kv_indptr, bounds, int(self.kv_indptr[-1])),
            _pad(self.last_page_len, bounds, 1),
            _pad(self.state_start, bounds, 0),
            _pad(self.rectangle, bounds, 0),
            self.state_indptr,
            _pad(self.state_index, sizes.states, 0),
        )


def smallest_tile(packed_rows: int, head_dim: int) -> int:
    """The smallest tile that holds so many packed rows, or the largest there is."""
    tiles = TILES if head_dim < 256 else TILES[:-1]
    return next((tile for tile in tiles if tile >= packed_rows), tiles[-1])


def captured_sizes(
    shape: Shape, head_dim: int, num_qo_heads: int, itemsize: int, nbytes: int
) -> WorkSizes:
    """Sizes for every cover of a batch of ``shape.rows`` that fits buffers of ``nbytes``.

    The buffers hold a query and a state for each virtual row.
    """
    state = num_qo_heads * (2 * head_dim * itemsize + 4)
    return WorkSizes(
        smallest_tile(shape.rows * shape.group_size, head_dim),
        _ROUNDS * shape.slots + shape.rows,
        min(nbytes // state, 8192),
    )


def make_work_list(
    groups: Groups, shape: Shape, tile: int, sizes: WorkSizes | None = None
) -> WorkList:
    """Cut rectangles into items.

    Args:
        groups: rectangles; those without rows or without pages give no work.
        shape: of the batch and the GPU.
        tile: packed rows of a tile, one of ``TILES``.
        sizes: limits that chunks are chosen within, if there are any.

    Raises:
        ValueError: the rectangles do not fit ``sizes`` even if none is cut.
    """
    lens, pages = np.diff(groups.qo_indptr), np.diff(groups.kv_indptr)
    live = np.flatnonzero((lens > 0) & (pages > 0))
    lens, pages = lens[live], pages[live]
    tiles = _ceil_div(lens * shape.group_size, tile)
    length, chunks = _chunks(lens, pages, tiles, shape, sizes)

    of = np.repeat(np.arange(len(live)), chunks)  # the rectangle of each chunk
    begin = groups.kv_indptr[live[of]] + _counts(chunks) * length[of]
    end = np.minimum(begin + length[of], groups.kv_indptr[live[of] + 1])
    is_last = end == groups.kv_indptr[live[of] + 1]
    last_page_len = np.where(is_last, groups.last_page_len[live[of]], shape.page_size)
    state_start = np.cumsum(lens[of]) - lens[of]
    first_row = groups.qo_indptr[live[of]]

    item_chunk, item_tile = np.repeat(np.arange(len(of)), tiles[of]), _counts(tiles[of])
    longest_first = np.argsort((begin - end)[item_chunk], kind="stable")
    row_of_state = groups.rows[np.repeat(first_row, lens[of]) + _counts(lens[of])]
    return WorkList(
        tile,
        _int32(groups.rows),
        _int32(2 * item_chunk[longest_first]),
        _int32(item_tile[longest_first]),
        _pairs(first_row, first_row + lens[of], 0),
        _pairs(begin, end, int(groups.kv_indptr[-1])),
        _pairs(last_page_len, last_page_len, 1),
        _pairs(state_start, state_start, 0),
        _pairs(live[of], live[of], 0),
        _int32(np.append(0, np.cumsum(np.bincount(row_of_state, minlength=shape.rows)))),
        _int32(np.argsort(row_of_state, kind="stable")),
    )


def _chunks(
    lens: np.ndarray, pages: np.ndarray, tiles: np.ndarray, shape: Shape, sizes: WorkSizes | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pages of a chunk and number of chunks of each rectangle: the cheapest of a few candidates.

    Shorter chunks fill the GPU more evenly and leave more states to be written and merged. The
    unit of cost is a token that a thread block reads; a row's state, written and read again, is
    about as long as ``group_size`` tokens.
    """
    step = max(_CHUNK_TOKENS // shape.page_size, 1)
    best, best_cost = None, float("inf")
    for longest in (_NEVER_SPLIT, *_candidates(pages, tiles, shape, step)):
        length = _ceil_div(_ceil_div(pages, _ceil_div(pages, longest)), step) * step
        chunks = _ceil_div(pages, length)
        items, states = int((tiles * chunks).sum()), int((lens * chunks).sum())
        if sizes is not None and (items > sizes.items or states > sizes.states):
            continue
        cost = _tokens_of_the_last(np.minimum(length, pages), tiles * chunks, shape)
        cost += shape.group_size * states / shape.slots
        if cost < best_cost:
            best, best_cost = (length, chunks), cost
    if best is None:
        raise ValueError(f"{len(pages)} rectangles of {int(lens.sum())} rows do not fit {sizes}")
    return best


def _tokens_of_the_last(lengths: np.ndarray, items: np.ndarray, shape: Shape) -> float:
    """An upper bound of what the busiest place of the GPU reads, longest items first.

    The lower of two: rounds that each take as long as their longest item, and all work spread
    evenly with one longest item on top.
    """
    each = np.sort(np.repeat(lengths, items))[::-1] * shape.page_size
    if len(each) == 0:
        return 0.0
    spread = each.sum() / shape.slots + each[0] * (1 - 1 / shape.slots)
    return float(min(each[:: shape.slots].sum(), spread))


def _candidates(pages: np.ndarray, tiles: np.ndarray, shape: Shape, step: int) -> list[int]:
    """The shortest chunks that make no more items than run in 1, 2, ... rounds."""
    found = []
    for rounds in range(1, _ROUNDS + 1):
        low, high = 1, int(pages.max(initial=1)) // step + 1  # in steps
        while low < high:
            middle = (low + high) // 2
            if int((tiles * _ceil_div(pages, middle * step)).sum()) > rounds * shape.slots:
                low = middle + 1
            else:
                high = middle
        found.append(low * step)
    return found


def _ceil_div(values: np.ndarray, by: np.ndarray | int) -> np.ndarray:
    return -(-values // by)


def _counts(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _pairs(first: np.ndarray, second: np.ndarray, last: int) -> np.ndarray:
    pairs = np.stack([first, second], axis=1).ravel()
    return _int32(np.append(pairs, [last, last]))


def _pad(values: np.ndarray, size: int, value: int) -> np.ndarray:
    return _int32(np.pad(values, (0, size - len(values)), constant_values=value))


def _int32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)
