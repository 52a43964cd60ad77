"""The cascade wrapper on a GPU against the formula of APE written out in fp32."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from flashinfer_ext import cascade, variant
from flashinfer_ext.cascade import ApeCascadeAttentionWrapper
from flashinfer_ext.reference import LOWEST_BIAS

# Norm of the error of each row beside the norm of its row. Rounded are the probabilities inside of
# the kernel, the output of either level and the merged output, each by at most 2^-8 (bf16) or
# 2^-11 (fp16) and by 1.6e-3 or 2e-4 on average, and independently of each other.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The kernel sums up rounded probabilities, and so the base-2 logarithm is off by 1.44 * 2^-8 or
# 1.44 * 2^-11 at most. The contexts' logarithm is multiplied by S * T, and its error with it.
LSE_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
QUERIES_IN_BF16 = 3e-2  # queries divided by T are rounded once more: 2^-9 / T of each logit

BF16_64, BF16_128 = (torch.bfloat16, 64), (torch.bfloat16, 128)
FP16_64, FP16_128 = (torch.float16, 64), (torch.float16, 128)


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    num_qo_heads: int = 8
    num_kv_heads: int = 2
    page_size: int = 1
    layout: str = "NHD"
    kv_dtype: torch.dtype | None = None  # default: dtype


class Contexts(NamedTuple):
    """A group of the contexts level."""

    rows: int
    kv_len: int
    temperature: float = 1.0
    scale: float = 1.0


class Path(NamedTuple):
    """A group of the path level."""

    rows: int
    kv_len: int


class Level(NamedTuple):
    """What ``plan`` takes for one level."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


@dataclass(frozen=True)
class Batch:
    shape: Shape
    contexts: Sequence[Contexts]
    path: Sequence[Path]
    levels: tuple[Level, Level]
    q: torch.Tensor
    cache: torch.Tensor
    bias: torch.Tensor | None = None  # of each token of the pages of the contexts

    @property
    def temperature(self) -> list[float]:
        return [group.temperature for group in self.contexts]

    @property
    def scale(self) -> list[float]:
        return [group.scale for group in self.contexts]


class State(NamedTuple):
    out: torch.Tensor  # (rows, heads, head_dim) fp32
    lse: torch.Tensor  # (rows, heads) fp32, natural


##### Batches


