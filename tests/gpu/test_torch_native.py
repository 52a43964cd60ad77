"""The engine on a GPU, with torch_native attention in fp16, equals the oracle within rounding.

SGLang's normalisation kernels on CUDA take no fp32.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import Completion, Oracle

TOLERANCE = 0.1  # of a log-probability; the weights' own rounding to fp16 moves them by about .02
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[Any]:
    import sglang

    engine = sglang.Engine(
        model_path=str(tiny_llama),
        enable_ape=True,
        attention_backend="torch_native",
        dtype="float16",
        max_total_tokens=8192,
        ape_max_context_tokens=4000,
        chunked_prefill_size=64,
        sampling_backend="pytorch",
        log_level="warning",
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path) -> Oracle:
    return Oracle(tiny_llama)


def _ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(4, 512) for _ in range(length)]


def _assert_equal(answer: dict[str, Any], expected: Completion) -> None:
    """Each served token is the oracle's best or as good within rounding, up to the first of the
    latter kind, behind which the two texts part.
    """
    for (served, token, *_), logits, best in zip(
        answer["meta_info"]["output_token_logprobs"],
        expected.logits,
        expected.token_ids,
        strict=True,
    ):
        logprobs = logits.log_softmax(-1)
        assert abs(served - logprobs[token].item()) <= TOLERANCE
        if token != best:
            assert (logprobs[best] - logprobs[token]).item() <= TOLERANCE
            return


@pytest.mark.parametrize("lens", [(7, 40, 3, 19), (12,) * 300, (1, 1, 9), (30, 30)], ids=len)
def test_cold_warm_and_permuted_requests_equal_the_oracle(
    engine: Any, oracle: Oracle, lens: tuple[int, ...]
) -> None:
    rng = random.Random(len(lens))
    prefix, query = _ids(rng, 5), _ids(rng, 6)
    contexts = [_ids(rng, length) for length in lens]
    expected = oracle.generate(prefix, contexts, query, 8, 0.8, 0.9)
    for order in (contexts, contexts, contexts[::-1]):
        answer = engine.generate(
            input_ids=query,
            prefix_ids=prefix,
            contexts=[{"input_ids": ids} for ids in order],
            ape={"temperature": 0.8, "scale": 0.9},
            sampling_params=SAMPLING,
            return_logprob=True,
        )
        _assert_equal(answer, expected)
    assert answer["meta_info"]["cached_tokens"] >= len(prefix) + sum(lens)


def test_a_batch_of_different_settings_equals_the_oracle(engine: Any, oracle: Oracle) -> None:
    rng = random.Random(9)
    prefix, query = _ids(rng, 5), _ids(rng, 6)
    contexts = [_ids(rng, length) for length in (31, 8, 16)]
    settings = [(0.9, 0.9), (0.2, 0.8), (1.0, 1.0), (2.0, 0.5)]
    answers = engine.generate(
        input_ids=[query] * len(settings),
        prefix_ids=prefix,
        contexts=[[{"input_ids": ids} for ids in contexts]] * len(settings),
        ape=[{"temperature": t, "scale": s} for t, s in settings],
        sampling_params=SAMPLING,
        return_logprob=True,
    )
    for answer, (t, s) in zip(answers, settings, strict=True):
        _assert_equal(answer, oracle.generate(prefix, contexts, query, 8, t, s))


def test_plain_requests_beside_contexts_equal_the_oracle(engine: Any, oracle: Oracle) -> None:
    rng = random.Random(10)
    ids = _ids(rng, 70)
    answer = engine.generate(input_ids=ids, sampling_params=SAMPLING, return_logprob=True)
    _assert_equal(answer, oracle.generate_plain(ids, 8))
