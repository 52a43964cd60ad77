"""Every situation on two GPUs with tensor parallelism."""

from collections.abc import Iterator

import pytest
import torch

from tests.engine.test_oracle_equality import *  # noqa: F403  the situations
from tests.engine.test_oracle_equality import Bench
from tests.support import models
from tests.support.deployments import Deployment
from tests.support.models import Shape
from tests.support.oracle import Oracle
from tests.support.server import Server

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")

_SHAPE = Shape(num_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
_DEPLOYMENT = Deployment(
    "two GPUs",
    "tiny_llama",
    (
        *("--device", "cuda", "--dtype", "bfloat16", "--tp-size", "2"),
        *("--mem-fraction-static", "0.2", "--cuda-graph-max-bs", "16"),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    ),
    {},
    8192,
    tolerance=0.4,  # as in test_flashinfer.py
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    model = models.tiny_llama(tmp_path_factory.mktemp("model"), _SHAPE)
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(model, _DEPLOYMENT.all_flags, log, _DEPLOYMENT.env) as server:
        yield Bench(_DEPLOYMENT, server, Oracle(model))
