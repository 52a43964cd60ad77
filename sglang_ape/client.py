"""A client of the context store, over HTTP or in the process of an Engine.

It is imported as ``from sglang_ape import ContextStore`` and needs neither torch nor SGLang to
talk to a server.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol

import requests

from sglang_ape.errors import ApeRequestError

_PATH = "/ape/contexts"
_CONNECT_SECONDS = 10.0
_ID = re.compile(r"[\w-]{1,80}", re.ASCII)

Context = str | Mapping[str, Any]


class ContextStore:
    """Encodes contexts ahead of the requests that use them.

    ::

        store = ContextStore("http://127.0.0.1:30000")
        ids = [one["id"] for one in store.register(["The Heron brought salt.\\n"], pin=True)]

    In a request, ``{"id": ids[0]}`` then stands for the context and for the prefix before it.

    Args:
        target: the URL of a server; an ``sgl.RuntimeEndpoint`` or ``sgl.Runtime``; or an
            ``sgl.Engine``, whose methods and those of this class are then called from the same
            thread, outside of any running event loop.
        api_key: the server's; default: that of the ``RuntimeEndpoint``.
        timeout: seconds that one call may wait for the server. An Engine knows no limit.

    Raises:
        ApeRequestError: ``target`` is none of these, or an Engine without ``enable_ape=True``.

    Every method raises :class:`~sglang_ape.errors.ApeRequestError`, with the server's message,
    field and HTTP status, for what the server refuses; and ``requests.RequestException`` if there
    was no answer.
    """

    def __init__(self, target: Any, api_key: str | None = None, *, timeout: float = 600.0) -> None:
        self._transport = _transport_to(target, api_key, timeout)

    def register(
        self,
        contexts: Sequence[Context],
        *,
        prefix: str | None = None,
        prefix_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pin: bool = False,
        lora_path: str | None = None,
        extra_key: str | None = None,
    ) -> list[dict[str, Any]]:
        """Make contexts known and encode what is not cached; returns when that is done.

        At most one of ``prefix``, ``prefix_ids`` and ``messages`` is given; with none of them, the
        contexts follow the server's default prefix.

        Args:
            contexts: as in a request: strings, ``{"text": …}``, ``{"input_ids": […]}`` or
                ``{"id": …}``.
            prefix: the text before each of them.
            prefix_ids: the same as token ids.
            messages: a chat, whose first user message the contexts will stand in; not with an
                Engine.
            tools: of the chat.
            chat_template_kwargs: of the chat.
            pin: keep their KV from eviction until they are forgotten.
            lora_path: name of the adapter that will use them.
            extra_key: SGLang's namespace of cached prompts.

        Returns:
            For each context, in the given order, ``id``; ``tokens``, how many it has;
            ``cached_tokens``, how many of these were cached already; and ``pinned``.

        Raises:
            ApeRequestError: 400, a field is wrong; 507, there is no room for all of them, and
                none was registered.
        """
        fields = {
            "contexts": contexts,
            "prefix": prefix,
            "prefix_ids": prefix_ids,
            "messages": messages,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
            "pin": pin,
            "lora_path": lora_path,
            "extra_key": extra_key,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return self._transport.register(given)["contexts"]

    def get(self, id: str) -> dict[str, Any]:
        """What the server knows of a context.

        Returns:
            ``id``; ``tokens``; ``cached_tokens``, how many of them are cached now; ``pinned``;
            ``prefix_tokens``, the length of its prefix; ``lora_path``; ``extra_key``.

        Raises:
            ApeRequestError: 404, the id is not known.
        """
        return self._transport.get(_checked(id))

    def contexts(
        self, *, lora_path: str | None = None, extra_key: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """All contexts that the server knows, or those registered with exactly this pair.

        Pages are fetched as the iterator goes on. Contexts registered meanwhile come last.

        Args:
            lora_path: as it was registered. If ``extra_key`` is given, None means without one.
            extra_key: likewise.

        Yields:
            What :meth:`get` returns, in order of registration.
        """
        tenant = {"lora_path": lora_path, "extra_key": extra_key}
        given = {name: value for name, value in tenant.items() if value is not None}
        after: int | None = -1
        while after is not None:
            page = self._transport.page(after, given)
            yield from page["contexts"]
            after = page["next"]

    def forget(self, id: str) -> None:
        """Make the server forget a context, and its pin. Its KV stays until it is evicted.

        Raises:
            ApeRequestError: 404, the id is not known.
        """
        self._transport.forget(_checked(id))


class _Transport(Protocol):
    """The way to the server's ``ContextService``; the answers are those of its methods."""

    def register(self, fields: Mapping[str, Any]) -> dict[str, Any]: ...

    def page(self, after: int, tenant: Mapping[str, str]) -> dict[str, Any]: ...

    def get(self, id: str) -> dict[str, Any]: ...

    def forget(self, id: str) -> dict[str, Any]: ...


