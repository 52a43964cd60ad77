"""Every situation of the CPU's oracle tests on FlashInfer attention, in half precision.

The checkpoints are stored in the type they run in, so that what differs from the oracle, which
computes the same weights in fp32, is the rounding of activations, keys and values alone.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from sglang_ape.attention.flashinfer import TEST_ALWAYS_SHARE
from tests.engine.test_oracle_equality import *  # noqa: F403  the situations
from tests.engine.test_oracle_equality import Bench, request_body
from tests.support import models
from tests.support.deployments import Deployment
from tests.support.models import Shape
from tests.support.oracle import Oracle
from tests.support.server import Server

_FLAGS = (
    *("--device", "cuda", "--mem-fraction-static", "0.2", "--cuda-graph-max-bs", "16"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
)
_NO_PREFILL_GRAPHS = ("--cuda-graph-backend-prefill", "disabled")
_METRICS = ("--enable-metrics",)
_ALWAYS_SHARE = {TEST_ALWAYS_SHARE: "1"}
_BF16 = Shape(num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16)
_FP16 = Shape(num_heads=4, num_kv_heads=1, head_dim=64, dtype=torch.float16)
_FP16_MHA = _FP16._replace(num_kv_heads=4)
# What the rounding of activations alone does to a log-probability of these models, with room: seen
# on the CPU with attention in fp32, it is up to 0.22 in bf16 and 0.015 in fp16.
_BF16_TOLERANCE = 0.4
_FP16_TOLERANCE = 0.04
_FP16_BY_ATTENTION = {"by_attention": True, "attention_tolerance": 0.3}


class GpuDeployment(NamedTuple):
    """A deployment and the shape of its checkpoint."""

    shape: Shape
    deployment: Deployment


def _deployment(
    name: str, model: str, shape: Shape, flags: tuple[str, ...], tolerance: float, **given: object
) -> GpuDeployment:
    dtype = str(shape.dtype).removeprefix("torch.")
    values = {"env": {}, "pool_tokens": 8192, **given}
    flags = (*_FLAGS, "--dtype", dtype, *flags)
    return GpuDeployment(
        shape,
        Deployment(name=name, model=model, flags=flags, tolerance=tolerance, **values),  # type: ignore[arg-type]
    )


DEPLOYMENTS = (
    _deployment("bf16-graphs", "tiny_llama", _BF16, (), _BF16_TOLERANCE),
    _deployment(
        "fp16-mha-qkv-bias-no-overlap-chunks",
        "tiny_qwen2",
        _FP16_MHA,
        ("--disable-overlap-schedule", "--chunked-prefill-size", "16", *_NO_PREFILL_GRAPHS),
        _FP16_TOLERANCE,
    ),
    _deployment(
        "fp16-small-pool-retraction",
        "tiny_llama",
        _FP16,
        _NO_PREFILL_GRAPHS,
        _FP16_TOLERANCE,
        env={"SGLANG_TEST_RETRACT": "true"},
        pool_tokens=1000,
        loses_logprobs=True,
    ),
    _deployment(
        "fp16-mixed-chunks-lpm",
        "tiny_llama",
        _FP16,
        (
            *("--enable-mixed-chunk", "--schedule-policy", "lpm", "--chunked-prefill-size", "16"),
            *_NO_PREFILL_GRAPHS,
        ),
        _FP16_TOLERANCE,
        **_FP16_BY_ATTENTION,
    ),
    _deployment(
        "fp16-no-cache-no-graphs",
        "tiny_llama",
        _FP16,
        ("--disable-radix-cache", "--disable-cuda-graph"),
        _FP16_TOLERANCE,
        caches=False,
        **_FP16_BY_ATTENTION,
    ),
    _deployment(
        "bf16-shared",
        "tiny_llama",
        _BF16,
        (*_METRICS, *_NO_PREFILL_GRAPHS),
        _BF16_TOLERANCE,
        env=_ALWAYS_SHARE,
    ),
    _deployment(
        "fp16-shared-small-pool-retraction",
        "tiny_llama",
        _FP16_MHA,
        (*_METRICS, *_NO_PREFILL_GRAPHS),
        _FP16_TOLERANCE,
        env={"SGLANG_TEST_RETRACT": "true", **_ALWAYS_SHARE},
        pool_tokens=1000,
        loses_logprobs=True,
    ),
    _deployment(
        "bf16-fp8-kv-shared-no-graphs",
        "tiny_llama",
        _BF16,
        ("--kv-cache-dtype", "fp8_e4m3", "--disable-cuda-graph", *_METRICS),
        1.0,
        env=_ALWAYS_SHARE,
    ),
    _deployment(
        "bf16-fp8-kv",
        "tiny_llama",
        _BF16,
        ("--kv-cache-dtype", "fp8_e4m3", *_NO_PREFILL_GRAPHS),
        1.0,  # keys and values are rounded to 3 bits
    ),
)


@pytest.fixture(scope="module", params=DEPLOYMENTS, ids=lambda given: given.deployment.name)
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    shape, deployment = request.param
    write = getattr(models, deployment.model)
    model = write(tmp_path_factory.mktemp("model"), shape)
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(model, deployment.all_flags, log, deployment.env) as server:
        yield Bench(deployment, server, Oracle(model))


def test_requests_that_overlap_share_the_reading_of_contexts(bench: Bench) -> None:
    if TEST_ALWAYS_SHARE not in bench.deployment.env:
        pytest.skip("contexts of this size are read apart")
    before = _shared_steps(bench)
    prefix, documents = bench.ids(9), bench.texts(60, 45, 80, 30)
    jobs = []
    for i in range(12):
        chosen = bench.rng.sample(documents, 1 + i % 4)
        query, new_tokens = bench.ids(3 + i), 6 + 2 * i
        expected = bench.oracle.generate(prefix, chosen, query, new_tokens, 0.9, 0.9)
        jobs.append((request_body(prefix, chosen, query, 0.9, 0.9, new_tokens), expected))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(bench.server.generate, [body for body, _ in jobs]))
    for answer, (_, expected) in zip(answers, jobs, strict=True):
        bench.assert_equal(answer, expected)
    assert _shared_steps(bench) > before


def _shared_steps(bench: Bench) -> float:
    found = re.findall(
        r'^sglang:ape_decode_steps_total\{.*reads="shared".*\} (\S+)$',
        bench.server.client.get("/metrics").text,
        re.MULTILINE,
    )
    return sum(map(float, found))
