"""The work of one attention launch over rectangles: chunks, items, and who reads which state.

A rectangle is a group of rows over a group of pages. Its pages are cut into *chunks*. A chunk
leaves a partial state for each row of its rectangle, and a row's query stands where its state does:
once for each chunk. A query is packed: the query heads of one KV head are rows of their own, so
that a *tile* of packed rows fills a thread block. A chunk over a tile is an *item*, the work of one
thread block for each KV head. How a kernel is told of its items is the matter of ``fa2`` and
``fa3``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_ROUNDS = 4  # chunks are at least as long as makes so many thread blocks, one after the other
_CHUNK_TOKENS = 64  # a multiple of the tokens that the kernels read at once
_ITEM_TOKENS = 128  # beginning and ending an item takes as long as reading so many
_NEVER_SPLIT = 1 << 30
_MOST_STATES = 8192


class WorkSizes(NamedTuple):
    """What a captured launch is made for."""

    tile: int  # packed rows
    items: int  # and chunks
    states: int


class Groups(NamedTuple):
    """Rectangles: the rows and the pages of each, as ``plan`` takes a level. int32 but for two."""

    qo_indptr: np.ndarray  # (groups + 1,) into ``rows``
    rows: np.ndarray  # (virtual rows,) which row of the batch
    kv_indptr: np.ndarray  # (groups + 1,) into the page indices
    last_page_len: np.ndarray  # (groups,)
    in_path: np.ndarray  # (groups,) bool: belongs to the paths of its rows, not to their contexts
    bias: np.ndarray  # (virtual rows,) fp32, natural: added to the log-sum-exp of what it reads


class Shape(NamedTuple):
    """What the work depends on beside the rectangles."""

    rows: int  # of the batch
    group_size: int  # query heads for each KV head; a row is so many packed rows
    page_size: int
    slots: int  # thread blocks of one KV head that the GPU runs at once


class Work(NamedTuple):
    """One launch; integer arrays."""

    tile: int
    rectangle: np.ndarray  # (chunks,) index into the groups
    rows: np.ndarray  # (chunks,) how many
    state_start: np.ndarray  # (chunks,) where its states, and queries, begin
    begin: np.ndarray  # (chunks,) first page index
    end: np.ndarray  # (chunks,)
    last_page_len: np.ndarray  # (chunks,)
    item_chunk: np.ndarray  # (items,) longest first, tiles of a chunk side by side
    item_tile: np.ndarray  # (items,) the tile among those of the chunk
    state_row: np.ndarray  # (states,) the row of the batch that a query is copied from
    state_indptr: np.ndarray  # (rows + 1,) a row's states are state_index[indptr[i]:indptr[i + 1]]
    path_start: np.ndarray  # (rows,) where those of its path begin, behind those of its contexts
    state_index: np.ndarray  # (states,)
    state_bias: np.ndarray  # (states,) fp32, natural, in the order of ``state_index``

    def check_fits(self, sizes: WorkSizes) -> None:
        """Raises: ValueError: a captured launch of these sizes cannot do it."""
        needed = WorkSizes(self.tile, len(self.item_chunk), len(self.state_row))
        if needed.tile != sizes.tile or needed.items > sizes.items or needed.states > sizes.states:
            raise ValueError(f"work of {needed} does not fit a launch captured for {sizes}")


def state_capacity(num_qo_heads: int, head_dim: int, itemsize: int, nbytes: int) -> int:
    """States whose queries, outputs and log-sum-exps fit a space of ``nbytes``."""
    return min(nbytes // (num_qo_heads * (2 * head_dim * itemsize + 4)), _MOST_STATES)


def make_work(groups: Groups, shape: Shape, tile: int, sizes: WorkSizes | None = None) -> Work:
    """Cut rectangles into items.

    Args:
        groups: rectangles; those without rows or without pages give no work.
        shape: of the batch and the GPU.
        tile: packed rows of a tile.
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
    begin = groups.kv_indptr[live[of]] + counts(chunks) * length[of]
    end = np.minimum(begin + length[of], groups.kv_indptr[live[of] + 1])
    is_last = end == groups.kv_indptr[live[of] + 1]
    rows = lens[of]

    longest_first = np.argsort(begin - end, kind="stable")
    place = np.repeat(groups.qo_indptr[live[of]], rows) + counts(rows)  # the virtual row
    row_of_state = groups.rows[place]
    in_path = np.repeat(groups.in_path[live[of]], rows)
    state_indptr = np.append(0, np.cumsum(np.bincount(row_of_state, minlength=shape.rows)))
    state_index = np.argsort(2 * row_of_state + in_path, kind="stable")
    return Work(
        tile,
        rectangle=live[of],
        rows=rows,
        state_start=np.cumsum(rows) - rows,
        begin=begin,
        end=end,
        last_page_len=np.where(is_last, groups.last_page_len[live[of]], shape.page_size),
        item_chunk=np.repeat(longest_first, tiles[of][longest_first]),
        item_tile=counts(tiles[of][longest_first]),
        state_row=row_of_state,
        state_indptr=state_indptr,
        path_start=state_indptr[1:] - np.bincount(row_of_state[in_path], minlength=shape.rows),
        state_index=state_index,
        state_bias=groups.bias[place[state_index]],
    )


def counts(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def padded(values: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=value)


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
        tokens = np.minimum(length, pages) * shape.page_size + _ITEM_TOKENS
        cost = _tokens_of_the_last(tokens, tiles * chunks, shape)
        cost += shape.group_size * states / shape.slots
        if cost < best_cost:
            best, best_cost = (length, chunks), cost
    if best is None:
        raise ValueError(f"{len(pages)} rectangles of {int(lens.sum())} rows do not fit {sizes}")
    return best


def _tokens_of_the_last(tokens: np.ndarray, items: np.ndarray, shape: Shape) -> float:
    """An upper bound of what the busiest place of the GPU reads, longest items first.

    The lower of two: rounds that each take as long as their longest item, and all work spread
    evenly with one longest item on top.
    """
    each = np.sort(np.repeat(tokens, items))[::-1]
    if len(each) == 0:
        return 0.0
    spread = each.sum() / shape.slots + each[0] * (1 - 1 / shape.slots)
    return float(min(each[:: shape.slots].sum(), spread))


def _candidates(pages: np.ndarray, tiles: np.ndarray, shape: Shape, step: int) -> list[int]:
    """The shortest chunks that make no more items than run in 1, 2, ... rounds."""
    longest, total = int(pages.max(initial=1)), int((tiles * pages).sum())
    found = []
    for rounds in range(1, _ROUNDS + 1):
        room = rounds * shape.slots
        low = high = max(total // (room * step), 1)  # in steps; less makes too many for sure
        while high * step < longest and _items(tiles, pages, high * step) > room:
            low, high = high + 1, 2 * high
        while low < high:
            middle = (low + high) // 2
            if _items(tiles, pages, middle * step) > room:
                low = middle + 1
            else:
                high = middle
        found.append(low * step)
    return found


def _items(tiles: np.ndarray, pages: np.ndarray, length: int) -> int:
    return int((tiles * _ceil_div(pages, length)).sum())


def _ceil_div(values: np.ndarray, by: np.ndarray | int) -> np.ndarray:
    return -(-values // by)
