"""The HTTP door: takes the APE fields out of the body before SGLang's routes read it.

SGLang's request models drop fields that they do not know, so the fields are read here, in ASGI
middleware, and travel beside the request. A body without them passes through unchanged.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import MutableMapping
from typing import Any

import orjson
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_ape.entry.beside import (
    check_lists,
    check_response_format,
    check_template_kwargs,
    to_json,
)
from sglang_ape.entry.call import (
    CHAT,
    COMPLETIONS,
    FIELDS,
    NATIVE,
    ApeCall,
    Door,
    current_call,
    parse_call,
)
from sglang_ape.entry.expand import encode_contexts
from sglang_ape.entry.report import with_usage
from sglang_ape.entry.tokenizer_manager import Entry, make_entry
from sglang_ape.errors import ApeRequestError

logger = logging.getLogger(__name__)

ROUTES = {"/generate": NATIVE, "/v1/completions": COMPLETIONS, "/v1/chat/completions": CHAT}
_MARKS = tuple(f'"{name}"'.encode() for name in FIELDS)


def before_run_http_server(
    server_args: Any,
    tokenizer_manager: Any,
    _template_manager: Any,
    _port_args: Any,
    scheduler_infos: list[dict[str, Any]],
    *_: Any,
    **__: Any,
) -> None:
    """BEFORE hook on ``http_server._setup_and_run_http_server``: install the middleware.

    It goes innermost, behind SGLang's API-key check and decompression.
    """
    if not server_args.enable_ape:
        return
    from sglang.srt.entrypoints.http_server import app

    from sglang_ape.store.routes import add_routes, chat_renderer
    from sglang_ape.store.service import ContextService

    pool_tokens = scheduler_infos[0]["max_total_num_tokens"]
    entry = make_entry(tokenizer_manager, pool_tokens, with_chat=True)
    tokenizer_manager.ape_entry = entry
    render = None if entry.marker is None else chat_renderer(app, entry.marker)
    add_routes(app, ContextService(entry, render))
    app.user_middleware.append(Middleware(ApeMiddleware, entry=entry))


class ApeMiddleware:
    """ASGI middleware for :data:`ROUTES`; everything else is passed on untouched."""

    def __init__(self, app: ASGIApp, entry: Entry) -> None:
        self.app = app
        self.entry = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = _door(scope)
        if door is None:
            await self.app(scope, receive, send)
            return
        try:
            whole = await read_body(receive, self.entry.limits.body_bytes)
            if whole is None:  # the client has gone
                return
            call, body = None, whole
            if any(mark in body for mark in _MARKS):
                # Parsing and tokenising a large body would hold up every other request.
                call, body = await asyncio.to_thread(self._take_fields, door, body)
        except ApeRequestError as error:
            await _refuse(error, scope, receive, send)
            return
        replay = _Replay(body, receive)
        # Set for plain requests too: a server may handle one in the context of an earlier call.
        token = current_call.set(call)
        try:
            guard = send if call is None else _Guard(call, door, scope, receive, send)
            await self.app(_with_length(scope, body), replay, guard)
        finally:
            current_call.reset(token)

    def _take_fields(self, door: Door, body: bytes) -> tuple[ApeCall | None, bytes]:
        """Check and remove the APE fields; the rest of the body goes on to SGLang."""
        fields = parse_json(body)
        limit = self.entry.limits.contexts
        call = parse_call(fields, door, limit) if isinstance(fields, dict) else None
        if call is None:
            return None, body
        rest = {name: value for name, value in fields.items() if name not in FIELDS}
        for name in ("input_ids", "input_embeds"):
            if rest.get(door.text) is not None and rest.get(name) is not None:
                raise ApeRequestError(f"give {door.text} or {name}, not both", name)
        check_lists(rest, len(call.items), door)
        if door.chat:
            if self.entry.marker is None:
                raise ApeRequestError("contexts in a chat need a tokenizer", "contexts")
            check_template_kwargs(rest.get("chat_template_kwargs"))
            check_response_format(rest.get("response_format"))
            rest["messages"] = self.entry.marker.mark(rest.get("messages"))
        call.items = [
            item._replace(contexts=encode_contexts(self.entry.tokenizer, item.contexts, item.at))
            for item in call.items
        ]
        if door is not NATIVE:
            for name in ("extra_key", "cache_salt"):
                if not isinstance(rest.get(name), str | None):
                    raise ApeRequestError(f"{name} must be a string", name)
        return call, to_json(rest)


class _Replay:
    """``receive`` that gives the body once more, then whatever the connection brings."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Guard:
    """``send`` that turns a call refused behind the door into a 400 of the documented form.

    SGLang answers a refused stream with status 200 and an error event; the start of the answer is
    therefore held back until its first byte shows whether the call was accepted.

    On the OpenAI routes, whose models know no further fields, it also adds the contexts' usage.
    """

    def __init__(
        self, call: ApeCall, door: Door, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._call = call
        self._door = door
        self._connection = (scope, receive, send)
        self._start: Message | None = None
        self._refused = False

    async def __call__(self, message: Message) -> None:
        send = self._connection[2]
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._refused:
            return
        if self._call.error is not None and self._start is not None:
            self._refused = True
            await _refuse(self._call.error, *self._connection)
            return
        if self._door is not NATIVE:
            message = {**message, "body": with_usage(message.get("body", b""), self._call.usage)}
        if self._start is not None:
            start, self._start = self._start, None
            if not message.get("more_body", False):
                start = _with_length(start, message["body"])
            await send(start)
        await send(message)


def _door(scope: Scope) -> Door | None:
    if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
        return None
    return ROUTES.get(scope["path"].removeprefix(scope.get("root_path", "")))


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, None if the client went away.

    Args:
        receive: of the request.
        limit: bytes.

    Raises:
        ApeRequestError: 413, after reading on without keeping anything, so that the client gets
            to read the answer.
    """
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        more = message.get("more_body", False)
    if size > limit:
        raise ApeRequestError(
            f"the body has {size} bytes, more than the {limit} of --ape-max-body-bytes", None, 413
        )
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as first:
        # Python's parser also takes NaN and Infinity, as its own json.dumps writes them; the
        # field that holds one is then named by the checks of that field.
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise ApeRequestError(f"the body is not valid JSON: {first}", None) from None


def _with_length(message: MutableMapping[str, Any], body: bytes) -> MutableMapping[str, Any]:
    headers = [(name, value) for name, value in message["headers"] if name != b"content-length"]
    return {**message, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _refuse(error: ApeRequestError, scope: Scope, receive: Receive, send: Send) -> None:
    logger.info("refused %s: %s", scope["path"], str(error)[:200])
    response = JSONResponse(error.body(), status_code=error.status_code)
    await response(scope, receive, send)
