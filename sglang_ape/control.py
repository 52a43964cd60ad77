"""Messages of our own on SGLang's control channel, from the main process to schedulers and back.

A message goes the way of ``/flush_cache``: over ZMQ to rank 0 and from there to every other rank,
in one order for all; rank 0's answer comes back.

Source: ``managers/communicator.py`` and ``managers/tokenizer_control_mixin.py`` of SGLang 0.5.17.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sglang.srt.managers import io_struct
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import BaseReq
from sglang.utils import TypeBasedDispatcher

Question = TypeVar("Question", bound=BaseReq)
Answer = TypeVar("Answer", bound=BaseReq)


def serve(
    scheduler: Any,
    question: type[Question],
    answer: type[Answer],
    reply: Callable[[Question], Answer],
) -> None:
    """Have a scheduler, on any rank, reply to questions of a type."""
    io_struct.hook_custom_types(question, answer)
    scheduler._request_dispatcher += TypeBasedDispatcher([(question, reply)])


class Asker(Generic[Question, Answer]):
    """The main process's end.

    Args:
        manager: the ``TokenizerManager``, whose sockets are used.
        question: the type of what is asked.
        answer: the type of what comes back.
    """

    def __init__(self, manager: Any, question: type[Question], answer: type[Answer]) -> None:
        io_struct.hook_custom_types(question, answer)
        self._manager = manager
        self._communicator: Any = FanOutCommunicator(manager._dispatch_to_scheduler, fan_out=1)
        handlers = [(answer, self._communicator.handle_recv)]
        manager._result_dispatcher += TypeBasedDispatcher(handlers)

    async def __call__(self, message: Question) -> Answer:
        """Ask, one question after another."""
        self._manager.auto_create_handle_loop()
        # Shielded: the answer to a question that was given up would be taken for the next one's.
        return (await asyncio.shield(self._communicator(message)))[0]
