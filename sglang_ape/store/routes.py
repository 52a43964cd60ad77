"""The HTTP routes of the context store: ``/ape/contexts`` and ``/ape/contexts/ID``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse

from sglang_ape.entry.beside import check_template_kwargs
from sglang_ape.entry.call import CHAT
from sglang_ape.entry.chat import ContextMarker
from sglang_ape.entry.http import parse_json, read_body
from sglang_ape.errors import ApeRequestError
from sglang_ape.store.contexts import Tenant
from sglang_ape.store.service import DEFAULT_PAGE, MAX_PAGE, ContextService

_PATH = "/ape/contexts"


def add_routes(app: FastAPI, service: ContextService) -> None:
    """Add the routes; SGLang's API-key check, a middleware of ``app``, covers them."""
    router = APIRouter()

    @router.post(_PATH)
    async def register(request: Request) -> JSONResponse:
        return await _answer(lambda: _register(service, request))

    @router.get(_PATH)
    async def list_contexts(request: Request) -> JSONResponse:
        return await _answer(lambda: _list(service, request.query_params))

    @router.get(_PATH + "/{id}")
    async def get(id: str) -> JSONResponse:
        return await _answer(lambda: service.get(id))

    @router.delete(_PATH + "/{id}")
    async def forget(id: str) -> JSONResponse:
        return await _answer(lambda: service.forget(id))

    app.include_router(router)


def chat_renderer(app: FastAPI, marker: ContextMarker) -> Callable[[Mapping[str, Any]], list[int]]:
    """Token ids of a chat's P, as the chat route of the server renders it.

    A chat without a user message gets one: P ends where its content begins.
    """

    def render(fields: Mapping[str, Any]) -> list[int]:
        from pydantic import ValidationError
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        check_template_kwargs(fields.get("chat_template_kwargs"))
        messages = fields["messages"]
        if isinstance(messages, list) and "user" not in [_role(message) for message in messages]:
            messages = [*messages, {"role": "user", "content": "\n"}]
        body = {name: fields[name] for name in ("tools", "chat_template_kwargs") if name in fields}
        try:
            request = ChatCompletionRequest(messages=marker.mark(messages), **body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            raise ApeRequestError(f"{name}: {first['msg']}", CHAT.text) from None
        chat = app.state.openai_serving_chat
        try:
            rendered = chat._process_messages(request, is_multimodal=False)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            # The template, or SGLang before it, could not read what the caller gave.
            raise ApeRequestError(f"messages cannot be rendered: {error}", CHAT.text) from error
        return marker.split(rendered.prompt_ids)[0]

    return render


async def _register(service: ContextService, request: Request) -> dict[str, Any]:
    body = await read_body(request.receive, service.max_body_bytes)
    fields = parse_json(body or b"")
    if not isinstance(fields, dict):
        raise ApeRequestError("the body must be a JSON object", None)
    return await service.register(fields)


async def _list(service: ContextService, query: Mapping[str, str]) -> dict[str, Any]:
    after = _number(query, "after", -1, 0, None)
    limit = _number(query, "limit", DEFAULT_PAGE, 1, MAX_PAGE)
    given = [name for name in Tenant._fields if name in query]
    tenant = Tenant(*map(query.get, Tenant._fields)) if given else None
    return await service.page(after, limit, tenant)


async def _answer(serve: Callable[[], Awaitable[dict[str, Any]]]) -> JSONResponse:
    try:
        return JSONResponse(await serve())
    except ApeRequestError as error:
        return JSONResponse(error.body(), status_code=error.status_code)
    except ValueError as error:  # the engine refused it
        refused = ApeRequestError(str(error), None)
        return JSONResponse(refused.body(), status_code=refused.status_code)


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int | None) -> int:
    if name not in query:
        return default
    text = query[name][:20]
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        wanted = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ApeRequestError(f"{name} must be a number {wanted}, got {text!r}", name)
    return int(text)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
