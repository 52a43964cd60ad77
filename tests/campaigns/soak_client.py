"""The clients of the soak: they ask, abort, disconnect, register, forget, and judge what comes."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from tests.campaigns.soak_jobs import TENANTS, Corpus, Ids, Job, Place
from tests.campaigns.soak_requests import (
    Answer,
    Ask,
    Fate,
    answer_of_stream,
    answers_of,
    faults_in,
)

HANG_SECONDS = 120

VISIT_TOKENS = 4  # that a new tenant is answered

_ABORTED_EARLY = "aborted before the first token"
_ABORTED_LATE = "aborted after some tokens"
_NO_ROOM = "refused: no room beside the pins"


class Pool(NamedTuple):
    """Of the server, in tokens."""

    usable: int  # what one request can have
    max_pinned: int


class Outcome(NamedTuple):
    """What became of a request."""

    label: str
    faults: tuple[str, ...] = ()


class Refused(Exception):
    """A status, or an event in a stream, that is no answer."""

    def __init__(self, status: int, error: Any) -> None:
        super().__init__(f"status {status}: {error}")
        self.status = status
        self.error: Mapping[str, Any] = error if isinstance(error, dict) else {"message": error}

    @property
    def message(self) -> str:
        return str(self.error.get("message", ""))

    @property
    def param(self) -> str:
        return str(self.error.get("param"))


class Presence:
    """Which contexts the server surely knows: it answered a registration, and no DELETE since."""

    def __init__(self) -> None:
        self._clock = 0
        self._deleting: Counter[Place] = Counter()
        self._last_delete: dict[Place, int] = {}  # the clock at its begin or end
        self._known_since: dict[Place, int] = {}

    def now(self) -> int:
        self._clock += 1
        return self._clock

    def registered(self, place: Place, begun: int) -> None:
        """A registration that was begun at that time succeeded."""
        if not self._deleting[place] and self._last_delete.get(place, 0) < begun:
            self._known_since[place] = self.now()

    def deleting(self, place: Place) -> None:
        self._deleting[place] += 1
        self._last_delete[place] = self.now()
        self._known_since.pop(place, None)

    def deleted(self, place: Place) -> None:
        self._deleting[place] -= 1
        self._last_delete[place] = self.now()

    def held_since(self, place: Place, begun: int) -> bool:
        """Whether the server has surely known it from that time until now."""
        known = self._known_since.get(place)
        return known is not None and known < begun


class Clients:
    """Everything that talks to the server.

    Args:
        session: for whole requests.
        ids: of contexts by place; a registration has to give these again.
    """

    def __init__(
        self, session: httpx.AsyncClient, corpus: Corpus, ids: dict[Place, str], pool: Pool
    ) -> None:
        self._session = session
        self._corpus = corpus
        self._ids = ids
        self._pool = pool
        self.presence = Presence()
        self.beside: Counter[str] = Counter()  # what the calls beside the requests came to
        self.faults: list[str] = []  # of these calls

    # ------------------------------------------------------------ requests

    async def ask(self, ask: Ask) -> Outcome:
        """Send a request, let it come to its end, and judge that."""
        begun = self.presence.now()
        try:
            if ask.fate in (Fate.HALF_BODY, Fate.WHOLE_BODY):
                return await self._send_and_leave(ask)
            if ask.fate is Fate.ABORT:
                return await self._abort(ask)
            if ask.fate is Fate.NO_ANSWER:
                return await self._leave_while_waiting(ask)
            return await self._receive(ask)
        except Refused as refused:
            return self._judge_refusal(ask, refused, begun)
        except httpx.TimeoutException:
            return Outcome("hung", (f"no end within {HANG_SECONDS} s",))
        except (httpx.TransportError, OSError) as error:
            return Outcome("broken", (f"the connection broke: {error!r}",))

    async def _receive(self, ask: Ask) -> Outcome:
        """Read the answer, or as much of it as the client stays for."""
        answers, left = await self._read(ask)
        # A request that later pins keep out gets 400; SGLang ends a stream as one that is aborted.
        kept_out = ask.kind.streams and self._pins_may_keep_out(ask)
        faults = tuple(faults_in(ask, answers, partial=left, may_abort=kept_out))
        if faults:
            return Outcome("wrong", faults)
        if left:
            return Outcome(ask.fate.value)
        aborted = [answer for answer in answers if answer.finish == "abort"]
        if aborted and ask.fate is not Fate.ABORT:
            return Outcome(_NO_ROOM)
        if aborted:
            return Outcome(_ABORTED_LATE if any(one.tokens for one in aborted) else _ABORTED_EARLY)
        return Outcome("completed and equal")

    async def _abort(self, ask: Ask) -> Outcome:
        receiving = asyncio.create_task(self._receive(ask))
        await asyncio.wait([receiving], timeout=ask.delay)
        if not receiving.done():
            rid = ask.body["rid"]
            one = rid if isinstance(rid, str) else rid[ask.number % len(rid)]
            await self._session.post("/abort_request", json={"rid": one})
        return await receiving

    async def _leave_while_waiting(self, ask: Ask) -> Outcome:
        receiving = asyncio.create_task(self._receive(ask))
        await asyncio.wait([receiving], timeout=ask.delay)
        if receiving.done():
            return await receiving
        receiving.cancel()
        with suppress(asyncio.CancelledError):
            await receiving
        return Outcome(ask.fate.value)

    async def _send_and_leave(self, ask: Ask) -> Outcome:
        """Close the connection within the body, or right behind it."""
        url = urlsplit(str(self._session.base_url))
        body = json.dumps(ask.body).encode()
        head = (
            f"POST {ask.kind.path} HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(head + (body[: len(body) // 2] if ask.fate is Fate.HALF_BODY else body))
        await writer.drain()
        await asyncio.sleep(ask.delay / 10)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return Outcome(ask.fate.value)

    async def _read(self, ask: Ask) -> tuple[list[Answer], bool]:
        """The answers, and whether the client left before their end."""
        if not ask.kind.streams:
            response = await self._session.post(ask.kind.path, json=ask.body)
            _check(response)
            return answers_of(ask, response.json()), False
        events: list[Any] = []
        leaves = ask.fate in (Fate.FIRST_EVENT, Fate.MID_STREAM)
        async with self._session.stream("POST", ask.kind.path, json=ask.body) as response:
            if response.status_code != 200:
                await response.aread()
            _check(response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return [answer_of_stream(ask, events)], False
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Refused(event["error"].get("code", 0), event["error"])
                events.append(event)
                if leaves and len(events) == ask.events:
                    return [answer_of_stream(ask, events)], True
        raise Refused(0, f"the stream ended without [DONE] after {len(events)} events")

    def _judge_refusal(self, ask: Ask, refused: Refused, begun: int) -> Outcome:
        """A refusal has to have a reason that this client knows of."""
        if refused.status == 400:
            if refused.param.endswith(".id") and not all(
                self.presence.held_since(place, begun) for place in ask.places
            ):
                return Outcome("refused: an id that was deleted")
            if "pinned" in refused.message and self._pins_may_keep_out(ask):
                return Outcome(_NO_ROOM)
        # SGLang's answer to several samples whose prompt it is still encoding.
        if ask.fate is Fate.ABORT and refused.status == 499 and "aborted" in refused.message:
            return Outcome(_ABORTED_EARLY)
        return Outcome("refused without a known reason", (str(refused),))

    def _pins_may_keep_out(self, ask: Ask) -> bool:
        room = self._pool.usable - self._pool.max_pinned
        return ask.needed_tokens(self._corpus) > room

    # ------------------------------------------------------------ beside them

    async def register(self, places: list[Place], pin: bool) -> None:
        """Register documents of one tenant after one prefix."""
        begun = self.presence.now()
        response = await self._session.post("/ape/contexts", json=self._registration(places, pin))
        if pin and response.status_code == 507 and response.json()["error"]["param"] == "pin":
            self.beside["POST /ape/contexts: refused, beyond the cap of pins"] += 1
            return
        if response.status_code != 200:
            self.faults.append(
                f"register {places}, pin {pin}: {response.status_code}: {response.text}"
            )
            return
        self.beside[f"POST /ape/contexts: done, {'pinned' if pin else 'not pinned'}"] += 1
        for place, context in zip(places, response.json()["contexts"], strict=True):
            self.presence.registered(place, begun)
            known = self._ids.setdefault(place, context["id"])
            if (context["id"], context["tokens"]) != (known, len(self._document(place))):
                self.faults.append(f"register {places}: {context}, and before it was {known}")

    async def register_for_ever(self, rng: random.Random) -> None:
        """Register, and sometimes leave before the answer."""
        while True:
            prefix = rng.randrange(len(self._corpus.prefixes))
            numbers = rng.sample(range(len(self._corpus.documents)), k=rng.randint(1, 4))
            tenant = rng.choice(TENANTS)
            places = [Place(tenant, prefix, number) for number in numbers]
            call = self.register(places, rng.random() < 0.4)
            leaves = 0.2 * rng.random() if rng.random() < 0.2 else None
            try:
                await asyncio.wait_for(call, leaves)
            except TimeoutError:
                self.beside["POST /ape/contexts: disconnected before the answer"] += 1
            await asyncio.sleep(0.2 * rng.random())

    async def forget_for_ever(self, rng: random.Random) -> None:
        """Look at the store, and forget one context after the other, half of them pinned ones."""
        while True:
            listed = await self._listed()
            pinned = {context["id"] for context in listed if context["pinned"]}
            places = list(self._ids)
            if pinned and rng.random() < 0.5:
                places = [place for place in places if self._ids[place] in pinned]
            await self.forget(rng.choice(places))
            await asyncio.sleep(0.8 * rng.random())

    async def forget(self, place: Place) -> None:
        self.presence.deleting(place)
        response = await self._session.delete(f"/ape/contexts/{self._ids[place]}")
        self.presence.deleted(place)
        self.beside[f"DELETE /ape/contexts/ID: {response.status_code}"] += 1
        if response.status_code not in (200, 404):
            self.faults.append(f"forget {place}: {response.status_code}: {response.text}")

    async def forget_all(self) -> None:
        """Also what a registration adds whose client has left."""
        while True:
            listed = await self._listed()
            if not listed:
                await asyncio.sleep(1)
                if not await self._listed():
                    return
            for context in listed:
                await self._session.delete(f"/ape/contexts/{context['id']}")

    async def flush_for_ever(self, rng: random.Random) -> None:
        """Have scores forgotten. While requests run, SGLang keeps the KV and answers with 400."""
        while True:
            response = await self._session.post("/flush_cache")
            self.beside[f"POST /flush_cache: {response.status_code}"] += 1
            if response.status_code not in (200, 400):
                self.faults.append(f"flush: {response.status_code}: {response.text}")
            await asyncio.sleep(0.2 * rng.random())

    # ------------------------------------------------------------ new tenants

    async def visit_for_ever(self, rng: random.Random, jobs: Sequence[Job]) -> None:
        """Ask under one new key after the other what the other tenants ask."""
        room = self._pool.usable - self._pool.max_pinned
        fitting = [
            job
            for job in jobs
            if job.needed_tokens(self._corpus, VISIT_TOKENS) <= room
            and self._shares_nothing_with_itself(job)
        ]
        for number in count():
            await self.visit(rng.choice(fitting), f"visitor {number}")
            await asyncio.sleep(0.5 * rng.random())

    async def visit(self, job: Job, tenant: str) -> None:
        """Nobody has heard of the tenant: ids of others are unknown to it, nothing is cached."""
        sampling = {"temperature": 0, "max_new_tokens": VISIT_TOKENS, "ignore_eos": True}
        body: dict[str, Any] = {
            "extra_key": tenant,
            "input_ids": job.query,
            "sampling_params": sampling,
        }
        if job.documents:
            body["ape"] = {"temperature": job.temperature, "scale": job.scale, **job.rung}
            ids = [{"id": self._ids[place]} for place in job.places(None)]
            response = await self._session.post("/generate", json={**body, "contexts": ids})
            if response.status_code != 400 or "contexts[0].id" not in response.text:
                self.faults.append(f"{tenant} is given {ids[0]} of others: {response.text}")
            body["prefix_ids"] = self._corpus.prefixes[job.prefix]
            body["contexts"] = [{"input_ids": self._corpus.documents[d]} for d in job.documents]
            self.beside["new tenant: ids of others are unknown"] += 1
        response = await self._session.post("/generate", json=body)
        reply = response.json()
        if response.status_code != 200 or reply["output_ids"] != job.tokens[:VISIT_TOKENS]:
            self.faults.append(f"{tenant} asks {body} and is answered {reply}")
        elif reply["meta_info"]["cached_tokens"]:
            self.faults.append(f"{tenant} finds KV of others: {reply['meta_info']}, by {body}")
        elif job.scores and not reply["meta_info"]["ape"]["scored_tokens"]:
            self.faults.append(f"{tenant} finds scores of others: {reply['meta_info']}, by {body}")
        self.beside["new tenant: nothing is cached, the answer is equal"] += 1

    def _shares_nothing_with_itself(self, job: Job) -> bool:
        """Whether no two of its contexts begin with the same token."""
        return len({self._corpus.documents[d][0] for d in job.documents}) == len(job.documents)

    async def _listed(self) -> list[dict[str, Any]]:
        response = await self._session.get("/ape/contexts", params={"limit": 1000})
        page = response.json()
        self.beside["GET /ape/contexts"] += 1
        if response.status_code != 200:
            self.faults.append(f"list: {response.status_code}: {response.text}")
            return []
        wrong = [one for one in page["contexts"] if one["cached_tokens"] > one["tokens"]]
        if wrong or page["pinned_tokens"] > page["max_pinned_tokens"]:
            self.faults.append(f"list: {page}")
        return page["contexts"]

    def _registration(self, places: list[Place], pin: bool) -> dict[str, Any]:
        return {
            "prefix_ids": self._corpus.prefixes[places[0].prefix],
            "contexts": [{"input_ids": self._document(place)} for place in places],
            "extra_key": places[0].tenant,
            "pin": pin,
        }

    def _document(self, place: Place) -> Ids:
        return self._corpus.documents[place.document]


def _check(response: httpx.Response) -> None:
    """
    Raises:
        Refused: it is not an answer.
    """
    if response.status_code == 200:
        return
    try:
        reply = response.json()
    except ValueError:
        raise Refused(response.status_code, response.text) from None
    raise Refused(response.status_code, reply.get("error", reply))
