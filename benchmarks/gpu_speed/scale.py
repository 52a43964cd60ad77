"""How much is measured: on a GPU, and as a smoke test on a CPU. Lengths are in tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.common.shape import LLAMA_8B, TINY, Shape


class Mixed(NamedTuple):
    """A load of plain requests of random lengths, arriving at random (Poisson)."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    rate: float  # arrivals a second
    repeats: int


class Overlap(NamedTuple):
    """A batch whose requests have each some of a set of contexts."""

    contexts: int
    taken: int
    batch: int
    disjoint: bool = False  # request i takes the i-th ``taken`` of them; else at random

    @property
    def name(self) -> str:
        kind = "own" if self.disjoint else "of"
        return f"overlap/{self.taken}{kind}{self.contexts}x{self.batch}"


class Ladder(NamedTuple):
    """Requests over cached contexts with and without the rungs of the quality ladder."""

    contexts: int
    query: int
    soft: float  # λ
    refine: int  # m
    repeats: int  # of each time to the first token
    batches: tuple[int, ...]  # of decode steps


class Scale(NamedTuple):
    name: str
    shape: Shape
    engine: dict[str, Any]  # arguments of sgl.Engine, the same for every engine
    window: int
    prefix: int
    context: int
    query: int
    warm_up: int  # length of the first, dropped prefill
    ttft: dict[int, int]  # timed repeats by length of all contexts
    cold: dict[int, int]
    decode: tuple[tuple[int, int], ...]  # (length of all contexts, batch)
    overlap: tuple[Overlap, ...]
    ladder: Ladder
    decode_tokens: int
    decode_repeats: int
    e2e_length: int
    e2e_query: int
    e2e_tokens: int
    e2e_batches: dict[int, int]  # APE's repeats by batch; stock engines run each once
    plain_prefill: dict[int, int]  # timed repeats by length of the prompt
    plain_decode_prompt: int
    plain_batches: tuple[int, ...]
    mixed: Mixed

    @property
    def longest(self) -> int:
        lengths = [*self.ttft, *self.cold, *(length for length, _ in self.decode)]
        counts = [self.ladder.contexts, *(case.taken for case in self.overlap)]
        return max(*lengths, *(count * self.context for count in counts))


K = 1024

FULL = Scale(
    name="full",
    shape=LLAMA_8B,
    engine={"sampling_backend": "pytorch"},
    window=140_000,
    prefix=64,
    context=K,
    query=256,
    warm_up=8 * K,
    ttft={2 * K: 5, 8 * K: 5, 32 * K: 5, 128 * K: 3},
    cold={8 * K: 3, 32 * K: 3, 128 * K: 2},
    decode=((2 * K, 1), (32 * K, 1), (32 * K, 8), (32 * K, 32), (128 * K, 1)),
    overlap=(
        Overlap(32, 16, 32),
        Overlap(128, 128, 64),
        Overlap(32, 32, 1),
        Overlap(64, 8, 8, disjoint=True),
    ),
    ladder=Ladder(128, 64, soft=0.1, refine=2, repeats=7, batches=(1, 8)),
    decode_tokens=96,
    decode_repeats=2,
    e2e_length=128 * K,
    e2e_query=16,
    e2e_tokens=240,
    e2e_batches={1: 3, 4: 2},
    plain_prefill={256: 10, 2 * K: 7, 8 * K: 5},
    plain_decode_prompt=K,
    plain_batches=(1, 8, 32),
    mixed=Mixed(48, (64, 2048), (16, 128), rate=20.0, repeats=2),
)

TINY_SCALE = Scale(
    name="tiny",
    shape=TINY,
    engine={"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 4096},
    window=1024,
    prefix=8,
    context=16,
    query=16,
    warm_up=64,
    ttft={64: 2, 128: 2},
    cold={64: 2, 128: 2},
    decode=((64, 1), (64, 2), (128, 1)),
    overlap=(Overlap(4, 2, 3), Overlap(4, 2, 2, disjoint=True)),
    ladder=Ladder(4, 8, soft=0.1, refine=2, repeats=2, batches=(1, 2)),
    decode_tokens=12,
    decode_repeats=2,
    e2e_length=128,
    e2e_query=4,
    e2e_tokens=6,
    e2e_batches={1: 2, 2: 1},
    plain_prefill={16: 2, 64: 2},
    plain_decode_prompt=32,
    plain_batches=(1, 2),
    mixed=Mixed(4, (8, 32), (4, 8), rate=20.0, repeats=1),
)

SCALES = {scale.name: scale for scale in (FULL, TINY_SCALE)}
