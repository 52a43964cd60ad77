"""Fetching measured scores from the scheduler, over SGLang's control channel.

An answer to a request could carry them (``customized_info``), but then SGLang adds the field to
every request that is answered with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.managers.io_struct import BaseReq

from sglang_ape.attention.mass import finished
from sglang_ape.control import Asker, serve


class ApeScoresReqInput(BaseReq):
    """Whose scores."""

    measured: str  # id of the request


class ApeScoresReqOutput(BaseReq):
    """The scores of its contexts as they were sent; None if there are none."""

    scores: list[float] | None


def answer_messages(scheduler: Any) -> None:
    """Have a scheduler, on any rank, answer these messages."""
    serve(scheduler, ApeScoresReqInput, ApeScoresReqOutput, partial(answer, scheduler))


def answer(scheduler: Any, request: ApeScoresReqInput) -> ApeScoresReqOutput:
    """Every rank of a tensor-parallel group is asked, and has measured its own heads."""
    all_reduce = None
    if scheduler.server_args.tp_size > 1:
        all_reduce = partial(torch.distributed.all_reduce, group=scheduler.tp_cpu_group)
    return ApeScoresReqOutput(scores=finished.take(request.measured, all_reduce))


class ScoresChannel:
    """The main process's end.

    Args:
        manager: the ``TokenizerManager``, whose sockets are used.
    """

    def __init__(self, manager: Any) -> None:
        self._ask = Asker(manager, ApeScoresReqInput, ApeScoresReqOutput)

    async def take(self, rid: str) -> list[float]:
        """The scores of a request that has ended, once.

        Raises:
            RuntimeError: the scheduler has none.
        """
        scores = (await self._ask(ApeScoresReqInput(measured=rid))).scores
        if scores is None:
            raise RuntimeError(f"the scheduler has no scores of {rid}")
        return scores
