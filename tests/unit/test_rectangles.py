"""Rectangles from plan to output on the CPU: the kernel is a torch model of what it reads and where
it writes, everything else is the code that runs on a GPU.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer_ext import cascade, fa2, fa3, rectangles, reference, variant
from flashinfer_ext.rectangles import Heads, Kernel
from flashinfer_ext.reference import attention_state
from flashinfer_ext.worklist import Groups, Shape, WorkSizes, make_work, state_capacity
from tests.support.oracle import one_thread

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
PROCESSORS = 5
PAGE_SIZES = [1, 4]
KEY = variant.ModuleKey(torch.float32, torch.float32, HEAD_DIM)
slow = settings(deadline=None, max_examples=30)


class Rectangle(NamedTuple):
    rows: list[int]
    kv: list[int]  # tokens
    in_path: bool = False
    bias: Sequence[float] = ()  # of each row, 0 if left out

    @property
    def rows_bias(self) -> list[float]:
        return list(self.bias) or [0.0] * len(self.rows)


class Problem(NamedTuple):
    """Rows with a path each, and rectangles that cover the contexts of some of them."""

    rectangles: list[Rectangle]
    paths: list[list[int]]  # tokens of each row's path
    temperature: list[float]
    scale: list[float]
    page_size: int


@st.composite
def problems(draw: st.DrawFn, page_size: int) -> Problem:
    """Disjoint token ranges, so that no row reads one twice; groups may be empty either way."""
    rows = draw(st.integers(1, 7))
    one = draw(st.booleans())
    temperature = [0.7] * rows if one else draw(_floats(rows, 0.25, 2.0))
    found, used = [], 0
    for _ in range(draw(st.integers(0, 5))):
        members = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))
        in_path = draw(st.booleans())
        if not in_path:
            members = [row for row in members if temperature[row] == temperature[members[0]]]
        length = draw(st.sampled_from([0, 1, 3, 64, 130, 500]))
        bias = () if in_path else draw(_floats(len(members), -9.0, 0.0))
        found.append(Rectangle(members, list(range(used, used + length)), in_path, bias))
        used = -(-(used + length) // page_size) * page_size
    paths = []
    for _ in range(rows):
        length = draw(st.integers(1, 9))
        paths.append(list(range(used, used + length)))
        used = -(-(used + length) // page_size) * page_size
    return Problem(found, paths, temperature, draw(_floats(rows, 0.0, 1.5)), page_size)


def _floats(count: int, low: float, high: float) -> Any:
    return st.lists(st.floats(low, high, width=32), min_size=count, max_size=count)


def indptr(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def pages_of(groups: Sequence[list[int]], page_size: int) -> tuple[torch.Tensor, ...]:
    """``kv_indptr``, page indices and ``last_page_len`` of groups that begin at a page."""
    counts = [-(-len(kv) // page_size) for kv in groups]
    pages = [kv[0] // page_size + i for kv, n in zip(groups, counts, strict=True) for i in range(n)]
    last = [len(kv) - (n - 1) * page_size if n else 1 for kv, n in zip(groups, counts, strict=True)]
    return (
        indptr(counts),
        torch.tensor(pages, dtype=torch.int32),
        torch.tensor(last, dtype=torch.int32),
    )


##### The kernel, and FlashInfer's wrapper around it for the path


def tokens_of(
    cache: torch.Tensor, indices: torch.Tensor, start: int, stop: int, last: int
) -> torch.Tensor:
    """(kv_len, kv_heads, head_dim) of a group of pages."""
    size = cache.shape[1]
    kv_len = (stop - start - 1) * size + last if stop > start else 0
    return cache[indices[start:stop].long()].reshape(-1, *cache.shape[2:])[:kv_len]


class Launch(NamedTuple):
    """What both kernels are given; ``ints`` is the buffer that the plan's offsets point into."""

    ints: torch.Tensor
    q: torch.Tensor
    kv: tuple[torch.Tensor, torch.Tensor]
    indices: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    inv_temperature: torch.Tensor
    logits_scale: float

    def list_at(self, offset: int) -> list[int]:
        assert offset % 4 == 0
        return self.ints[offset // 4 :].tolist()

    def attend(
        self, group: int, rows: range, heads: Sequence[int], pages: tuple[int, int], last: int
    ) -> None:
        """Packed rows of one tile over a range of pages, each state written once."""
        taken = [tokens_of(cache, self.indices, *pages, last)[:, heads] for cache in self.kv]
        scale = self.logits_scale * float(self.inv_temperature[group])
        at = slice(rows.start, rows.stop), heads
        v, s = attention_state(self.q[at], *taken, scale, causal=False)
        assert self.lse[at].isnan().all(), "a state is written twice"
        self.out[at], self.lse[at] = v.to(self.out.dtype), s


class Module:
    """What FlashInfer's kernels do with their lists, block by block."""

    def paged_run(
        self,
        _space: Any,
        ints: torch.Tensor,
        plan: list[int],
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        mask: int,
        layout: int,
        window: int,
        _pdl: bool,
        inv_temperature: torch.Tensor,
        logits_scale: float,
    ) -> None:
        assert (mask, layout, window) == (0, 0, -1)
        assert lse.shape == q.shape[:2] and out.shape == q.shape
        out.fill_(math.nan)
        lse.fill_(math.nan)
        launch = Launch(ints, q, (keys, values), indices, out, lse, inv_temperature, logits_scale)
        if len(plan) == 15:
            _run_fa2(launch, plan, *(x.tolist() for x in (qo_indptr, kv_indptr, last_page_len)))
        else:
            _run_fa3(launch, plan)


def _run_fa2(
    launch: Launch, plan: list[int], qo_indptr: list[int], kv_indptr: list[int], last: list[int]
) -> None:
    """The mode without split KV, one block an item and KV head; here a row is one packed row."""
    blocks, _, _, tile, group_at, tile_at, kv_tile_at, _, start_at, chunk_at = plan[:10]
    assert plan[10:] == [0] * 5
    assert launch.list_at(chunk_at)[0] > 0 and not any(launch.list_at(kv_tile_at)[:blocks])
    groups, tiles = launch.list_at(group_at)[:blocks], launch.list_at(tile_at)[:blocks]
    o_indptr = launch.list_at(start_at)
    for group, which in zip(groups, tiles, strict=True):
        first, stop = qo_indptr[group], qo_indptr[group + 1]
        if first == stop:
            continue
        assert o_indptr[group] == first, "a query stands where its state does"
        rows = range(first + which * tile, min(first + (which + 1) * tile, stop))
        pages = kv_indptr[group], kv_indptr[group + 1]
        launch.attend(group, rows, range(launch.q.shape[1]), pages, last[group])


def _run_fa3(launch: Launch, plan: list[int]) -> None:
    """Each block works through its own entries: a tile of one head over a range of tokens."""
    assert len(plan) == 9 and plan[8] == 0
    lists = [launch.list_at(offset) for offset in plan[:8]]
    tiles, qo_indptr, kv_indptr, qo_len, kv_len, heads, work_indptr, groups = lists
    size, tile = launch.kv[0].shape[1], fa3.TILES[launch.q.shape[2]]
    assert work_indptr[0] == 0
    for begin, end in pairwise(work_indptr[: PROCESSORS + 1]):
        for i in range(begin, end):
            first, stop = qo_indptr[i], qo_indptr[i] + qo_len[i]
            rows = range(first + tiles[i] * tile, min(first + (tiles[i] + 1) * tile, stop))
            assert len(rows) > 0 and kv_len[i] > 0, "the kernel has no way to leave such out"
            pages = -(-kv_len[i] // size)
            last = kv_len[i] - (pages - 1) * size
            launch.attend(groups[i], rows, [heads[i]], (kv_indptr[i], kv_indptr[i] + pages), last)


class Path:
    """FlashInfer's wrapper for a causal level; in a graph, it copies the indices it is given."""

    def __init__(self, indices: torch.Tensor | None = None) -> None:
        self.indices = indices

    def plan(self, **arguments: Any) -> None:
        self.given = arguments
        assert arguments["causal"]
        if self.indices is not None:
            given = arguments["paged_kv_indices"]
            self.indices[: len(given)] = given

    def run(
        self,
        q: torch.Tensor,
        kv: Any,
        inv_temperature: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.given
        assert bool((inv_temperature == 1).all())
        kv_indptr = given["paged_kv_indptr"].tolist()
        for i, (start, stop) in enumerate(pairwise(given["qo_indptr"].tolist())):
            last = int(given["paged_kv_last_page_len"][i])
            at = given["paged_kv_indices"], kv_indptr[i], kv_indptr[i + 1], last
            taken = [tokens_of(cache, *at) for cache in kv]
            out[start:stop], lse[start:stop] = attention_state(q[start:stop], *taken, scale, True)
        return out, lse


@pytest.fixture(scope="module", autouse=True, params=["fa2", "fa3"])
def on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    def merge(*given: Any) -> None:
        *states, lists, exponents, out, lse, v_scale = given
        v, s = reference.merge_states_scaled(*states, *lists, exponents)
        out.copy_(v * v_scale)
        if lse is not None:
            lse.copy_(s)

    def gather(source: Any, rows: Any, count: Any, out: Any) -> None:
        taken = source[rows[: int(count)].long()]
        out[: int(count)] = taken.unflatten(1, (KV_HEADS, -1)).transpose(1, 2)

    with pytest.MonkeyPatch.context() as patch, one_thread():
        key = KEY._replace(template=request.param)
        kernel = Kernel(key, Module(), Heads(HEADS, KV_HEADS, HEAD_DIM), PROCESSORS)
        patch.setattr(cascade, "temperature_module", lambda key: Module())
        patch.setattr(cascade, "launch_merge_states", merge)
        patch.setattr(cascade.ApeCascadeAttentionWrapper, "_wrapper", lambda *_: Path())
        patch.setattr(cascade.ApeCascadeAttentionWrapper, "_record_copies", lambda _: None)
        patch.setattr(rectangles, "gather_packed", gather)
        patch.setattr(rectangles.Kernel, "best", lambda *_: kernel)
        patch.setattr(rectangles, "device_support_pdl", lambda device: False)
        yield


def plan_of(problem: Problem) -> dict[str, Any]:
    groups = problem.rectangles
    first = pages_of([rectangle.kv for rectangle in groups], problem.page_size)
    second = pages_of(problem.paths, problem.page_size)
    rows = [row for rectangle in groups for row in rectangle.rows]
    bias = [value for rectangle in groups for value in rectangle.rows_bias]
    return dict(
        qo_indptr_arr=[indptr([len(r.rows) for r in groups]), indptr([1] * len(problem.paths))],
        paged_kv_indptr_arr=[first[0], second[0]],
        paged_kv_indices=[first[1], second[1]],
        paged_kv_last_page_len=[first[2], second[2]],
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=problem.page_size,
        temperature=problem.temperature,
        scale=problem.scale,
        q_data_type=torch.float32,
        contexts_rows=torch.tensor(rows, dtype=torch.int32),
        path_groups=torch.tensor([r.in_path for r in groups], dtype=torch.bool),
        rows_bias=torch.tensor(bias, dtype=torch.float32),
    )


def inputs_of(problem: Problem) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    last = max(max(path) for path in problem.paths)
    pages = last // problem.page_size + 1
    shape = (pages, problem.page_size, KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    q = torch.randn(len(problem.paths), HEADS, HEAD_DIM, generator=generator)
    return q, (keys, values)


def formula(
    problem: Problem, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row and head by head, in float64: one softmax over all of a row's contexts with 1/T
    and a bias, one over its path, weighed by softmax([S T L_contexts, L_path]). Natural logarithms.
    """
    keys, values = (cache.reshape(-1, KV_HEADS, HEAD_DIM).double() for cache in kv)
    out, lse = torch.zeros_like(q, dtype=torch.float64), torch.zeros(q.shape[:2]).double()
    for row, path in enumerate(problem.paths):
        own_rectangles = [r for r in problem.rectangles if row in r.rows]
        of_contexts = [r for r in own_rectangles if not r.in_path]
        contexts = [t for r in of_contexts for t in r.kv]
        biases = [r.rows_bias[r.rows.index(row)] for r in of_contexts for _ in r.kv]
        path = path + [t for r in own_rectangles if r.in_path for t in r.kv]
        t, s = problem.temperature[row], problem.scale[row]
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            logits = keys[:, own] @ q[row, head].double() / math.sqrt(HEAD_DIM)
            parts = [(logits[path].logsumexp(0), logits[path].softmax(0) @ values[path, own])]
            if contexts:
                cold = logits[contexts] / t + torch.tensor(biases)
                parts.append((s * t * cold.logsumexp(0), cold.softmax(0) @ values[contexts, own]))
            logs = torch.stack([log for log, _ in parts])
            shares = logs.softmax(0)
            out[row, head] = sum(w * v for w, (_, v) in zip(shares, parts, strict=True))
            lse[row, head] = logs.logsumexp(0)
    return out, lse


def check(wrapper: cascade.ApeCascadeAttentionWrapper, problem: Problem, **plan: Any) -> None:
    q, kv = inputs_of(problem)
    wrapper.plan(**{**plan_of(problem), **plan})
    out, lse = wrapper.run(q, kv, return_lse=True)
    expected, expected_lse = formula(problem, q, kv)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double() * math.log(2), expected_lse, rtol=1e-4, atol=1e-4)


@slow
@given(problem=st.sampled_from(PAGE_SIZES).flatmap(problems))
def test_rectangles_equal_the_formula(problem: Problem) -> None:
    check(cascade.ApeCascadeAttentionWrapper(torch.empty(16, dtype=torch.uint8)), problem)


@slow
@given(
    found=st.sampled_from(PAGE_SIZES).flatmap(lambda size: st.lists(problems(size), min_size=1)),
    rows=st.integers(1, 7),
)
def test_a_captured_launch_follows_every_plan(found: list[Problem], rows: int) -> None:
    """Same buffers and lists of the same lengths for whatever comes."""
    wrapper = graph_wrapper(rows)
    seen = set()
    for problem in found:
        check(wrapper, of_rows(problem, rows))
        launch = wrapper._rectangles
        assert launch is not None and launch._buffer is not None
        seen.add((tuple(launch._plan_info), launch._buffer.data_ptr(), len(launch._buffer)))
    assert len(seen) == 1


def graph_wrapper(rows: int) -> cascade.ApeCascadeAttentionWrapper:
    wrapper = cascade.ApeCascadeAttentionWrapper(
        torch.empty(1 << 20, dtype=torch.uint8),
        use_cuda_graph=True,
        batch_size=rows,
        paged_kv_indices_buffer=torch.zeros(4096, dtype=torch.int32),
        rectangles=True,
    )
    assert wrapper._graph is not None
    wrapper._levels = [Path(), Path(wrapper._graph.indices)]  # there are no streams here
    wrapper._key = KEY
    wrapper._module = Module()
    return wrapper


def of_rows(problem: Problem, rows: int) -> Problem:
    """The problem cut or filled up to so many rows; the rows added have no contexts."""
    found = []
    for each in problem.rectangles:
        kept = [(row, b) for row, b in zip(each.rows, each.rows_bias, strict=True) if row < rows]
        found.append(each._replace(rows=[r for r, _ in kept], bias=[b for _, b in kept]))
    more = rows - len(problem.paths)
    return Problem(
        found,
        (problem.paths + [problem.paths[0]] * more)[:rows],
        (problem.temperature + [1.0] * more)[:rows],
        (problem.scale + [1.0] * more)[:rows],
        problem.page_size,
    )


PROBLEM = Problem(
    [Rectangle([0, 2], list(range(200))), Rectangle([2, 1, 0], list(range(200, 230)))],
    [[240], [241, 242], [243]],
    [0.8] * 3,
    [0.9, 0.5, 0.0],
    1,
)


def test_the_same_rows_again_plan_the_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = graph_wrapper(3)
    rows = plan_of(PROBLEM)["contexts_rows"]
    check(wrapper, PROBLEM, contexts_rows=rows)
    planned: list[None] = []
    monkeypatch.setattr(rectangles, "make_work", lambda *_: planned.append(None))
    longer = PROBLEM._replace(paths=[[240, 244], [241, 242], [243, 245]])
    # Pages of the paths come in order: what was one page longer lies behind.
    longer = longer._replace(paths=[[240, 241], [242, 243], [244, 245]])
    check(wrapper, longer, contexts_rows=rows)
    assert not planned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts_rows": torch.tensor([0, 2, 2, 1, 3], dtype=torch.int32)}, "0 to 2"),
        ({"contexts_rows": torch.tensor([0, 2, 2, 1, 0])}, "int32"),
        ({"contexts_rows": torch.tensor([0, 2], dtype=torch.int32)}, r"\(5,\)"),
        ({"temperature": [0.8, 0.8, 0.7]}, "rows of one group"),
        ({"temperature": [0.8, 0.8]}, "1 or 3"),
        ({"contexts_rows": None, "path_groups": None}, "cover 5 and 3 rows"),
        ({"path_groups": torch.tensor([True])}, "2 are needed"),
        ({"rows_bias": torch.zeros(4)}, r"rows_bias must be fp32 of shape \(5,\)"),
        ({"rows_bias": torch.zeros(5).double()}, "rows_bias must be fp32"),
        ({"bias": torch.zeros(230)}, "which have rows_bias"),
    ],
)
def test_a_plan_of_rows_that_does_not_fit_says_what_is_wrong(
    changes: dict[str, Any], message: str
) -> None:
    wrapper = cascade.ApeCascadeAttentionWrapper(torch.empty(16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**{**plan_of(PROBLEM), **changes})


def test_a_graph_takes_the_kind_of_plan_that_it_was_captured_with() -> None:
    wrapper = graph_wrapper(3)
    one_each = {"qo_indptr_arr": [torch.arange(4, dtype=torch.int32)] * 2}
    kv = plan_of(PROBLEM)["paged_kv_indptr_arr"][1]
    last = torch.ones(3, dtype=torch.int32)
    changes = {**one_each, "paged_kv_indptr_arr": [kv, kv], "paged_kv_last_page_len": [last, last]}
    with pytest.raises(ValueError, match="contexts_rows"):
        without = dict.fromkeys(("contexts_rows", "path_groups", "rows_bias"))
        wrapper.plan(**{**plan_of(PROBLEM), **changes, **without})


##### The work


@st.composite
def groups(draw: st.DrawFn) -> tuple[Groups, Shape, int]:
    rows = draw(st.integers(1, 40))
    page_size = draw(st.sampled_from([1, 16]))
    members, pages = [], []
    for _ in range(draw(st.integers(0, 6))):
        members.append(draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows)))
        pages.append(draw(st.sampled_from([0, 1, 63, 64, 65, 1000, 33_000])))
    last = draw(st.lists(st.integers(1, page_size), min_size=len(pages), max_size=len(pages)))
    shape = Shape(rows, draw(st.sampled_from([1, 4, 7])), page_size, draw(st.integers(1, 33)))
    made = Groups(
        indptr([len(m) for m in members]).numpy(),
        np.array([row for m in members for row in m], np.int32),
        indptr(pages).numpy(),
        np.array(last, np.int32),
        np.array(draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages))), bool),
        -np.arange(sum(map(len, members)), dtype=np.float32),
    )
    return made, shape, draw(st.sampled_from([*fa2.TILES, *fa3.TILES.values()]))


@slow
@given(given=groups())
def test_items_cover_every_pair_of_row_and_page_once(given: tuple[Groups, Shape, int]) -> None:
    made, shape, tile = given
    work = make_work(made, shape, tile)
    items = list(zip(work.item_chunk.tolist(), work.item_tile.tolist(), strict=True))
    tiles = -(-work.rows * shape.group_size // tile)
    assert sorted(items) == [(c, t) for c, n in enumerate(tiles.tolist()) for t in range(n)]
    states: list[int] = []
    found: dict[int, list[tuple[int, int]]] = {}
    for chunk, whole in enumerate(work.rectangle.tolist()):
        begin, end = int(work.begin[chunk]), int(work.end[chunk])
        assert begin < end
        own = range(int(work.state_start[chunk]), int(work.state_start[chunk] + work.rows[chunk]))
        states += own
        members = made.rows[made.qo_indptr[whole] : made.qo_indptr[whole + 1]]
        assert work.state_row[own.start : own.stop].tolist() == members.tolist()
        found.setdefault(whole, []).append((begin, end))
        is_last = end == made.kv_indptr[whole + 1]
        last = made.last_page_len[whole] if is_last else shape.page_size
        assert work.last_page_len[chunk] == last
    assert states == list(range(len(work.state_row)))
    for whole in range(len(made.last_page_len)):
        bounds = made.kv_indptr[whole : whole + 2].tolist()
        is_live = made.qo_indptr[whole] < made.qo_indptr[whole + 1] and bounds[0] < bounds[1]
        assert is_live == (whole in found)
        if is_live:
            chunks = sorted(found[whole])
            assert [chunks[0][0], chunks[-1][1]] == bounds
            assert all(a[1] == b[0] for a, b in pairwise(chunks))
    lists = [work.state_index[a:b].tolist() for a, b in pairwise(work.state_indptr.tolist())]
    assert sorted(state for own in lists for state in own) == states
    bias = np.concatenate(
        [made.bias[slice(*made.qo_indptr[whole : whole + 2])] for whole in work.rectangle]
        or [made.bias[:0]]
    )
    assert work.state_bias.tolist() == bias[work.state_index].tolist()
    in_path = np.repeat(made.in_path[work.rectangle], work.rows)
    for row, own in enumerate(lists):
        assert (work.state_row[own] == row).all()
        of_path = int(work.state_indptr[row + 1] - work.path_start[row])
        assert in_path[own].tolist() == [False] * (len(own) - of_path) + [True] * of_path


@slow
@given(given=groups())
def test_work_fits_a_captured_launch_or_says_that_it_does_not(
    given: tuple[Groups, Shape, int],
) -> None:
    made, shape, tile = given
    sizes = WorkSizes(tile, 4 * shape.slots + shape.rows, 200)
    lens, pages = np.diff(made.qo_indptr), np.diff(made.kv_indptr)
    live = (lens > 0) & (pages > 0)
    needed = int((-(-lens * shape.group_size // tile))[live].sum()), int(lens[live].sum())
    if needed[0] <= sizes.items and needed[1] <= sizes.states:
        make_work(made, shape, tile, sizes).check_fits(sizes)
    else:
        with pytest.raises(ValueError, match="fit"):
            make_work(made, shape, tile, sizes)


def one_group(rows: int, pages: int) -> Groups:
    lists = ([0, rows], range(rows), [0, pages], [1])
    zeros = np.zeros(rows, np.float32)
    return Groups(*(np.array(x, np.int32) for x in lists), np.zeros(1, bool), zeros)


def test_work_of_another_tile_does_not_fit() -> None:
    made = one_group(rows=1, pages=9)
    work = make_work(made, Shape(1, 4, 1, 9), 64)
    work.check_fits(WorkSizes(64, 9, 9))
    with pytest.raises(ValueError, match="fit"):
        work.check_fits(WorkSizes(128, 9, 9))


@pytest.mark.parametrize(("slots", "low"), [(33, 30), (16, 16)])
def test_long_contexts_of_many_rows_fill_the_gpu_once(slots: int, low: int) -> None:
    """32 requests over 32K tokens on an H100: one tile, chunks side by side."""
    made = one_group(rows=32, pages=32768)
    work = make_work(made, Shape(32, 4, 1, slots), 128)
    assert low <= len(work.item_chunk) <= slots
    lengths = (work.end - work.begin)[work.item_chunk]
    assert lengths[0] == lengths.max() and lengths[-1] == lengths.min()


@slow
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 9))
def test_no_block_of_fa3_has_a_whole_entry_more_than_another(lengths: list[int], n: int) -> None:
    lengths = sorted(lengths, reverse=True)
    block = fa3._blocks_of(np.array(lengths), n)
    load = np.bincount(block, weights=lengths, minlength=n)
    assert load.max() - load.min() <= lengths[0]
    assert np.bincount(block, minlength=n).max() <= -(-len(lengths) // n)


@pytest.mark.parametrize(
    ("packed", "head_dim", "tile"),
    [(1, 128, 16), (16, 128, 16), (17, 128, 64), (64, 64, 64), (900, 128, 128), (65, 256, 64)],
)
def test_the_tile_of_fa2_is_the_smallest_that_holds_the_rows(
    packed: int, head_dim: int, tile: int
) -> None:
    assert fa2.tile_for(packed, head_dim) == tile


def test_states_take_what_there_is_room_for() -> None:
    each = 32 * (2 * 128 * 2 + 4)
    assert state_capacity(32, 128, 2, 100 * each + 1) == 100
    assert state_capacity(32, 128, 2, 1 << 40) == 8192
