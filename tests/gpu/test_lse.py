"""The log-sum-exps of contexts on a GPU against their torch reference."""

import pytest
import torch

from flashinfer_ext import reference
from flashinfer_ext.lse import context_lse

Lens = tuple[int, ...]


def assert_equals_the_reference(
    q: torch.Tensor, k_cache: torch.Tensor, lens: Lens, tolerance: float = 1e-4
) -> None:
    """Of contexts at random slots."""
    slots = torch.randperm(len(k_cache), device="cuda")[: sum(lens)].int()
    indptr = torch.tensor([0, *lens], device="cuda").cumsum(0).int()
    found = context_lse(q, k_cache, slots, indptr, 0.1)
    expected = reference.context_lse(q, k_cache, slots, indptr, 0.1)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 8), (12, 2), (7, 1)])
def test_shapes_and_dtypes(heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int) -> None:
    q = torch.randn(37, heads, head_dim, device="cuda").to(dtype)
    k_cache = torch.randn(3000, kv_heads, head_dim, device="cuda").to(dtype)
    assert_equals_the_reference(q, k_cache, (1, 64, 65, 1000, 3, 128))


@pytest.mark.parametrize("rows", [1, 2, 72, 700])
@pytest.mark.parametrize("lens", [(5000,), (1,) * 300, (1024,) * 12])
def test_few_and_many_rows_and_contexts(rows: int, lens: Lens) -> None:
    q = torch.randn(rows, 32, 128, device="cuda").bfloat16()
    k_cache = torch.randn(sum(lens) + 50, 8, 128, device="cuda").bfloat16()
    assert_equals_the_reference(q, k_cache, lens)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_in_fp8(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    q = torch.randn(37, 32, 128, device="cuda").to(dtype)
    k_cache = torch.randn(500, 8, 128, device="cuda").to(kv_dtype)
    assert_equals_the_reference(q, k_cache, (100, 1, 300))


def test_keys_beyond_what_int32_counts() -> None:
    k_cache = torch.empty(2_200_000, 8, 128, dtype=torch.bfloat16, device="cuda")  # 4.5 GB
    assert k_cache.numel() > 2**31
    k_cache[-300:] = torch.randn(300, 8, 128, device="cuda")
    q = torch.randn(9, 32, 128, device="cuda").bfloat16()
    slots = torch.arange(2_200_000 - 300, 2_200_000, dtype=torch.int32, device="cuda")
    indptr = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    found = context_lse(q, k_cache, slots, indptr, 0.1)
    expected = reference.context_lse(q, k_cache, slots, indptr, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_may_be_measured_apart() -> None:
    q = torch.randn(20, 2, 8, 64, device="cuda").half()[:, 1]
    k_cache = torch.randn(90, 2, 64, device="cuda").half()
    assert_equals_the_reference(q[5:17], k_cache, (30, 20))
