"""Requests to one running engine, timed from before the call to the token's arrival here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu_speed.texts import Prompt
from benchmarks.gpu_speed.timing import Stream

TEMPERATURE = SCALE = 0.9  # of APE's contexts


Rung = Mapping[str, float]  # ``soft`` or ``refine`` of the field ``ape``
NO_RUNG: Rung = {}


class Answer(NamedTuple):
    seconds: float
    cached_tokens: int
    scored_tokens: int = 0
    refined_tokens: int = 0
    scores: tuple[float, ...] = ()  # of the contexts, if they were scored


class Client:
    """``parallel``: contexts are sent as contexts, otherwise as one sequence."""

    def __init__(self, engine: Any, parallel: bool) -> None:
        self._engine = engine
        self.parallel = parallel

    def first_token(self, prompt: Prompt, rung: Rung = NO_RUNG) -> Answer:
        """The whole ``Engine.generate`` call for one token."""
        call = self._call(prompt, 1, rung)
        start = time.perf_counter()
        meta = self._engine.generate(**call)["meta_info"]
        seconds = time.perf_counter() - start
        spent = meta.get("ape", {})
        return Answer(
            seconds,
            meta["cached_tokens"],
            spent.get("scored_tokens", 0),
            spent.get("refined_tokens", 0),
            tuple(context["score"] for context in meta.get("contexts", ())),
        )

    def stream(
        self,
        prompts: Sequence[Prompt],
        new_tokens: Sequence[int],
        delays: Sequence[float] = (),
        rung: Rung = NO_RUNG,
    ) -> list[Stream]:
        """Send requests at once, or each after its delay, and note when their tokens arrive."""
        calls = [self._call(*request, rung) for request in zip(prompts, new_tokens, strict=True)]
        return self._engine.loop.run_until_complete(
            self._stream_all(calls, delays or [0.0] * len(calls))
        )

    def flush(self) -> None:
        """Empty the cache.

        Raises:
            RuntimeError: the engine stays busy.
        """
        for _ in range(50):
            if self._engine.flush_cache().success:
                return
            time.sleep(0.1)
        raise RuntimeError("the cache could not be flushed: requests are still running")

    def _call(self, prompt: Prompt, new_tokens: int, rung: Rung = NO_RUNG) -> dict[str, Any]:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        if not self.parallel or not prompt.documents.contexts:
            return {"input_ids": prompt.sequence, "sampling_params": sampling}
        return {
            "input_ids": prompt.query,
            "prefix_ids": prompt.documents.prefix,
            "contexts": [{"input_ids": ids} for ids in prompt.documents.contexts],
            "ape": {"temperature": TEMPERATURE, "scale": SCALE, **rung},
            "sampling_params": sampling,
        }

    async def _stream_all(
        self, calls: list[dict[str, Any]], delays: Sequence[float]
    ) -> list[Stream]:
        pairs = zip(calls, delays, strict=True)
        return await asyncio.gather(*(self._stream_one(call, delay) for call, delay in pairs))

    async def _stream_one(self, call: dict[str, Any], delay: float) -> Stream:
        if delay:
            await asyncio.sleep(delay)
        sent = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        meta: dict[str, Any] = {}
        async for chunk in await self._engine.async_generate(**call, stream=True):
            meta = chunk["meta_info"]
            tokens = meta["completion_tokens"]
            if not arrivals or tokens > arrivals[-1][1]:
                arrivals.append((time.perf_counter(), tokens))
        wanted = call["sampling_params"]["max_new_tokens"]
        if not arrivals or arrivals[-1][1] != wanted:
            raise RuntimeError(f"{wanted} tokens were asked for, the last chunk says {meta}")
        return Stream(sent, arrivals, meta["cached_tokens"])
