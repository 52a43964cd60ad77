"""SGLang 0.5.17: new fields on ``ServerArgs``, and a fault in log-probabilities of prompts.

``ServerArgs`` is a plain dataclass there; the command line, ``Engine(**kwargs)`` and
``/server_info`` all follow its fields (``server_args.py``, ``arg_groups/arg_utils.py``). The class
object must stay the same, because ``Engine.server_args_class`` holds it, so the fields are added
in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sglang_ape.arguments import Flag


def extend_server_args(flags: Sequence[Flag]) -> None:
    """Add ``flags`` to ``ServerArgs``; a second call changes nothing."""
    from sglang.srt import server_args
    from sglang.srt.arg_groups import arg_utils

    cls = server_args.ServerArgs
    if flags[0].name in cls.__dataclass_fields__:
        return
    for field in dataclasses.fields(cls):  # dataclass() removed these class attributes
        if field.default_factory is not dataclasses.MISSING:
            factory = dataclasses.field(
                default_factory=field.default_factory, repr=field.repr, init=field.init
            )
            setattr(cls, field.name, factory)
    for flag in flags:
        cls.__annotations__[flag.name] = arg_utils.A[flag.type, arg_utils.Arg(help=flag.help)]
        setattr(cls, flag.name, flag.default)
    for generated in ("__init__", "__repr__", "__eq__", "__match_args__"):
        if generated in cls.__dict__:  # dataclass() does not overwrite what is there
            delattr(cls, generated)
    dataclasses.dataclass(cls)
    arg_utils.namespace_of.cache_clear()
    arg_utils.resolvable_fields.cache_clear()


def before_process_batch_result_prefill(processor: Any, batch: Any, result: Any) -> None:
    """BEFORE hook on ``SchedulerBatchResultProcessor.process_batch_result_prefill``: each prompt
    gets its own log-probabilities.

    Those of a whole batch come in one list. There (``scheduler_components/
    batch_result_processor.py``) a request that was retracted while the batch ran is passed over
    without its part of the list, and all behind it get those of another prompt
    (sgl-project/sglang#36938). Such parts are taken out here.
    """
    if not (processor.server_args.enable_ape and batch.return_logprob):
        return
    logprobs = result.logits_output.input_token_logprobs
    if logprobs is None or not any(map(_is_passed_over, batch.reqs)):
        return
    if result.copy_done is not None:  # they come from the GPU
        result.copy_done.synchronize()
    count_of = processor.logprob_result_processor.calculate_num_input_logprobs
    counts = map(
        count_of,
        batch.reqs,
        result.extend_input_len_per_req,
        result.extend_logprob_start_len_per_req,
    )
    parts = zip(batch.reqs, logprobs.split(list(counts)), strict=True)
    kept = [part for req, part in parts if not _is_passed_over(req)]
    result.logits_output.input_token_logprobs = torch.cat([logprobs[:0], *kept])


def _is_passed_over(req: Any) -> bool:
    return req.is_retracted or (req.finished() and req.inflight_middle_chunks <= 0)
