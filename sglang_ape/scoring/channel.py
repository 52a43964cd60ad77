"""Fetching measured scores from the scheduler, over SGLang's control channel.

An answer to a request could carry them (``customized_info``), but then SGLang adds the field to
every request that is answered with it.

Source: as ``store.channel``.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import BaseReq
from sglang.utils import TypeBasedDispatcher

from sglang_ape.attention.mass import finished


class ApeScoresReqInput(BaseReq):
    """Whose scores."""

    measured: str  # id of the request


class ApeScoresReqOutput(BaseReq):
    """The scores of its contexts as they were sent; None if there are none."""

    scores: list[float] | None


def answer_messages(scheduler: Any) -> None:
    """Have a scheduler answer these messages."""
    _register_types()
    handlers = [(ApeScoresReqInput, partial(answer, scheduler))]
    scheduler._request_dispatcher += TypeBasedDispatcher(handlers)


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
        _register_types()
        self._manager = manager
        self._communicator: Any = FanOutCommunicator(manager._dispatch_to_scheduler, fan_out=1)
        handlers = [(ApeScoresReqOutput, self._communicator.handle_recv)]
        manager._result_dispatcher += TypeBasedDispatcher(handlers)

    async def take(self, rid: str) -> list[float]:
        """The scores of a request that has ended, once.

        Raises:
            RuntimeError: the scheduler has none.
        """
        self._manager.auto_create_handle_loop()
        message = ApeScoresReqInput(measured=rid)
        # Shielded: the answer to a question that was given up would be taken for the next one's.
        scores = (await asyncio.shield(self._communicator(message)))[0].scores
        if scores is None:
            raise RuntimeError(f"the scheduler has no scores of {rid}")
        return scores


def _register_types() -> None:
    """Let SGLang's message decoder know both types, in this process."""
    io_struct.hook_custom_types(ApeScoresReqInput, ApeScoresReqOutput)
