"""Requests over HTTP: many at once for answers, one by one for times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
import orjson
from tqdm import tqdm

from benchmarks.common.server import ServerError

Body = dict[str, Any]
Answer = dict[str, Any]

ANSWER_SECONDS = 3600  # a cold prefill of everything on a CPU takes long
FLUSH_SECONDS = 60


class Refused(Exception):
    """The server answered with 400: this request cannot be served."""


class Timed(NamedTuple):
    """One streamed request. Seconds since just before it was sent."""

    first_token: float
    last_token: float
    meta: dict[str, Any]  # ``meta_info`` of the last chunk
    sent: float = 0.0  # when, by ``time.perf_counter``


class Client:
    """A server's native route.

    Args:
        url: where it listens.
        api_key: sent as a bearer token, if given.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def info(self) -> dict[str, Any]:
        """``GET /server_info``: the server's arguments and what it made of them."""
        return self._get("/server_info")

    def model_path(self) -> str:
        return self._get("/model_info")["model_path"]

    def flush(self) -> None:
        """Empty the KV cache; waits for requests that are still running.

        Raises:
            ServerError: the server stays busy.
        """
        answer = self._send("POST", "/flush_cache", params={"timeout": FLUSH_SECONDS})
        if answer.status_code != 200:
            raise ServerError(f"the cache could not be flushed: {answer.text[:500]}")

    def generate(
        self, bodies: Sequence[Body], concurrency: int = 1, label: str | None = None
    ) -> list[Answer | Refused]:
        """Answers in the order of the bodies; a refusal stands in the place of its answer.

        Args:
            bodies: of ``POST /generate``, one request each.
            concurrency: how many are under way at once.
            label: of the progress bar; None for no bar.

        Raises:
            ServerError: anything but an answer or a 400 came back.
        """
        return asyncio.run(self._generate(bodies, concurrency, label))

    def stream(
        self, bodies: Sequence[Body], concurrency: int | None = None, label: str | None = None
    ) -> list[Timed]:
        """Send bodies and note when their tokens arrive.

        Args:
            bodies: of ``POST /generate``, one request each.
            concurrency: how many are under way at once; None for all, sent at the same moment.
            label: of the progress bar; None for no bar.

        Raises:
            Refused: the server refuses one of them.
            ServerError: one does not come to an end.
        """
        return asyncio.run(self._stream(bodies, concurrency or len(bodies), label))

    def metrics(self) -> dict[str, float]:
        """``GET /metrics`` of a server with ``--enable-metrics``: sums over all labels, by name."""
        sums: dict[str, float] = {}
        for line in self._get_text("/metrics").splitlines():
            if line and not line.startswith("#"):
                name = line.partition("{")[0].partition(" ")[0]
                sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
        return sums

    def _get(self, path: str) -> dict[str, Any]:
        return orjson.loads(self._get_text(path))

    def _get_text(self, path: str) -> str:
        answer = self._send("GET", path)
        if answer.status_code != 200:
            raise ServerError(f"GET {path}: HTTP {answer.status_code}: {answer.text[:500]}")
        return answer.text

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return httpx.request(
                method,
                self.url + path,
                headers=self._headers,
                timeout=2 * FLUSH_SECONDS,
                trust_env=False,
                **more,
            )
        except httpx.TransportError as error:
            raise ServerError(f"{self.url} does not answer: {error!r}") from error

    def _session(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections)
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=ANSWER_SECONDS,
            limits=limits,
            trust_env=False,
        )

    async def _generate(
        self, bodies: Sequence[Body], concurrency: int, label: str | None
    ) -> list[Answer | Refused]:
        gate = asyncio.Semaphore(concurrency)
        bar = tqdm(total=len(bodies), desc=label, unit="request", disable=label is None)
        async with self._session(concurrency) as session:

            async def one(body: Body) -> Answer | Refused:
                async with gate:
                    answer = await self._post(session, body)
                bar.update()
                return answer

            with bar:
                return await asyncio.gather(*map(one, bodies))

    async def _post(self, session: httpx.AsyncClient, body: Body) -> Answer | Refused:
        try:
            answer = await session.post("/generate", content=orjson.dumps(body))
        except httpx.TransportError as error:
            raise ServerError(f"{self.url} went away: {error!r}") from error
        if answer.status_code == 400:
            return Refused(_message(answer.content))
        if answer.status_code != 200:
            raise ServerError(f"HTTP {answer.status_code}: {answer.text[:500]}")
        return answer.json()

    async def _stream(
        self, bodies: Sequence[Body], concurrency: int, label: str | None
    ) -> list[Timed]:
        gate = asyncio.Semaphore(concurrency)
        contents = [orjson.dumps({**body, "stream": True}) for body in bodies]
        bar = tqdm(total=len(bodies), desc=label, unit="request", disable=label is None)
        async with self._session(concurrency) as session:

            async def one(content: bytes) -> Timed:
                async with gate:
                    timed = await self._stream_one(session, content)
                bar.update()
                return timed

            with bar:
                return await asyncio.gather(*map(one, contents))

    async def _stream_one(self, session: httpx.AsyncClient, content: bytes) -> Timed:
        try:
            return await self._timed(session, content)
        except httpx.TransportError as error:
            raise ServerError(f"{self.url} went away: {error!r}") from error

    async def _timed(self, session: httpx.AsyncClient, content: bytes) -> Timed:
        begin = time.perf_counter()
        first = last = 0.0
        chunk = b""
        async with session.stream("POST", "/generate", content=content) as response:
            if response.status_code == 400:
                raise Refused(_message(await response.aread()))
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise ServerError(f"HTTP {response.status_code}: {text[:500]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = time.perf_counter() - begin
                    first = first or last
                    chunk = line.removeprefix("data: ").encode()
        end = orjson.loads(chunk) if chunk else {}
        # SGLang refuses an ordinary streamed prompt with status 200 and an error in the stream.
        if "error" in end and end["error"].get("code") == 400:
            raise Refused(_message(chunk))
        meta = end.get("meta_info")
        if not meta or meta.get("finish_reason") is None or "error" in end:
            raise ServerError(f"a stream did not come to an end: {chunk[:500]!r}")
        return Timed(first, last, meta, begin)


def _message(content: bytes) -> str:
    try:
        return orjson.loads(content)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return content.decode(errors="replace")[:500]


def computed_tokens(meta: dict[str, Any]) -> int:
    """Prompt tokens of one request that were not in the cache."""
    return meta["prompt_tokens"] - meta["cached_tokens"]