def indptr(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def make_level(
    groups: Sequence[Contexts] | Sequence[Path], page_size: int, free: torch.Tensor
) -> Level:
    """The first of the free pages, one after the other."""
    pages = [math.ceil(group.kv_len / page_size) for group in groups]
    last = [
        group.kv_len - max(n - 1, 0) * page_size for group, n in zip(groups, pages, strict=True)
    ]
    return Level(
        indptr([group.rows for group in groups]),
        indptr(pages),
        free[: sum(pages)].contiguous(),
        torch.tensor([n or 1 for n in last], dtype=torch.int32),
    )


def make_batch(
    shape: Shape,
    contexts: Sequence[Contexts],
    path: Sequence[Path],
    shift: float = 0.0,
    amplify: float = 1.0,
    device: str = "cuda",
) -> Batch:
    """Random queries and pages in random order; page 0 belongs to nobody.

    Logits are of about normal distribution times ``amplify``, plus ``shift``: one coordinate of
    all queries, and one of all keys, is a constant.
    """
    generator = torch.Generator(device).manual_seed(7)
    rows = sum(group.rows for group in path)
    assert rows == sum(group.rows for group in contexts)
    kv_lens = [group.kv_len for group in contexts] + [group.kv_len for group in path]
    pages = 1 + sum(math.ceil(kv_len / shape.page_size) for kv_len in kv_lens)
    free = 1 + torch.randperm(pages - 1, generator=generator, device=device).int()
    first = make_level(contexts, shape.page_size, free)
    levels = (first, make_level(path, shape.page_size, free[len(first.indices) :]))

    q = torch.randn(rows, shape.num_qo_heads, shape.head_dim, generator=generator, device=device)
    inner = (shape.page_size, shape.num_kv_heads)
    inner = inner if shape.layout == "NHD" else inner[::-1]
    cache = torch.randn(
        pages, 2, *inner, shape.head_dim, generator=generator, device=device, dtype=shape.dtype
    )
    q *= amplify
    if shift:
        constant = math.sqrt(abs(shift) * math.sqrt(shape.head_dim))
        q[..., 0] = constant
        cache[:, 0, ..., 0] = math.copysign(constant, shift)
    cache = cache.to(shape.kv_dtype or shape.dtype)
    return Batch(shape, contexts, path, levels, q.to(shape.dtype), cache)


def dense(
    batch: Batch, level: int, group: int, scales: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (kv_len, num_kv_heads, head_dim) of a group, in fp32 and dequantised."""
    _, kv_indptr, indices, last_page_len = batch.levels[level]
    pages = indices[int(kv_indptr[group]) : int(kv_indptr[group + 1])].long()
    size = batch.shape.page_size
    kv_len = (len(pages) - 1) * size + int(last_page_len[group]) if len(pages) else 0
    raw = batch.cache.view(torch.uint8) if batch.cache.element_size() == 1 else batch.cache
    taken = raw[pages].view(batch.cache.dtype).float()
    taken = taken if batch.shape.layout == "NHD" else taken.transpose(2, 3)
    inner = (batch.shape.num_kv_heads, batch.shape.head_dim)
    keys, values = (part.reshape(-1, *inner)[:kv_len] for part in taken.unbind(1))
    return keys * scales[0], values * scales[1]


##### The oracle


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    bias: torch.Tensor | float = 0.0,
) -> State:
    """Softmax attention in fp32; query i of n sees the first ``len(k) - n + i + 1`` keys."""
    n, heads, head_dim = q.shape
    m, kv_heads, _ = k.shape
    outs, lses = [], []
    at_once = max(2**27 // (heads * m), 1)  # scores of half a gigabyte
    for start in range(0, n, at_once):
        part = q[start : start + at_once].float().view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("nkgd,mkd->nkgm", part, k) * scale + bias
        if causal:
            position = torch.arange(m - n + start, m - n + start + len(part), device=q.device)
            hidden = torch.arange(m, device=q.device) > position[:, None]
            scores.masked_fill_(hidden[:, None, None, :], -math.inf)
        lses.append(scores.logsumexp(-1).reshape(-1, heads))
        outs.append(torch.einsum("nkgm,mkd->nkgd", scores.softmax(-1), v).reshape_as(part))
    return State(torch.cat(outs).view(n, heads, head_dim), torch.cat(lses))


def expected_of(batch: Batch, k_scale: float = 1.0, v_scale: float = 1.0) -> State:
    """Each row: its path, then weights softmax([S T L_contexts, L_path]) where it has contexts."""
    sm_scale = 1 / math.sqrt(batch.shape.head_dim)
    scales = (k_scale, v_scale)
    paths = [
        attend(batch.q[start:stop], *dense(batch, 1, i, scales), sm_scale, causal=True)
        for i, (start, stop) in enumerate(pairwise(batch.levels[1].qo_indptr.tolist()))
    ]
    out, lse = (torch.cat(parts) for parts in zip(*paths, strict=True))
    for i, (start, stop) in enumerate(pairwise(batch.levels[0].qo_indptr.tolist())):
        group, rows = batch.contexts[i], slice(start, stop)
        if group.kv_len == 0:
            continue
        k, v = dense(batch, 0, i, scales)
        bias = bias_of(batch, i)
        own = attend(batch.q[rows], k, v, sm_scale / group.temperature, False, bias)
        logs = torch.stack([group.scale * group.temperature * own.lse, lse[rows]])
        share = logs.softmax(0).unsqueeze(-1)
        out[rows] = share[0] * own.out + share[1] * out[rows]
        lse[rows] = logs.logsumexp(0)
    return State(out, lse)


def bias_of(batch: Batch, group: int) -> torch.Tensor | float:
    """Of the tokens of a group of the contexts level."""
    if batch.bias is None:
        return 0.0
    first = int(batch.levels[0].kv_indptr[group]) * batch.shape.page_size
    return batch.bias[first : first + batch.contexts[group].kv_len]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst row."""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).flatten(1).norm(dim=1)
    worst = (difference / expected.float().flatten(1).norm(dim=1)).max().item()
    return math.inf if math.isnan(worst) else worst


def assert_equals(batch: Batch, actual: tuple[torch.Tensor, torch.Tensor], expected: State) -> None:
    """``actual`` is an output and its base-2 log-sum-exp."""
    out, lse = actual
    assert (out.dtype, lse.dtype) == (batch.shape.dtype, torch.float32)
    assert error(out, expected.out) <= TOLERANCE[out.dtype]
    power = max(1.0, *(group.scale * group.temperature for group in batch.contexts))
    worst = (lse - expected.lse * math.log2(math.e)).abs().max().item()
    assert worst <= LSE_TOLERANCE[out.dtype] * power


##### The wrapper


@pytest.fixture(scope="module")
def workspace() -> torch.Tensor:
    return torch.empty(384 << 20, dtype=torch.uint8, device="cuda")


def plan(wrapper: ApeCascadeAttentionWrapper, batch: Batch, **changes: Any) -> None:
    qo_indptr, kv_indptr, indices, last_page_len = zip(*batch.levels, strict=True)
    arguments = dict(
        qo_indptr_arr=qo_indptr,
        paged_kv_indptr_arr=kv_indptr,
        paged_kv_indices=indices,
        paged_kv_last_page_len=last_page_len,
        num_qo_heads=batch.shape.num_qo_heads,
        num_kv_heads=batch.shape.num_kv_heads,
        head_dim=batch.shape.head_dim,
        page_size=batch.shape.page_size,
        temperature=batch.temperature,
        scale=batch.scale,
        q_data_type=batch.shape.dtype,
        kv_data_type=batch.shape.kv_dtype,
        bias=batch.bias,
    )
    wrapper.plan(**{**arguments, **changes})


def attention(
    workspace: torch.Tensor, batch: Batch, **run_arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and base-2 log-sum-exp of a wrapper of its own, into a poisoned output."""
    wrapper = ApeCascadeAttentionWrapper(workspace, batch.shape.layout)
    plan(wrapper, batch)
    out = torch.full_like(batch.q, math.nan)
    return wrapper.run(batch.q, batch.cache, out=out, return_lse=True, **run_arguments)


##### Batches that many tests use

# Groups of the two levels need not begin at the same rows. Path lengths are those of a row and of
# several tiles of the kernel; contexts among them are none, one, a page and a part, many.
EXTEND = (
    (
        Contexts(1, 17, 0.1, 1.5),
        Contexts(6, 4096, 0.5, 0.9),
        Contexts(99, 1, 2.0, 1.0),
        Contexts(36, 0, 0.3, 0.7),
        Contexts(2, 300, 1.0, 0.0),
        Contexts(12, 1000, 0.2, 1.0),
    ),
    (Path(1, 40), Path(5, 5), Path(130, 1000), Path(17, 64), Path(3, 3)),
)

# Every row is a request.
DECODE = (
    tuple(
        Contexts(1, kv_len, temperature, scale)
        for kv_len, temperature, scale in (
            (0, 1.0, 1.0),
            (1, 0.1, 0.5),
            (17, 2.0, 1.5),
            (4096, 0.5, 0.9),
            (4096, 0.9, 0.0),
            (0, 0.2, 0.3),
            (333, 0.1, 1.0),
            (64, 1.0, 1.0),
            (1500, 1.5, 0.7),
        )
    ),
    tuple(Path(1, kv_len) for kv_len in (1, 17, 300, 1, 2000, 33, 16, 48, 5)),
)
BATCHES = pytest.mark.parametrize("groups", [EXTEND, DECODE], ids=["extend", "decode"])
KINDS = pytest.mark.parametrize(
    ("dtype", "head_dim"), [BF16_64, BF16_128, FP16_64, FP16_128], ids=str
)


@BATCHES
@KINDS
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_ragged_batches_of_many_temperatures_equal_the_formula(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    num_kv_heads: int,
) -> None:
    shape = Shape(dtype, head_dim, num_kv_heads=num_kv_heads, page_size=page_size)
    batch = make_batch(shape, *groups)
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_contexts_of_131072_tokens_equal_the_formula(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, rows: int
) -> None:
    contexts = [Contexts(rows, 131_072, 0.5, 0.8), Contexts(1, 17, 0.9, 0.9)]
    batch = make_batch(Shape(dtype, head_dim), contexts, [Path(rows, 500), Path(1, 1)])
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@pytest.mark.parametrize("shift", [-20.0, 20.0])
@KINDS
@pytest.mark.parametrize("rows", [1, 4])
def test_log_sum_exps_of_both_signs_equal_the_formula(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, shift: float, rows: int
) -> None:
    settings = [(0.1, 0.5), (0.5, 1.0), (1.0, 1.0), (2.0, 0.6)]
    contexts = [Contexts(rows, 50 + 9 * i, *setting) for i, setting in enumerate(settings)]
    paths = [Path(rows, 30 + 7 * i) for i in range(len(settings))]
    batch = make_batch(Shape(dtype, head_dim, page_size=16), contexts, paths, shift=shift)
    expected = expected_of(batch)
    assert bool((expected.lse * shift > 0).all())
    assert_equals(batch, attention(workspace, batch), expected)


@BATCHES
@pytest.mark.parametrize("amplify", [0.1, 3.0])
def test_flat_and_peaked_distributions_equal_the_formula(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]], amplify: float
) -> None:
    batch = make_batch(Shape(), *groups, amplify=amplify)
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_at_one_and_one_it_is_a_single_softmax_over_everything(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, rows: int
) -> None:
    contexts = [Contexts(rows, kv_len) for kv_len in (700, 0, 17, 1)]
    paths = [Path(rows, kv_len) for kv_len in (40, 9, 5, 300)]
    batch = make_batch(Shape(dtype, head_dim), contexts, paths)
    whole = []
    for i, (start, stop) in enumerate(pairwise(batch.levels[1].qo_indptr.tolist())):
        both = zip(dense(batch, 0, i, (1, 1)), dense(batch, 1, i, (1, 1)), strict=True)
        k, v = (torch.cat(pair) for pair in both)
        whole.append(attend(batch.q[start:stop], k, v, head_dim**-0.5, causal=True))
    expected = State(*(torch.cat(parts) for parts in zip(*whole, strict=True)))
    assert_equals(batch, attention(workspace, batch), expected)


def without_contexts(batch: Batch) -> Batch:
    """The same rows, paths and pages; no group has contexts."""
    contexts = [group._replace(kv_len=0) for group in batch.contexts]
    nothing = torch.empty_like(batch.levels[0].indices[:0])
    level = make_level(contexts, batch.shape.page_size, nothing)
    return replace(batch, contexts=contexts, levels=(level, batch.levels[1]))


@BATCHES
def test_rows_without_contexts_are_not_touched_by_those_of_others(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    batch = make_batch(Shape(), *groups)
    alone = without_contexts(batch)
    out, lse = attention(workspace, batch)
    path_out, path_lse = attention(workspace, alone)
    assert_equals(alone, (path_out, path_lse), expected_of(alone))
    lens = torch.tensor([group.rows for group in batch.contexts])
    empty = torch.tensor([group.kv_len == 0 for group in batch.contexts]).repeat_interleave(lens)
    if groups is EXTEND:  # the very same launch
        assert torch.equal(out[empty], path_out[empty])
        assert torch.equal(lse[empty], path_lse[empty])
    else:  # its keys are split up in another way
        assert error(out[empty], path_out[empty]) <= TOLERANCE[out.dtype]
    assert error(out[~empty], path_out[~empty]) > 0.1


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("page_size", [1, 16])
def test_contexts_in_any_order_of_their_pages_are_the_same(
    workspace: torch.Tensor, rows: int, page_size: int
) -> None:
    """A whole number of pages: the last one may stand anywhere."""
    contexts = [Contexts(rows, 1600, 0.4, 0.9), Contexts(rows, 320, 0.8, 1.0)]
    batch = make_batch(Shape(page_size=page_size), contexts, [Path(rows, 50), Path(rows, 20)])
    first, path = batch.levels
    cut = int(first.kv_indptr[1])
    shuffled = [part[torch.randperm(len(part))] for part in first.indices.tensor_split([cut])]
    permuted = replace(batch, levels=(first._replace(indices=torch.cat(shuffled)), path))
    expected = expected_of(batch)
    for each in (batch, permuted):
        assert_equals(each, attention(workspace, each), expected)


@BATCHES
@pytest.mark.parametrize("page_size", [1, 16])
def test_both_layouts_and_a_pair_of_caches_equal_the_formula(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    page_size: int,
) -> None:
    tokens_first = make_batch(Shape(page_size=page_size), *groups)
    expected = expected_of(tokens_first)
    heads_first = replace(
        tokens_first,
        shape=replace(tokens_first.shape, layout="HND"),
        cache=tokens_first.cache.transpose(2, 3).contiguous(),
    )
    assert_equals(heads_first, attention(workspace, heads_first), expected)
    keys, values = (cache.contiguous() for cache in tokens_first.cache.unbind(1))
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(wrapper, tokens_first)
    pair = wrapper.run(tokens_first.q, (keys, values), return_lse=True)
    assert_equals(tokens_first, pair, expected)


@BATCHES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_float8_cache_with_scales_equals_the_formula(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]], head_dim: int
) -> None:
    shape = Shape(head_dim=head_dim, page_size=16, kv_dtype=torch.float8_e4m3fn)
    batch = make_batch(shape, *groups)
    scales = {"k_scale": 0.6, "v_scale": 2.5}
    assert_equals(batch, attention(workspace, batch, **scales), expected_of(batch, **scales))


@BATCHES
@pytest.mark.parametrize("has_contexts", [True, False])
def test_scales_of_a_cache_in_bf16_are_taken_too(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    has_contexts: bool,
) -> None:
    batch = make_batch(Shape(), *groups)
    batch = batch if has_contexts else without_contexts(batch)
    scales = {"k_scale": 0.6, "v_scale": 2.5}
    assert_equals(batch, attention(workspace, batch, **scales), expected_of(batch, **scales))


@pytest.mark.parametrize("num_kv_heads", [8, 32])
def test_requests_that_share_their_contexts_equal_each_with_its_own_list(
    workspace: torch.Tensor, num_kv_heads: int
) -> None:
    """Once as one group of the contexts level over all rows, once as a group a row (fused)."""
    rows = 48
    shape = Shape(num_qo_heads=32, num_kv_heads=num_kv_heads, page_size=16)
    paths = [Path(1, 1 + 13 * i) for i in range(rows)]
    shared = make_batch(shape, [Contexts(rows, 2050, 0.6, 0.9)], paths)
    first, path = shared.levels
    pages = len(first.indices)
    repeated = first._replace(
        qo_indptr=indptr([1] * rows),
        kv_indptr=indptr([pages] * rows),
        indices=first.indices.repeat(rows),
        last_page_len=first.last_page_len.repeat(rows),
    )
    apart = replace(shared, contexts=[Contexts(1, 2050, 0.6, 0.9)] * rows, levels=(repeated, path))
    expected = expected_of(shared)
    for batch in (shared, apart):
        assert_equals(batch, attention(workspace, batch), expected)


def test_groups_of_many_requests_share_contexts_in_prefill(workspace: torch.Tensor) -> None:
    """Two sets of contexts over the rows of three and of four requests, and one without."""
    paths = [Path(rows, rows + 20 * i) for i, rows in enumerate((7, 1, 30, 2, 2, 90, 16, 5))]
    contexts = [Contexts(38, 900, 0.3, 1.1), Contexts(110, 2000, 0.9, 0.8), Contexts(5, 0)]
    batch = make_batch(Shape(page_size=16), contexts, paths)
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@BATCHES
def test_the_log_sum_exp_is_returned_on_demand_and_the_output_is_the_same(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    batch = make_batch(Shape(), *groups)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(wrapper, batch)
    out, _ = wrapper.run(batch.q, batch.cache, return_lse=True)
    given = torch.full_like(batch.q, math.nan)
    assert wrapper.run(batch.q, batch.cache, out=given) is given
    assert torch.equal(given, out)
    assert torch.equal(wrapper.run(batch.q, batch.cache), out)


@BATCHES
def test_one_plan_serves_every_layer(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    first = make_batch(Shape(), *groups)
    second = replace(first, q=first.q.flip(0).contiguous(), cache=-first.cache.flip(0).contiguous())
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(wrapper, first)
    for layer in (first, second):
        actual = wrapper.run(layer.q, layer.cache, return_lse=True)
        assert_equals(layer, actual, expected_of(layer))


@BATCHES
def test_a_softmax_scale_may_be_given_to_plan_or_to_run(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    """Half of the default is what queries of half the size give."""
    batch = make_batch(Shape(), *groups)
    expected = expected_of(replace(batch, q=batch.q / 2))
    half = 0.5 / math.sqrt(batch.shape.head_dim)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(wrapper, batch, sm_scale=half)
    assert_equals(batch, wrapper.run(batch.q, batch.cache, return_lse=True), expected)
    assert_equals(batch, attention(workspace, batch, sm_scale=half), expected)


@BATCHES
def test_index_tensors_on_the_gpu_plan_the_same(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    batch = make_batch(Shape(page_size=16), *groups)
    out, lse = attention(workspace, batch)
    qo_indptr, kv_indptr, indices, last_page_len = zip(*batch.levels, strict=True)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(
        wrapper,
        batch,
        qo_indptr_arr=[tensor.cuda() for tensor in qo_indptr],
        paged_kv_indptr_arr=[tensor.cuda() for tensor in kv_indptr],
        paged_kv_indices=torch.cat(indices),
        paged_kv_last_page_len=[tensor.cuda() for tensor in last_page_len],
        temperature=torch.tensor(batch.temperature, device="cuda"),
        scale=torch.tensor(batch.scale, device="cuda"),
    )
    again, lse_again = wrapper.run(batch.q, batch.cache, return_lse=True)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_one_wrapper_plans_batches_of_every_kind_in_turn(workspace: torch.Tensor) -> None:
    wrapper = ApeCascadeAttentionWrapper(workspace)
    for shape, groups in (
        (Shape(), EXTEND),
        (Shape(head_dim=64), DECODE),
        (Shape(), DECODE),
        (Shape(dtype=torch.float16, page_size=16), EXTEND),
        (Shape(), EXTEND),
        (Shape(num_kv_heads=8), DECODE),
        (Shape(page_size=16), EXTEND),
    ):
        batch = make_batch(shape, *groups)
        for each in (with_bias(batch), batch) if shape == Shape() else (batch,):
            plan(wrapper, each)
            actual = wrapper.run(each.q, each.cache, return_lse=True)
            assert_equals(each, actual, expected_of(each))


LONG_BUSY = 1_000_000_000  # cycles: half a second of the GPU


def in_the_order_of(batch: Batch, groups: Sequence[int]) -> Batch:
    """Its groups of the contexts level and of the path, which are as many, in another order."""
    contexts, path = ([level[i] for i in groups] for level in (batch.contexts, batch.path))
    return make_batch(batch.shape, contexts, path)


def test_a_plan_leaves_alone_what_the_gpu_has_not_come_to_yet(workspace: torch.Tensor) -> None:
    """The GPU is busy while both batches are planned and launched."""
    contexts = [Contexts(100, 300, 0.5, 0.9), Contexts(1, 3000, 0.9, 1.0)]
    first = make_batch(Shape(), contexts, [Path(100, 200), Path(1, 20)])
    batches = [first, in_the_order_of(first, [1, 0])]
    wrapper = ApeCascadeAttentionWrapper(workspace)
    for batch in batches:  # compiles the merge
        plan(wrapper, batch)
        wrapper.run(batch.q, batch.cache, return_lse=True)
    torch.cuda.synchronize()
    actual = []
    for batch in batches:
        torch.cuda._sleep(LONG_BUSY)
        plan(wrapper, batch)
        actual.append(wrapper.run(batch.q, batch.cache, return_lse=True))
    for batch, of_batch in zip(batches, actual, strict=True):
        assert_equals(batch, of_batch, expected_of(batch))


def test_a_plan_leaves_alone_what_a_replay_has_not_come_to_yet(workspace: torch.Tensor) -> None:
    shape = Shape()
    contexts, kv_lens = GRAPH_SETTINGS[0]
    first = make_batch(shape, contexts, [Path(1, kv_len) for kv_len in kv_lens])
    turned = in_the_order_of(first, range(GRAPH_ROWS)[::-1])
    batches = [first, replace(turned, cache=first.cache)]
    graph = Graph(workspace, shape, first.cache)
    actual = []
    for batch in batches:
        torch.cuda._sleep(LONG_BUSY)
        actual.append(graph.replay(batch, in_place=True))
    for batch, of_batch in zip(batches, actual, strict=True):
        assert_equals(batch, of_batch, expected_of(batch))


##### A bias of the contexts

HAVE_BIAS = pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
BIASES = [0.0, -0.3, -2.0, -11.0, -150.0, LOWEST_BIAS]


def with_bias(batch: Batch) -> Batch:
    """Every third group has none; in the others it changes every few tokens, and is 0 somewhere.

    What belongs to no token is NaN, so that reading it cannot go unnoticed.
    """
    generator = torch.Generator().manual_seed(3)
    size, kv_indptr = batch.shape.page_size, batch.levels[0].kv_indptr.tolist()
    bias = torch.full((kv_indptr[-1] * size + 300,), math.nan)
    for i, group in enumerate(batch.contexts):
        drawn = torch.randint(len(BIASES), (group.kv_len // 7 + 1,), generator=generator)
        values = torch.tensor(BIASES)[drawn].repeat_interleave(7)[: group.kv_len]
        values[group.kv_len // 2 : group.kv_len // 2 + 3] = 0
        first = kv_indptr[i] * size
        bias[first : first + group.kv_len] = 0 if i % 3 == 2 else values
    return replace(batch, bias=bias.to(batch.q.device))


@BATCHES
@HAVE_BIAS
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_batches_with_a_bias_equal_the_formula(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    num_kv_heads: int,
) -> None:
    shape = Shape(dtype, head_dim, num_kv_heads=num_kv_heads, page_size=page_size)
    batch = with_bias(make_batch(shape, *groups))
    actual = attention(workspace, batch)
    assert_equals(batch, actual, expected_of(batch))
    # And the bias matters.
    assert error(actual[0], expected_of(replace(batch, bias=None)).out) > 0.1


@BATCHES
@HAVE_BIAS
def test_a_bias_of_zeros_is_none_but_for_rounding(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    dtype: torch.dtype,
    head_dim: int,
) -> None:
    batch = make_batch(Shape(dtype, head_dim), *groups)
    out, lse = attention(workspace, batch)
    zeros = torch.zeros(len(batch.levels[0].indices), device="cuda")
    again, lse_again = attention(workspace, replace(batch, bias=zeros))
    assert error(again, out) <= TOLERANCE[dtype] / 2
    torch.testing.assert_close(lse_again, lse, rtol=0, atol=LSE_TOLERANCE[dtype] / 2)


@BATCHES
def test_a_bias_over_a_float8_cache_with_scales_equals_the_formula(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    shape = Shape(page_size=16, kv_dtype=torch.float8_e4m3fn)
    batch = with_bias(make_batch(shape, *groups))
    scales = {"k_scale": 0.6, "v_scale": 2.5}
    assert_equals(batch, attention(workspace, batch, **scales), expected_of(batch, **scales))


@HAVE_BIAS
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_tokens_of_the_lowest_bias_are_as_if_left_out(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, rows: int, temperature: float
) -> None:
    """Also where whole parts of a split context have it: these are not taken for empty ones."""
    contexts = [Contexts(rows, 100_000, temperature, 0.9), Contexts(1, 1, 0.9, 0.9)]
    batch = make_batch(Shape(dtype, head_dim), contexts, [Path(rows, 50), Path(1, 1)])
    bias = torch.full((100_001,), LOWEST_BIAS, device="cuda")
    bias[70_000:70_017] = 0
    biased = replace(batch, bias=bias)
    actual = attention(workspace, biased)
    assert_equals(batch, actual, expected_of(biased))
    # All of the second group has it: its weight is 0, and its state a number.
    path = attend(batch.q[rows:], *dense(batch, 1, 1, (1, 1)), head_dim**-0.5, causal=True)
    assert error(actual[0][rows:], path.out) <= TOLERANCE[dtype]


def test_a_run_reads_the_bias_that_stands_there_then(workspace: torch.Tensor) -> None:
    batch = with_bias(make_batch(Shape(), *DECODE))
    other = replace(batch, bias=batch.bias / 3)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(wrapper, batch)
    batch.bias.copy_(other.bias)
    assert_equals(other, wrapper.run(batch.q, batch.cache, return_lse=True), expected_of(other))


##### CUDA graphs

GRAPH_ROWS = 6
MAX_PAGES = 20_000


class Graph:
    """A wrapper captured at the least lengths: no contexts, and the unused page 0 as every path."""

    def __init__(
        self,
        workspace: torch.Tensor,
        shape: Shape,
        cache: torch.Tensor,
        rows: int = GRAPH_ROWS,
        biased: bool = False,
    ) -> None:
        self.indices = torch.zeros(MAX_PAGES, dtype=torch.int32, device="cuda")
        size = MAX_PAGES * shape.page_size
        self.bias = torch.full((size,), math.nan, device="cuda") if biased else None
        self.wrapper = ApeCascadeAttentionWrapper(
            workspace,
            shape.layout,
            use_cuda_graph=True,
            batch_size=rows,
            paged_kv_indices_buffer=self.indices,
            bias_buffer=self.bias,
        )
        self.q = torch.zeros(
            rows, shape.num_qo_heads, shape.head_dim, dtype=shape.dtype, device="cuda"
        )
        path = [Path(1, 1)] * rows
        contexts = [Contexts(1, 0)] * rows
        page_0 = torch.zeros(rows, dtype=torch.int32, device="cuda")
        levels = (
            make_level(contexts, shape.page_size, page_0[:0]),
            make_level(path, 1, page_0),
        )
        plan(self.wrapper, Batch(shape, contexts, path, levels, self.q, cache, self.bias))
        self.wrapper.run(self.q, cache, return_lse=True)  # compiles the merge
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out, self.lse = self.wrapper.run(self.q, cache, return_lse=True)

    def replay(self, batch: Batch, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """With ``in_place``, page indices and the bias are written to the wrapper's buffers before
        ``plan``.
        """
        indices, bias = torch.cat([level.indices for level in batch.levels]), batch.bias
        if in_place:
            self.indices[: len(indices)] = indices
            indices = self.indices[: len(indices)]
        if in_place and bias is not None and self.bias is not None:
            self.bias[: len(bias)] = bias
            bias = self.bias
        plan(self.wrapper, batch, paged_kv_indices=indices, bias=bias)
        self.q.copy_(batch.q)
        self.out.fill_(math.nan)
        self.lse.fill_(math.nan)
        self.graph.replay()
        return self.out.clone(), self.lse.clone()


GRAPH_SETTINGS: list[tuple[list[Contexts], list[int]]] = [
    (
        [
            Contexts(1, 4096, 0.5, 0.9),
            Contexts(1, 0),
            Contexts(1, 17, 0.1, 1.5),
            Contexts(1, 1, 2.0, 0.0),
            Contexts(1, 1000, 0.9, 1.0),
            Contexts(1, 0, 0.3, 0.3),
        ],
        [300, 17, 1, 2000, 64, 1],
    ),
    ([Contexts(1, 0)] * GRAPH_ROWS, [1] * GRAPH_ROWS),
    ([Contexts(1, 40 * (i + 1), 0.2 * (i + 1), 1.0) for i in range(GRAPH_ROWS)], [9] * GRAPH_ROWS),
    ([Contexts(1, 12_000, 0.4, 0.8)] + [Contexts(1, 0)] * (GRAPH_ROWS - 1), [500] * GRAPH_ROWS),
    # Rows that share their contexts: fewer groups than rows.
    ([Contexts(GRAPH_ROWS, 3000, 0.5, 0.9)], [300, 17, 1, 200, 64, 1]),
    ([Contexts(1, 0), Contexts(3, 700, 0.7, 1.2), Contexts(2, 5000, 0.3, 0.8)], [9] * GRAPH_ROWS),
]


def pad(batch: Batch, rows: int) -> Batch:
    """The last rows as a server pads them: no contexts, a path of one token in page 0."""
    contexts, path = list(batch.contexts), list(batch.path)
    contexts[-rows:], path[-rows:] = [Contexts(1, 0)] * rows, [Path(1, 1)] * rows
    kept, page_size = len(path) - rows, batch.shape.page_size
    first, second = batch.levels
    page_0 = torch.zeros(rows, dtype=torch.int32, device=second.indices.device)
    pages = (
        first.indices[: int(first.kv_indptr[kept])],
        torch.cat([second.indices[: int(second.kv_indptr[kept])], page_0]),
    )
    levels = (make_level(contexts, page_size, pages[0]), make_level(path, page_size, pages[1]))
    return replace(batch, contexts=contexts, path=path, levels=levels)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
def test_a_captured_run_follows_every_new_plan(
    workspace: torch.Tensor,
    dtype: torch.dtype,
    head_dim: int,
    in_place: bool,
    page_size: int,
    biased: bool,
) -> None:
    shape = Shape(dtype, head_dim, page_size=page_size)
    batches = [
        make_batch(shape, contexts, [Path(1, kv_len) for kv_len in kv_lens])
        for contexts, kv_lens in GRAPH_SETTINGS
    ]
    cache = max((batch.cache for batch in batches), key=len)  # a graph reads one cache
    batches = [replace(batch, cache=cache) for batch in batches]
    batches.append(pad(batches[0], rows=2))
    if biased:
        batches = [with_bias(batch) for batch in batches]
    graph = Graph(workspace, shape, cache, biased=biased)
    for batch in (*batches, batches[0]):
        replayed = graph.replay(batch, in_place)
        assert_equals(batch, replayed, expected_of(batch))
        eager, eager_lse = attention(workspace, batch)
        assert error(replayed[0], eager) <= TOLERANCE[dtype]
        torch.testing.assert_close(replayed[1], eager_lse, rtol=0, atol=LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [40, 200])
def test_a_captured_run_reads_contexts_once_for_many_rows(
    workspace: torch.Tensor, rows: int
) -> None:
    shape = Shape()
    contexts = [Contexts(rows - 9, 6000, 0.8, 0.9), Contexts(1, 0), Contexts(8, 20, 0.9, 1.0)]
    batch = make_batch(shape, contexts, [Path(1, 1 + i % 70) for i in range(rows)])
    replayed = Graph(workspace, shape, batch.cache, rows).replay(batch, in_place=True)
    assert_equals(batch, replayed, expected_of(batch))


##### Rectangles


class Rectangle(NamedTuple):
    """Rows, each of which may stand in several rectangles, over contexts of their own."""

    rows: Sequence[int]
    kv_len: int
    in_path: bool = False


class Cover(NamedTuple):
    """A decode batch whose contexts level is a cover by rectangles."""

    batch: Batch  # the contexts of which are the rectangles
    rows: torch.Tensor  # at each place of the contexts level
    in_path: list[bool]  # of each rectangle
    temperature: list[float]
    scale: list[float]
    bias: list[list[float]]  # of each row of each rectangle


def make_cover(
    shape: Shape,
    rectangles: Sequence[Rectangle],
    path_lens: Sequence[int],
    mixed: bool = False,
    biased: bool = False,
) -> Cover:
    """With ``mixed``, rows have one of two temperatures by parity, and so must rectangles. With
    ``biased``, two rows of three have a bias of their own for each rectangle.
    """
    rows = len(path_lens)
    temperature = [(0.5, 1.1)[row % 2] if mixed else 0.8 for row in range(rows)]
    scale = [(0.9, 0.0, 1.3)[row % 3] for row in range(rows)]
    places = [row for rectangle in rectangles for row in rectangle.rows]
    contexts = [Contexts(len(r.rows), r.kv_len) for r in rectangles]
    # One path a place gives as many queries as the helper wants; the first rows are the batch's.
    fill = max(len(places) - rows, 0)
    level = make_batch(
        shape,
        [*contexts, Contexts(rows + fill - len(places), 0)],
        [*(Path(1, kv_len) for kv_len in path_lens), *[Path(1, 1)] * fill],
    )
    first, second = level.levels
    levels = (
        Level(first.qo_indptr[:-1], first.kv_indptr[:-1], first.indices, first.last_page_len[:-1]),
        Level(
            second.qo_indptr[: rows + 1],
            second.kv_indptr[: rows + 1],
            second.indices[: int(second.kv_indptr[rows])],
            second.last_page_len[:rows],
        ),
    )
    q = level.q[:rows].contiguous()
    batch = Batch(shape, contexts, level.path[:rows], levels, q, level.cache)
    in_path = [rectangle.in_path for rectangle in rectangles]
    bias = [
        [
            BIASES[(row + i) % len(BIASES)] * (biased and row % 3 > 0 and not r.in_path)
            for row in r.rows
        ]
        for i, r in enumerate(rectangles)
    ]
    return Cover(batch, torch.tensor(places, dtype=torch.int32), in_path, temperature, scale, bias)


def plan_cover(wrapper: ApeCascadeAttentionWrapper, cover: Cover, **changes: Any) -> None:
    settings = dict(
        contexts_rows=cover.rows,
        path_groups=torch.tensor(cover.in_path, dtype=torch.bool),
        rows_bias=torch.tensor([b for own in cover.bias for b in own], dtype=torch.float32),
        temperature=cover.temperature,
        scale=cover.scale,
    )
    plan(wrapper, cover.batch, **settings, **changes)


def expected_of_cover(cover: Cover) -> State:
    batch = cover.batch
    sm_scale = 1 / math.sqrt(batch.shape.head_dim)
    bounds = pairwise(batch.levels[0].qo_indptr.tolist())
    members = [cover.rows[start:stop].tolist() for start, stop in bounds]
    outs, lses = [], []
    for row in range(len(batch.path)):
        q = batch.q[row : row + 1]
        own = [i for i, rows in enumerate(members) if row in rows]
        path = [dense(batch, 0, i, (1, 1)) for i in own if cover.in_path[i]]
        path.append(dense(batch, 1, row, (1, 1)))
        out, lse = attend(q, *joined(path), sm_scale, causal=True)
        of_contexts = [i for i in own if not cover.in_path[i]]
        contexts = [dense(batch, 0, i, (1, 1)) for i in of_contexts]
        if sum(len(k) for k, _ in contexts):
            k, v = joined(contexts)
            each = [cover.bias[i][members[i].index(row)] for i in of_contexts]
            lens = torch.tensor([len(k) for k, _ in contexts])
            bias = torch.tensor(each).repeat_interleave(lens).to(k.device)
            power = cover.scale[row] * cover.temperature[row]
            state = attend(q, k, v, sm_scale / cover.temperature[row], False, bias)
            logs = torch.stack([power * state.lse, lse])
            share = logs.softmax(0).unsqueeze(-1)
            out, lse = share[0] * state.out + share[1] * out, logs.logsumexp(0)
        outs.append(out)
        lses.append(lse)
    return State(torch.cat(outs), torch.cat(lses))


def joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Keys and values of several pieces."""
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def assert_equals_cover(cover: Cover, actual: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert_about_equals(actual, expected_of_cover(cover))


def assert_about_equals(actual: tuple[torch.Tensor, torch.Tensor], expected: State) -> None:
    out, lse = actual
    # Each partial state is rounded before they are merged, once more than without rectangles.
    assert error(out, expected.out) <= 1.5 * TOLERANCE[out.dtype]
    worst = (lse - expected.lse * math.log2(math.e)).abs().max().item()
    assert worst <= 1.5 * LSE_TOLERANCE[out.dtype]


EVERY_SECOND = list(range(0, 40, 2))
COVERS = {
    "one": ([Rectangle(range(40), 3000)], 40),
    "overlap": (
        [
            Rectangle(range(40), 1500),
            Rectangle(EVERY_SECOND, 700),
            Rectangle([1], 5000),
            Rectangle([39, 3, 17], 1),
            Rectangle([], 64),
            Rectangle([5, 6], 0),
        ],
        40,
    ),
    "many": ([Rectangle(range(i, 40, 1 + i % 5), 60 + 90 * i) for i in range(30)], 40),
    "few rows": ([Rectangle([0, 2], 20_000), Rectangle([2, 1], 17)], 3),
    "prefixes": (
        [
            Rectangle(range(30), 700, in_path=True),
            Rectangle(range(20, 40), 900),
            Rectangle(range(35, 40), 64, in_path=True),
            Rectangle(range(10), 77),
        ],
        40,
    ),
    "nothing": ([], 5),
}
COVER = pytest.mark.parametrize("name", list(COVERS))


@pytest.fixture(params=["fa2", "fa3"])
def template(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of FlashInfer's kernels reads the rectangles."""
    if request.param == "fa2":
        monkeypatch.setattr(variant.ModuleKey, "on_hopper", None)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FA3 is for Hopper")


either_kernel = pytest.mark.usefixtures("template")


def path_lens(rows: int) -> list[int]:
    return [1 + 13 * i for i in range(rows)]


@either_kernel
@COVER
@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("biased", [False, True])
def test_covers_by_rectangles_equal_the_formula(
    workspace: torch.Tensor,
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    num_kv_heads: int,
    page_size: int,
    biased: bool,
) -> None:
    rectangles, rows = COVERS[name]
    shape = Shape(dtype, head_dim, num_kv_heads=num_kv_heads, page_size=page_size)
    cover = make_cover(shape, rectangles, path_lens(rows), biased=biased)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan_cover(wrapper, cover)
    out = torch.full_like(cover.batch.q, math.nan)
    actual = wrapper.run(cover.batch.q, cover.batch.cache, out=out, return_lse=True)
    assert_equals_cover(cover, actual)


@either_kernel
def test_rectangles_of_two_temperatures_equal_the_formula(workspace: torch.Tensor) -> None:
    rectangles = [Rectangle(range(i % 2, 40, 2), 200 + 300 * i) for i in range(6)]
    cover = make_cover(Shape(), rectangles, path_lens(40), mixed=True)
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan_cover(wrapper, cover)
    actual = wrapper.run(cover.batch.q, cover.batch.cache, return_lse=True)
    assert_equals_cover(cover, actual)


@either_kernel
@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_prefill_in_rectangles_equals_the_formula(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, page_size: int
) -> None:
    batch = make_batch(Shape(dtype, head_dim, page_size=page_size), *EXTEND)
    lens = torch.tensor([group.rows for group in batch.contexts])
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan(
        wrapper,
        batch,
        contexts_rows=torch.arange(len(batch.q), dtype=torch.int32),
        temperature=torch.tensor(batch.temperature).repeat_interleave(lens),
        scale=torch.tensor(batch.scale).repeat_interleave(lens),
    )
    out = torch.full_like(batch.q, math.nan)
    actual = wrapper.run(batch.q, batch.cache, out=out, return_lse=True)
    assert_about_equals(actual, expected_of(batch))


def test_rectangles_of_fp8_keys_equal_the_formula(workspace: torch.Tensor) -> None:
    rectangles, rows = COVERS["overlap"]
    cover = make_cover(Shape(kv_dtype=torch.float8_e4m3fn), rectangles, path_lens(rows))
    wrapper = ApeCascadeAttentionWrapper(workspace)
    plan_cover(wrapper, cover)
    assert_equals_cover(cover, wrapper.run(cover.batch.q, cover.batch.cache, return_lse=True))


@either_kernel
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(("dtype", "head_dim"), [BF16_128, FP16_64], ids=str)
def test_a_captured_run_follows_every_cover(
    workspace: torch.Tensor, dtype: torch.dtype, head_dim: int, rows: int
) -> None:
    """From no rectangle to many and back, twice over the same plan, with rows of any order."""
    shape = Shape(dtype, head_dim)
    covers = [
        make_cover(
            shape,
            [r._replace(rows=[i for i in r.rows if i < rows]) for r in given],
            path_lens(rows),
            biased=biased,
        )
        for given, _ in COVERS.values()
        for biased in (False, True)
    ]
    cache = max((cover.batch.cache for cover in covers), key=len)  # a graph reads one cache
    indices = torch.zeros(400_000, dtype=torch.int32, device="cuda")
    wrapper = ApeCascadeAttentionWrapper(
        workspace,
        use_cuda_graph=True,
        batch_size=rows,
        paged_kv_indices_buffer=indices,
        rectangles=True,
    )
    q = torch.zeros_like(covers[0].batch.q)
    plan_cover(wrapper, covers[-1])
    wrapper.run(q, cache, return_lse=True)  # compiles what there is to compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = wrapper.run(q, cache, return_lse=True)
    for cover in (*covers, covers[1], covers[1], covers[0]):
        cover = cover._replace(batch=replace(cover.batch, cache=cache))
        given = torch.cat([level.indices for level in cover.batch.levels])
        indices[: len(given)] = given
        plan_cover(wrapper, cover, paged_kv_indices=indices[: len(given)])
        q.copy_(cover.batch.q)
        out.fill_(math.nan)
        graph.replay()
        assert_equals_cover(cover, (out.clone(), lse.clone()))


@either_kernel
def test_too_many_rectangles_for_a_captured_run_are_refused(workspace: torch.Tensor) -> None:
    rectangles = [Rectangle(range(64), 1) for _ in range(400)]
    cover = make_cover(Shape(), rectangles, path_lens(64))
    wrapper = ApeCascadeAttentionWrapper(
        workspace,
        use_cuda_graph=True,
        batch_size=64,
        paged_kv_indices_buffer=torch.zeros(400_000, dtype=torch.int32, device="cuda"),
        rectangles=True,
    )
    with pytest.raises(ValueError, match="do not fit"):
        plan_cover(wrapper, cover)


##### Without a module of our own


@pytest.fixture
def stock_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "temperature_module", lambda key: None)


@pytest.mark.usefixtures("stock_kernel")
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_the_stock_kernel_is_exact_for_one_temperature_in_prefill(
    workspace: torch.Tensor, temperature: float
) -> None:
    contexts, paths = EXTEND
    uniform = [group._replace(temperature=temperature) for group in contexts]
    batch = make_batch(Shape(), uniform, paths)
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@pytest.mark.usefixtures("stock_kernel")
@BATCHES
@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.6, "v_scale": 2.5}], ids=["", "scales"])
def test_the_stock_kernel_serves_many_temperatures_with_rounded_queries(
    workspace: torch.Tensor,
    groups: tuple[Sequence[Contexts], Sequence[Path]],
    scales: dict[str, float],
) -> None:
    contexts, paths = groups
    mixed = [group._replace(temperature=max(group.temperature, 0.3)) for group in contexts]
    batch = make_batch(Shape(), mixed, paths)
    out, _ = attention(workspace, batch, **scales)
    assert error(out, expected_of(batch, **scales).out) <= QUERIES_IN_BF16


@pytest.mark.usefixtures("stock_kernel")
@BATCHES
def test_the_stock_kernel_serves_rows_without_contexts(
    workspace: torch.Tensor, groups: tuple[Sequence[Contexts], Sequence[Path]]
) -> None:
    batch = without_contexts(make_batch(Shape(), *groups))
    assert_equals(batch, attention(workspace, batch), expected_of(batch))


@pytest.mark.usefixtures("stock_kernel")
def test_the_stock_kernel_takes_no_bias(workspace: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="a bias needs the attention module"):
        attention(workspace, with_bias(make_batch(Shape(), *DECODE)))


@pytest.mark.usefixtures("stock_kernel")
def test_the_stock_kernel_runs_in_a_graph(workspace: torch.Tensor) -> None:
    contexts, kv_lens = GRAPH_SETTINGS[2]
    batch = make_batch(Shape(), contexts, [Path(1, kv_len) for kv_len in kv_lens])
    out, _ = Graph(workspace, batch.shape, batch.cache).replay(batch, in_place=True)
    assert error(out, expected_of(batch).out) <= QUERIES_IN_BF16