class _Http:
    """The routes of a server; ``verify`` as in requests."""

    def __init__(self, url: str, api_key: str | None, timeout: float, verify: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ApeRequestError(f"target must be an http(s) URL, got {url[:80]!r}", "target")
        self._url = url.rstrip("/")
        self._timeout = (min(timeout, _CONNECT_SECONDS), timeout)
        self._session = requests.Session()
        self._session.verify = verify or True
        if api_key is not None:
            # Not in session.headers: a .netrc entry for the host would replace it there.
            self._session.auth = BearerAuth(api_key)

    def register(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("POST", _PATH, json=fields)

    def page(self, after: int, tenant: Mapping[str, str]) -> dict[str, Any]:
        further = {} if after < 0 else {"after": after}
        return self._ask("GET", _PATH, params={**tenant, **further})

    def get(self, id: str) -> dict[str, Any]:
        return self._ask("GET", f"{_PATH}/{id}")

    def forget(self, id: str) -> dict[str, Any]:
        return self._ask("DELETE", f"{_PATH}/{id}")

    def _ask(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        # A followed redirect would turn POST into GET.
        answer = self._session.request(
            method, self._url + path, timeout=self._timeout, allow_redirects=False, **kwargs
        )
        try:
            body = answer.json()
        except requests.JSONDecodeError:
            body = None
        if answer.status_code // 100 != 2 or not isinstance(body, dict):
            raise refusal_of(answer, body)
        return body


class BearerAuth(requests.auth.AuthBase):
    """SGLang's API key."""

    def __init__(self, api_key: str) -> None:
        self._header = f"Bearer {api_key}".encode()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._header
        return request


class _InEngine:
    """The service in the process of an Engine."""

    def __init__(self, engine: Any) -> None:
        if not getattr(engine.server_args, "enable_ape", False):
            raise ApeRequestError(
                "the engine was started without --enable-ape: make it with enable_ape=True",
                "target",
            )
        from sglang_ape.entry.engine import entry_of
        from sglang_ape.store.service import ContextService

        self._engine = engine
        self._service = ContextService(entry_of(engine))

    def register(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._run(self._service.register(fields))

    def page(self, after: int, tenant: Mapping[str, str]) -> dict[str, Any]:
        from sglang_ape.store.contexts import Tenant

        whose = Tenant(tenant.get("lora_path"), tenant.get("extra_key")) if tenant else None
        return self._run(self._service.page(after, tenant=whose))

    def get(self, id: str) -> dict[str, Any]:
        return self._run(self._service.get(id))

    def forget(self, id: str) -> dict[str, Any]:
        return self._run(self._service.forget(id))

    def _run(self, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        try:
            return self._engine.loop.run_until_complete(answer)
        except ApeRequestError:
            raise
        except ValueError as error:  # the engine refused it; over HTTP that is a 400
            raise ApeRequestError(str(error), None) from error


def _transport_to(target: Any, api_key: str | None, timeout: float) -> _Transport:
    target = getattr(target, "endpoint", target)  # of a Runtime
    if isinstance(target, str):
        return _Http(target, api_key, timeout, None)
    if hasattr(target, "base_url"):
        api_key = target.api_key if api_key is None else api_key
        return _Http(target.base_url, api_key, timeout, target.verify)
    if hasattr(target, "tokenizer_manager"):
        return _InEngine(target)
    raise ApeRequestError(
        "target must be a URL, an sgl.RuntimeEndpoint, an sgl.Runtime or an sgl.Engine, got "
        f"{type(target).__name__}",
        "target",
    )


def _checked(id: str) -> str:
    """The id, if it can be a part of a path: no other was ever given out."""
    if not _ID.fullmatch(id):
        raise ApeRequestError(f"no context is known as {id[:80]!r}", "id", 404)
    return id


def refusal_of(answer: requests.Response, body: Any) -> ApeRequestError:
    """The error that an answer stands for, in the server's own words where it has some."""
    status = answer.status_code
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return ApeRequestError(error["message"], error.get("param"), status)
    url = answer.url.partition("?")[0]
    if status == 404:
        return ApeRequestError(
            f"{url} does not exist: the server was started without --enable-ape, or its URL is "
            "another",
            None,
            status,
        )
    said = error if isinstance(error, str) else answer.reason
    return ApeRequestError(f"{url} answered {status} {said}", None, status)
