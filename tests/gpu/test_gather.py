"""The Triton gather on a GPU against its torch reference."""

import random
from collections.abc import Sequence

import pytest
import torch

from flashinfer_ext.gather import (
    gather_kv_indices,
    gather_kv_indices_reference,
    gather_packed,
    spread,
)

Segment = tuple[int, int, int]  # index of the row, first column, columns


def assert_gathers(
    page_table: torch.Tensor, rows: torch.Tensor, segments: Sequence[Segment]
) -> None:
    """Exactly the reference's slots, and nothing behind them."""
    drawn = torch.tensor(segments, dtype=torch.int32, device="cuda").view(-1, 3)
    row, start, length = drawn.T.contiguous()
    indptr = torch.cat([length.new_zeros(1), length.cumsum(0, dtype=torch.int32)])
    expected = gather_kv_indices_reference(page_table, rows, row, start, indptr)
    out = torch.full((len(expected) + 1000,), -1, dtype=torch.int32, device="cuda")
    longest = max((segment[2] for segment in segments), default=0)
    gather_kv_indices(page_table, rows, row, start, indptr, longest, out)
    assert torch.equal(out[: len(expected)], expected)
    assert bool((out[len(expected) :] == -1).all())


def random_table(lines: int, width: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(lines)
    shape = (lines, width)
    return torch.randint(1 << 30, shape, generator=generator, device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("rows_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_segments_equal_the_reference(seed: int, rows_dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    lines, width, batch = 40, 5000, 17
    rows = torch.tensor(rng.sample(range(lines), batch), dtype=rows_dtype, device="cuda")
    segments = []
    for _ in range(rng.randrange(1, 300)):
        start = rng.randrange(width)
        length = rng.choice((0, 1, rng.randrange(20), rng.randrange(width))) % (width - start + 1)
        segments.append((rng.randrange(batch), start, length))
    assert_gathers(random_table(lines, width), rows, segments)


def test_segments_beyond_one_stride_of_the_launch_equal_the_reference() -> None:
    width = 200_001
    segments = [(0, 3, 65_536), (1, 0, 65_537), (1, 7, 0), (1, 1, width - 1), (0, 5, 1)]
    rows = torch.tensor([2, 0], device="cuda")
    assert_gathers(random_table(3, width), rows, segments)


@pytest.mark.parametrize("segments", [[], [(0, 4, 0), (1, 0, 0)]])
def test_nothing_to_gather_writes_nothing(segments: list[Segment]) -> None:
    rows = torch.tensor([1, 0], device="cuda")
    assert_gathers(random_table(2, 10), rows, segments)


def test_a_table_of_more_slots_than_int32_counts_is_read_at_the_right_place() -> None:
    lines, width = 16_500, 131_072  # 8.7 GB, of which a few lines are ever touched
    table = torch.empty(lines, width, dtype=torch.int32, device="cuda")
    assert table.numel() > 2**31
    touched = [0, 16_384, lines - 1]
    for line in touched:
        table[line] = torch.arange(width, dtype=torch.int32, device="cuda") + line
    rows = torch.tensor(touched, dtype=torch.int32, device="cuda")
    segments = [(2, 100, 70_000), (1, 0, 1000), (0, width - 5, 5), (2, width - 1, 1)]
    assert_gathers(table, rows, segments)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_spread_over_their_segments(seed: int) -> None:
    rng = random.Random(seed)
    lens = [rng.choice((0, 1, rng.randrange(20), rng.randrange(200_000))) for _ in range(90)]
    values = torch.randn(len(lens), device="cuda")
    indptr = torch.tensor([0, *lens], device="cuda").cumsum(0).int()
    out = torch.full((sum(lens) + 9,), torch.nan, device="cuda")
    spread(values, indptr, max(lens), out)
    expected = torch.repeat_interleave(values, torch.tensor(lens, device="cuda"))
    assert torch.equal(out[:-9], expected)
    assert bool(out[-9:].isnan().all())


def packed(rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """Head ``k * group_size + g`` of a row goes to ``[g, k]``."""
    return torch.stack([rows[:, g::group_size] for g in range(group_size)], dim=1)


@pytest.mark.parametrize("count", [0, 1, 700, 3000])
@pytest.mark.parametrize(("group_size", "kv_heads"), [(1, 32), (4, 8), (7, 4), (5, 1)])
def test_rows_are_gathered_and_packed_as_far_as_they_are_counted(
    group_size: int, kv_heads: int, count: int
) -> None:
    source = torch.randn(64, 2, group_size * kv_heads, 128, device="cuda").bfloat16()[:, 0]
    rows = torch.randint(64, (3000,), device="cuda").int()
    shape = (3000, group_size, kv_heads, 128)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    gather_packed(source, rows, torch.tensor([count], dtype=torch.int32, device="cuda"), out)
    assert torch.equal(out[:count], packed(source[rows[:count].long()], group_size))
    assert bool(out[count:].isnan().all())


def test_more_elements_than_int32_counts_are_written_at_the_right_place() -> None:
    source = torch.randn(64, 32, 128, device="cuda").bfloat16()
    rows = torch.arange(2**19 + 3, dtype=torch.int32, device="cuda") % 64
    out = torch.zeros(len(rows), 4, 8, 128, dtype=torch.bfloat16, device="cuda")  # 4.3 GB
    assert out.numel() > 2**31
    gather_packed(source, rows, torch.tensor([len(rows)], dtype=torch.int32, device="cuda"), out)
    for part in (slice(5), slice(-5, None)):
        assert torch.equal(out[part], packed(source[rows[part].long()], 4))
