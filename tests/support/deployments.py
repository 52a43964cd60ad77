"""The ways of running the engine that must all give the oracle's answer."""

from typing import NamedTuple


class Deployment(NamedTuple):
    """One server configuration; all have APE enabled."""

    name: str
    model: str  # name of the fixture that makes the checkpoint
    flags: tuple[str, ...]
    env: dict[str, str]
    pool_tokens: int
    caches: bool = True
    # SGLang 0.5.17 drops the log-probability of a token now and then when it retracts a request, on
    # a stock server too.
    loses_logprobs: bool = False
    tolerance: float = 1e-4  # of a log-probability
    by_attention: bool = False  # how contexts are scored
    # Of a score by attention, the logarithm of the square of a small difference.
    attention_tolerance: float = 2e-3

    @property
    def all_flags(self) -> tuple[str, ...]:
        return (
            *("--enable-ape", "--ape-max-context-tokens", "4000"),
            *("--max-total-tokens", str(self.pool_tokens)),
            *("--ape-max-pinned-tokens", str(self.pool_tokens // 4), *self.flags),
            *(("--ape-scorer", "attention") if self.by_attention else ()),
        )


DEPLOYMENTS = (
    Deployment("default", "tiny_llama", (), {}, 8192),
    Deployment(
        "qwen2, no overlap, msgpack, chunks of 16",
        "tiny_qwen2",
        ("--disable-overlap-schedule", "--chunked-prefill-size", "16"),
        {"SGLANG_USE_PICKLE_IPC": "false"},
        8192,
    ),
    Deployment(
        "small pool, forced retraction",
        "tiny_llama",
        (),
        {"SGLANG_TEST_RETRACT": "true"},
        1000,
        loses_logprobs=True,
    ),
    Deployment(
        "mixed chunks, longest prefix match",
        "tiny_llama",
        ("--enable-mixed-chunk", "--schedule-policy", "lpm", "--chunked-prefill-size", "16"),
        {},
        8192,
        by_attention=True,
    ),
    Deployment(
        "no radix cache",
        "tiny_llama",
        ("--disable-radix-cache",),
        {},
        8192,
        caches=False,
        by_attention=True,
    ),
)
