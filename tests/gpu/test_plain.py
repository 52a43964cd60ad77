"""Plain requests on an enabled server are stock SGLang's, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.models import Shape
from tests.support.server import Server

_SHAPE = Shape(num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16)
_FLAGS = (
    *("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", "flashinfer"),
    *("--mem-fraction-static", "0.2", "--cuda-graph-max-bs", "16", "--max-total-tokens", "8192"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
)
_SAMPLING = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}


def _answers(model: Path, flags: tuple[str, ...], log: Path) -> list[Any]:
    rng = random.Random(3)
    lengths = (3, 40, 200, 700)
    prompts = [[rng.randrange(4, 512) for _ in range(length)] for length in lengths]
    prompts += [prompts[2][:150] + prompts[1]]  # a cached prefix
    with Server(model, (*_FLAGS, *flags), log) as server:
        answers = [
            server.generate(
                {"input_ids": ids, "sampling_params": _SAMPLING, "return_logprob": True}
            )
            for ids in prompts
        ]
        if "--enable-ape" in flags:  # contexts in between leave no trace
            body = {"prefix_ids": prompts[0], "contexts": [{"input_ids": prompts[1]}]}
            server.generate({**body, "input_ids": prompts[0], "sampling_params": _SAMPLING})
        batch = {"input_ids": prompts, "sampling_params": _SAMPLING, "return_logprob": True}
        answers += server.generate(batch)
    return [
        (answer["output_ids"], answer["meta_info"]["output_token_logprobs"]) for answer in answers
    ]


@pytest.mark.timeout(400)
def test_plain_requests_equal_stock_bit_for_bit(tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path / "model", _SHAPE)
    stock = _answers(model, (), tmp_path / "stock.log")
    enabled = _answers(
        model, ("--enable-ape", "--ape-max-context-tokens", "4000"), tmp_path / "ape.log"
    )
    assert enabled == stock
