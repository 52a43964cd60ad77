"""Covers of a decode batch by rectangles: groups of requests over contexts that all of them read.

The contexts pass has no order, so it may be cut anywhere: a set of rectangles in which every pair
of a request and one of its contexts stands exactly once gives the same result, and reads a context
once for all the rows of a rectangle. What is read, and what is written and merged for it, decides
between covers (:class:`CostModel`). The design is in ``docs/cascade.md``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sglang_ape.spec import ApeSpec

_APART_TILE = 16  # packed rows of a tile in a graph with a group for each row


class Rates(NamedTuple):
    """How fast one GPU reads and computes; the defaults are FlashInfer's FA2 kernel on an H100.

    Memory was measured by a copy; the others are fitted to ``benchmarks.cascade_kernels``
    (``docs/cascade.md``).
    """

    memory: float = 2.95e12  # bytes a second, the first time that a launch reads a token
    cache: float = 8.6e12  # any further time
    operations: float = 3.0e14  # of the attention kernel, a second
    rectangle: float = 2e-7  # seconds: thread blocks that begin and end
    prefix: float = 4e-6  # seconds by which a P of few tokens lengthens a launch it fits badly
    launch: float = 2.5e-5  # seconds of the shared launches that those without rectangles lack
    eager: float = 1e-4  # likewise in prefill, where the host launches them


HOPPER_RATES = Rates(operations=5e14, launch=1.5e-5)
"""FlashInfer's FA3 kernel on an H100."""


