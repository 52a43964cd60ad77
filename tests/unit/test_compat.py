"""What is mended in SGLang 0.5.17: log-probabilities of prompts beside retracted requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.compat.v0_5_17 import before_process_batch_result_prefill

Prompt = tuple[int, int, bool, bool, int]  # new tokens, first with a log-probability, states

prompts = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        st.just(size), st.integers(0, size), st.booleans(), st.booleans(), st.integers(0, 1)
    )
)


class _Copy:
    """Of log-probabilities from a GPU: nothing is there before it was waited for."""

    def __init__(self, target: torch.Tensor, values: torch.Tensor) -> None:
        self._target, self._values = target, values

    def synchronize(self) -> None:
        self._target.copy_(self._values)


def _request(prompt: Prompt) -> SimpleNamespace:
    _, _, is_retracted, is_finished, chunks = prompt
    return SimpleNamespace(
        is_retracted=is_retracted, finished=lambda: is_finished, inflight_middle_chunks=chunks
    )


def _run(batch: list[Prompt], is_ape: bool = True, returns: bool = True) -> Any:
    """The result after the hook; the log-probability of a token is the index of its prompt."""
    counts = [size - first for size, first, *_ in batch]
    values = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).float()
    arriving = torch.full_like(values, torch.nan)
    result = SimpleNamespace(
        logits_output=SimpleNamespace(input_token_logprobs=arriving if returns else None),
        copy_done=_Copy(arriving, values),
        extend_input_len_per_req=[size for size, *_ in batch],
        extend_logprob_start_len_per_req=[first for _, first, *_ in batch],
    )
    processor = SimpleNamespace(
        server_args=SimpleNamespace(enable_ape=is_ape),
        logprob_result_processor=SimpleNamespace(
            calculate_num_input_logprobs=lambda req, size, first: size - first
        ),
    )
    scheduled = SimpleNamespace(reqs=list(map(_request, batch)), return_logprob=True)
    before_process_batch_result_prefill(processor, scheduled, result)
    result.copy_done.synchronize()  # SGLang's own call
    return result.logits_output.input_token_logprobs


@settings(deadline=None)
@given(st.lists(prompts, min_size=1, max_size=6))
def test_a_reader_that_passes_over_requests_finds_each_ones_own_part(batch: list[Prompt]) -> None:
    left = _run(batch).tolist()
    for i, (size, first, is_retracted, is_finished, chunks) in enumerate(batch):
        if is_retracted or (is_finished and chunks == 0):
            continue
        own, left = left[: size - first], left[size - first :]
        assert own == [i] * (size - first)
    assert not left


def test_without_ape_or_without_log_probabilities_nothing_is_touched() -> None:
    batch: list[Prompt] = [(3, 0, True, False, 0), (2, 0, False, False, 0)]
    assert _run(batch, is_ape=False).tolist() == [0, 0, 0, 1, 1]
    assert _run(batch, returns=False) is None