@dataclass(frozen=True)
class CostModel:
    """Seconds that one layer's contexts pass takes, for one rank."""

    token_bytes: int  # keys and values of one token
    state_bytes: int  # output and log-sum-exp of one row
    group_size: int  # query heads for each KV head: packed rows of a row
    row_operations: int  # of a packed row over one token, in all KV heads
    tile: int  # packed rows of a tile of the shared launch
    rates: Rates

    @classmethod
    def of(
        cls,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_itemsize: int,
        tile: int,
        rates: Rates,
    ) -> CostModel:
        """The model for one rank's heads."""
        return cls(
            token_bytes=2 * num_kv_heads * head_dim * kv_itemsize,
            state_bytes=num_qo_heads * (2 * head_dim + 4),
            group_size=num_qo_heads // num_kv_heads,
            row_operations=4 * num_kv_heads * head_dim,
            tile=tile,
            rates=rates,
        )

    def with_free_sharing(self) -> CostModel:
        """The same, but only what is read costs anything."""
        memory = self.rates.memory
        rates = Rates(memory, cache=memory, rectangle=0, prefix=0, launch=0, eager=0)
        return replace(self, state_bytes=0, row_operations=0, rates=rates)

    def alone(self, rows: int, tokens: int) -> float:
        """One request's new rows over its contexts in FlashInfer's FA2 launch."""
        packed = rows * self.group_size
        tile = next((tile for tile in (16, 64) if tile >= packed), 128)
        seconds = tile * self.row_operations / Rates().operations
        first = max(self.token_bytes / self.rates.memory, seconds)
        again = max(self.token_bytes / self.rates.cache, seconds)
        return tokens * (first + (self.tiles(rows, tile) - 1) * again)

    @cached_property
    def first(self) -> float:
        """A tile of the shared launch over a token that comes from memory."""
        return max(self.token_bytes / self.rates.memory, self._tile_seconds)

    @cached_property
    def again(self) -> float:
        """The same over a token that was read before."""
        return max(self.token_bytes / self.rates.cache, self._tile_seconds)

    @cached_property
    def state(self) -> float:
        """A row of a rectangle: its query is copied, its state written and read."""
        return 4 * self.state_bytes / self.rates.cache

    @cached_property
    def _tile_seconds(self) -> float:
        return self.tile * self.row_operations / self.rates.operations

    def tiles(self, rows: int, tile: int | None = None) -> int:
        return -(-rows * self.group_size // (tile or self.tile))

    def rectangle(self, rows: int, fresh: int, repeated: int) -> float:
        """A rectangle over tokens read for the first time, and tokens read before."""
        tiles = self.tiles(rows)
        read = fresh * (self.first + (tiles - 1) * self.again) + repeated * tiles * self.again
        return read + self.rates.rectangle + rows * self.state

    def apart(self, distinct: int, read: int) -> float:
        """The launches without rectangles, which read so many tokens, some more than once."""
        return (distinct / self.rates.memory + (read - distinct) / self.rates.cache) * (
            self.token_bytes
        )


@dataclass(frozen=True, eq=False)
class Reader:
    """The contexts of one request; compared by identity, so keep one for as long as it runs.

    Contexts with equal keys hold the same KV and are read at the same temperature. They lie back to
    back from column ``start`` of the request's page-table line on.
    """

    keys: tuple[Hashable, ...]  # each once
    lengths: tuple[int, ...]
    start: int  # and so the length of P
    prefix: Hashable = None  # what tells apart the KV of P, None if unknown
    # Of each key; empty: none. None: one that is not the same all over what is one key here.
    bias: tuple[float, ...] | None = ()

    @classmethod
    def of(
        cls,
        spec: ApeSpec,
        contexts: Sequence[Hashable] | None,
        whole: Hashable,
        prefix: Hashable = None,
    ) -> Reader:
        """The reader of a request.

        Args:
            spec: its segments, and T.
            contexts: what tells apart the KV of each context, in row order; None if unknown.
            whole: what tells apart all of them together, T and S included.
            prefix: what tells apart the KV of P.
        """
        if contexts is None:
            bias = None if spec.bias else ()
            return cls((whole,), (sum(spec.context_lens),), spec.prefix_len, prefix, bias)
        # A context that is given twice counts twice.
        seen: dict[Hashable, int] = {}
        keys = []
        for context in contexts:
            occurrence = seen[context] = seen.get(context, -1) + 1
            keys.append((spec.temperature, context, occurrence))
        return cls(tuple(keys), spec.context_lens, spec.prefix_len, prefix, spec.bias)

    @cached_property
    def whole(self) -> frozenset[Hashable]:
        """Equal for readers that one group of the launches without rectangles can serve."""
        if not self.bias:
            return frozenset(self.keys)
        return frozenset(zip(self.keys, self.bias, strict=True))

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def place(self) -> dict[Hashable, int]:
        return {key: i for i, key in enumerate(self.keys)}

    def bias_of(self, key: Hashable) -> float:
        return self.bias[self.place[key]] if self.bias else 0.0

    def runs(self, keys: Sequence[Hashable]) -> list[tuple[int, int]]:
        """Columns ``(start, length)`` of these contexts, neighbours as one run."""
        if len(keys) == len(self.keys):
            return [(self.start, self.tokens)]
        places = sorted([self.place[key] for key in keys])
        runs: list[tuple[int, int]] = []
        for place in places:
            start, length = self._starts[place], self.lengths[place]
            if runs and sum(runs[-1]) == start:
                start, length = runs[-1][0], runs.pop()[1] + length
            runs.append((start, length))
        return runs

    @cached_property
    def _starts(self) -> list[int]:
        return [self.start, *(np.cumsum(self.lengths[:-1]) + self.start).tolist()]


class Cover(NamedTuple):
    """Rectangles over a batch; int32 arrays. Rows are indices of the batch.

    Segments are runs of page-table columns; those of a rectangle stand one after the other. A
    rectangle is of contexts, or of one P, which its rows then lack in their paths. A bias is of
    contexts (natural logarithm), and 0 for a P.
    """

    qo_indptr: np.ndarray  # (rectangles + 1,) into ``rows``
    rows: np.ndarray  # (virtual rows,) ascending within a rectangle
    kv_indptr: np.ndarray  # (rectangles + 1,) tokens
    is_prefix: np.ndarray  # (rectangles,) bool
    segment_row: np.ndarray  # (segments,) whose line of the page table
    segment_start: np.ndarray  # (segments,) first column
    segment_length: np.ndarray  # (segments,)
    bias: np.ndarray  # (virtual rows,) fp32: of all that the row reads in this rectangle
    seconds: float  # of one layer, by the model
    seconds_apart: float  # the same without rectangles


_NOTHING = np.empty(0, np.int32)
EMPTY_COVER = Cover(
    qo_indptr=np.zeros(1, np.int32),
    rows=_NOTHING,
    kv_indptr=np.zeros(1, np.int32),
    is_prefix=np.empty(0, np.bool_),
    segment_row=_NOTHING,
    segment_start=_NOTHING,
    segment_length=_NOTHING,
    bias=np.empty(0, np.float32),
    seconds=0.0,
    seconds_apart=0.0,
)


@dataclass
class _Class:
    """Contexts that the same requests read."""

    keys: dict[Hashable, int] = field(default_factory=dict)  # the tokens of each
    tokens: int = 0


class _Piece(NamedTuple):
    """A rectangle: contexts that have one bias for each member."""

    members: int
    keys: list[Hashable]


@dataclass
class _Set:
    """A whole set of contexts."""

    tokens: int
    requests: int = 0  # that read just these


class Planner:
    """Follows the requests of a decode batch and finds a cover for them.

    Args:
        costs: decides between covers.
        items: tiles of rows, over all rectangles, that a launch has room for.
        states: virtual rows that it has room for.
    """

    def __init__(self, costs: CostModel, items: int, states: int) -> None:
        self.costs = costs
        self._items = items
        self._states = states
        self._slots: dict[Reader, int] = {}  # the bit of each in a set of members
        self._free: list[int] = []
        self._members: dict[Hashable, int] = {}  # of each context
        self._classes: dict[int, _Class] = {}  # by members
        self._sets: dict[frozenset[Hashable], _Set] = {}
        self._prefixes: dict[tuple[Hashable, int], int] = {}  # members of each P and its length
        self._biased = 0  # members whose contexts have a bias
        self._batch: list[Reader | None] = []
        self._cover: Cover | None = None

    def add(self, reader: Reader) -> None:
        """A request starts."""
        slot = heapq.heappop(self._free) if self._free else len(self._slots)
        self._slots[reader] = slot
        self._sets.setdefault(reader.whole, _Set(reader.tokens)).requests += 1
        self._toggle(reader, slot)
        if reader.bias:
            self._biased |= 1 << slot
        if reader.prefix is not None:
            prefix = reader.prefix, reader.start
            self._prefixes[prefix] = self._prefixes.get(prefix, 0) | 1 << slot

    def remove(self, reader: Reader) -> None:
        """A request ends."""
        slot = self._slots.pop(reader)
        heapq.heappush(self._free, slot)
        found = self._sets[reader.whole]
        found.requests -= 1
        if found.requests == 0:
            del self._sets[reader.whole]
        self._toggle(reader, slot)
        self._biased &= ~(1 << slot)
        if reader.prefix is not None:
            prefix = reader.prefix, reader.start
            self._prefixes[prefix] &= ~(1 << slot)
            if not self._prefixes[prefix]:
                del self._prefixes[prefix]

    def follow(self, batch: Sequence[Reader | None]) -> Cover | None:
        """The cover of a batch; None in it are rows without contexts.

        Returns:
            None where the launches without rectangles are at least as good, or where the
            rectangles do not fit. The very same cover as long as the batch is the same.
        """
        if len(batch) == len(self._batch) and all(
            a is b for a, b in zip(batch, self._batch, strict=True)
        ):
            return self._cover
        now = {reader: None for reader in batch if reader is not None}
        for reader in [reader for reader in self._slots if reader not in now]:
            self.remove(reader)
        for reader in now:
            if reader not in self._slots:
                self.add(reader)
        self._batch = list(batch)
        self._cover = self._find()
        return self._cover

    def _toggle(self, reader: Reader, slot: int) -> None:
        """A request becomes, or is no longer, a member of each of its contexts."""
        found: dict[int, dict[Hashable, int]] = {}  # its contexts and their tokens, by class
        for key, length in zip(reader.keys, reader.lengths, strict=True):
            found.setdefault(self._members.get(key, 0), {})[key] = length
        for members, keys in found.items():
            self._leave(members, keys)
            self._enter(members ^ 1 << slot, keys)

    def _leave(self, members: int, keys: dict[Hashable, int]) -> None:
        if not members:
            return
        old = self._classes[members]
        if len(keys) == len(old.keys):
            del self._classes[members]
            return
        for key in keys:
            del old.keys[key]
        old.tokens -= sum(keys.values())

    def _enter(self, members: int, keys: dict[Hashable, int]) -> None:
        if not members:
            for key in keys:
                del self._members[key]
            return
        self._members.update(dict.fromkeys(keys, members))
        new = self._classes.setdefault(members, _Class())
        new.keys.update(keys)
        new.tokens += sum(keys.values())

    def _find(self) -> Cover | None:
        if len(self._slots) < 2 or any(reader.bias is None for reader in self._slots):
            return None
        apart = self._seconds_apart()
        prefixes = self._shared_prefixes()
        gain = sum(prefixes.values())
        # Each distinct token read once, and nothing more:
        distinct = sum(found.tokens for found in self._classes.values())
        if self.costs.rates.launch + distinct * self.costs.first >= apart + gain:
            return None
        rectangles = self._dissolved()
        seconds = self._seconds(rectangles) - gain
        if seconds >= apart:
            return None
        pieces = self._cut_by_bias(rectangles)
        counts = Counter(piece.members for piece in pieces)
        seconds += sum((n - 1) * self._cost_of_a_cut(members) for members, n in counts.items())
        every = [piece.members for piece in pieces]
        every += [self._prefixes[prefix] for prefix in prefixes]
        if seconds >= apart or not self._fits(every):
            return None
        return self._emit(pieces, list(prefixes), seconds, apart)

    def _shared_prefixes(self) -> dict[tuple[Hashable, int], float]:
        """Each P that pays to be read once, and what that saves; else it stays in the paths."""
        found = {}
        for prefix, members in self._prefixes.items():
            rows, length = members.bit_count(), prefix[1]
            apart = self.costs.apart(length, rows * length)
            saved = apart - self.costs.rectangle(rows, length, 0)
            if rows > 1 and saved > self.costs.rates.prefix:
                found[prefix] = saved
        return found

    def _seconds_apart(self) -> float:
        """Equal sets count as neighbours, which they need not be: sharing must beat even that."""
        read = sum(
            found.tokens * self.costs.tiles(found.requests, _APART_TILE)
            for found in self._sets.values()
        )
        return self.costs.apart(sum(c.tokens for c in self._classes.values()), read)

    def _dissolved(self) -> dict[int, list[int]]:
        """For the members of each rectangle those of the classes whose contexts it holds."""
        found = {members: [members] for members in self._classes}
        for members, own in sorted(self._classes.items(), key=lambda c: (c[1].tokens, c[0])):
            rows = members.bit_count()
            if rows == 1 or len(found[members]) > 1 or members & self._biased:
                continue
            if own.tokens * self.costs.again >= self.costs.rectangle(rows, 0, 0):
                continue  # even one tile more would cost what the rectangle does
            pieces = self._pieces(members, found)
            whole = self.costs.rectangle(rows, own.tokens, 0)
            if self._cost_of(pieces, own.tokens, found) < whole:
                del found[members]
                for piece in pieces:
                    found.setdefault(piece, []).append(members)
        return found

    def _pieces(self, members: int, found: dict[int, list[int]]) -> list[int]:
        """Members of other rectangles, largest first, that make up these; then single rows."""
        pieces, left = [], members
        inside = [m for m in found if m & ~members == 0 and m != members]
        for piece in sorted(inside, key=lambda m: (-m.bit_count(), m)):
            if piece & ~left == 0:
                pieces.append(piece)
                left &= ~piece
        while left:
            bit = left & -left
            pieces.append(bit)
            left &= ~bit
        return pieces

    def _cost_of(self, pieces: list[int], tokens: int, found: dict[int, list[int]]) -> float:
        """Reading more tokens in these rectangles, new ones among them."""
        costs, seconds, fresh = self.costs, 0.0, tokens
        for piece in pieces:
            rows = piece.bit_count()
            seconds += costs.rectangle(rows, fresh, tokens - fresh)
            if piece in found:
                seconds -= costs.rectangle(rows, 0, 0)
            fresh = 0
        return seconds

    def _seconds(self, rectangles: dict[int, list[int]]) -> float:
        read: set[int] = set()
        seconds = self.costs.rates.launch
        for members, classes in rectangles.items():
            fresh = sum(self._classes[c].tokens for c in classes if c not in read)
            repeated = sum(self._classes[c].tokens for c in classes if c in read)
            read.update(classes)
            seconds += self.costs.rectangle(members.bit_count(), fresh, repeated)
        return seconds

    def _cut_by_bias(self, rectangles: dict[int, list[int]]) -> list[_Piece]:
        """The rectangles, each as many as its contexts have different biases for its members."""
        biased = [(1 << slot, reader) for reader, slot in self._slots.items() if reader.bias]
        pieces = []
        for members, classes in rectangles.items():
            keys = [key for c in classes for key in self._classes[c].keys]
            groups = [keys]
            for bit, reader in biased:
                if members & bit:
                    groups = [part for group in groups for part in _parts(group, reader)]
                if len(groups) == len(keys):
                    break
            pieces += [_Piece(members, group) for group in groups]
        return pieces

    def _cost_of_a_cut(self, members: int) -> float:
        return self.costs.rectangle(members.bit_count(), 0, 0)

    def _fits(self, rectangles: Iterable[int]) -> bool:
        rows = [members.bit_count() for members in rectangles]
        return sum(rows) <= self._states and sum(map(self.costs.tiles, rows)) <= self._items

    def _emit(
        self,
        pieces: list[_Piece],
        prefixes: list[tuple[Hashable, int]],
        seconds: float,
        apart: float,
    ) -> Cover:
        rows = [row for row, reader in enumerate(self._batch) if reader is not None]
        slots = [self._slots[reader] for reader in self._batch if reader is not None]
        members = [piece.members for piece in pieces]
        members += [self._prefixes[prefix] for prefix in prefixes]
        is_member = _bits(members, len(self._slots) + len(self._free))[:, slots]
        which, column = np.nonzero(is_member)
        lens = np.bincount(which, minlength=len(members))
        virtual = np.array(rows, np.int32)[column]
        leaders = virtual[np.cumsum(lens) - lens].tolist()
        kv_lens, segments = [], []
        for row, piece in zip(leaders, pieces, strict=False):
            leader = self._batch[row]
            assert leader is not None
            runs = leader.runs(piece.keys)
            kv_lens.append(sum(length for _, length in runs))
            segments += [(row, *run) for run in runs]
        for row, (_, length) in zip(leaders[len(pieces) :], prefixes, strict=True):
            kv_lens.append(length)
            segments.append((row, 0, length))
        segment_row, starts, lengths = np.ascontiguousarray(np.array(segments, np.int32).T)
        return Cover(
            qo_indptr=_indptr(lens),
            rows=virtual,
            kv_indptr=_indptr(kv_lens),
            is_prefix=np.arange(len(members)) >= len(pieces),
            segment_row=segment_row,
            segment_start=starts,
            segment_length=lengths,
            bias=self._bias_of(pieces, virtual, lens),
            seconds=seconds,
            seconds_apart=apart,
        )

    def _bias_of(self, pieces: list[_Piece], virtual: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """Of each virtual row; those of the prefixes stand last."""
        bias = np.zeros(len(virtual), np.float32)
        if not self._biased:
            return bias
        readers = [self._batch[row] for row in virtual.tolist()]
        keys = [
            piece.keys[0] for piece, n in zip(pieces, lens.tolist(), strict=False) for _ in range(n)
        ]
        found = [reader.bias_of(key) for reader, key in zip(readers, keys, strict=False) if reader]
        bias[: len(found)] = found
        return bias


def _parts(keys: list[Hashable], reader: Reader) -> Iterable[list[Hashable]]:
    """Those of one bias for this reader."""
    if len(keys) == 1:
        return [keys]
    parts: dict[float, list[Hashable]] = {}
    for key in keys:
        parts.setdefault(reader.bias_of(key), []).append(key)
    return parts.values()


def prefill_groups(
    rows: Sequence[int],
    tokens: Sequence[int],
    sets: Sequence[Hashable | None],
    costs: CostModel,
) -> list[list[int]] | None:
    """Requests of a prefill batch whose queries read equal contexts at once.

    A query's rows fill tiles by themselves, so that whole sets are all there is to share; what is
    gained beside is the kernel of the shared launch, where that is FA3.

    Args:
        rows: new rows of each request that see its contexts.
        tokens: of the contexts of each request.
        sets: equal for requests with equal contexts, T and S.
        costs: decides.

    Returns:
        Indices of the requests with rows and contexts, each in one group; None where a launch for
        each request costs no more.
    """
    groups: dict[Hashable, list[int]] = {}
    for request, key in enumerate(sets):
        if rows[request] > 0 and tokens[request] > 0:
            groups.setdefault(key, []).append(request)
    saved = -costs.rates.eager
    for group in groups.values():
        read = tokens[group[0]]
        saved += sum(costs.alone(rows[request], read) for request in group)
        saved -= costs.rectangle(sum(rows[request] for request in group), read, 0)
    return list(groups.values()) if groups and saved >= 0 else None


def _bits(masks: list[int], width: int) -> np.ndarray:
    """(masks, at least ``width``) of 0 and 1, the lowest bit first."""
    size = width // 8 + 1
    raw = b"".join([mask.to_bytes(size, "little") for mask in masks])
    return np.unpackbits(
        np.frombuffer(raw, np.uint8).reshape(len(masks), size), axis=1, bitorder="little"
    )


def _indptr(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.append(0, np.cumsum(lengths)).astype(np.int32)
