"""Who answers: a running server, or an Engine of this process. Both take the same bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import requests

from sglang_ape.calibrate.data import InputError
from sglang_ape.client import BearerAuth, refusal_of
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits

_CONNECT_SECONDS = 10.0
_NO_CHECK = 1 << 32  # of the vocabulary: the ids come from the model's own tokenizer


class Facts(NamedTuple):
    """What a calibration needs to know of an engine."""

    model: str  # path or name
    tokenizer: Any
    limits: Limits
    longest_prompt: int  # tokens of an ordinary request, exclusive
    chat_template: str | None  # where it is not the tokenizer's own


class Backend(Protocol):
    """Answers bodies of ``POST /generate``."""

    facts: Facts

    def ask(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answers to a batch, in its order.

        Raises:
            ApeRequestError: the engine refused it.
            requests.RequestException: there was no answer.
        """
        ...

    def close(self) -> None: ...


class Server:
    """A running server.

    Args:
        url: of the server.
        api_key: its key, if it has one.
        timeout: seconds that one call may take.
        tokenizer: path or name; default: what the server names.

    Raises:
        InputError: it cannot be calibrated.
        ApeRequestError: it refused to tell about itself.
        requests.RequestException: it did not answer.
    """

    def __init__(
        self, url: str, api_key: str | None, timeout: float, tokenizer: str | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url must be an http(s) URL, got {url[:80]!r}")
        self._url = url.rstrip("/")
        self._timeout = (min(timeout, _CONNECT_SECONDS), timeout)
        self._session = requests.Session()
        if api_key is not None:
            self._session.auth = BearerAuth(api_key)
        info = self._call("GET", "/server_info")
        if not info.get("enable_ape"):
            raise InputError(f"{url} was started without --enable-ape")
        if info["skip_tokenizer_init"]:
            raise InputError(f"{url} runs without a tokenizer (--skip-tokenizer-init)")
        models = self._call("GET", "/v1/models")["data"]
        self.facts = _facts(
            info, models[0]["max_model_len"], _tokenizer(tokenizer or info["tokenizer_path"])
        )

    def ask(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._call("POST", "/generate", json=body)

    def close(self) -> None:
        self._session.close()

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        answer = self._session.request(
            method, self._url + path, timeout=self._timeout, allow_redirects=False, **kwargs
        )
        try:
            content = answer.json()
        except requests.JSONDecodeError:
            content = None
        if answer.status_code // 100 != 2 or content is None:
            raise refusal_of(answer, content)
        return content


class InProcess:
    """An Engine, started here and stopped by :meth:`close`.

    Args:
        model: path or name.
        flags: further flags of ``sglang.launch_server``.

    Raises:
        InputError: the flags are refused.
    """

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        import sglang
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()  # before the arguments are made: it adds --enable-ape
        own = ["--model-path", model, "--enable-ape", "--log-level", "error"]
        try:
            args = prepare_server_args([*own, *flags])
        except ValueError as error:
            raise InputError(str(error)) from error
        self._engine = sglang.Engine(server_args=args)
        manager = self._engine.tokenizer_manager
        self.facts = _facts(
            self._engine.get_server_info(), manager.model_config.context_len, manager.tokenizer
        )

    def ask(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            return self._engine.generate(**body)
        except ApeRequestError:
            raise
        except ValueError as error:  # SGLang's own refusals; over HTTP that is a 400
            raise ApeRequestError(str(error), None) from error

    def close(self) -> None:
        self._engine.shutdown()


def _facts(info: Mapping[str, Any], window: int, tokenizer: Any) -> Facts:
    if tokenizer is None:
        raise InputError("the engine runs without a tokenizer (--skip-tokenizer-init)")
    limits = Limits(window, info["ape_max_context_tokens"], info["max_total_num_tokens"], _NO_CHECK)
    longest = min(window, info["max_req_input_len"])
    return Facts(info["model_path"], tokenizer, limits, longest, info["chat_template"])


def _tokenizer(path: str) -> Any:
    """As the server loads it.

    Raises:
        InputError: it cannot be loaded here.
    """
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    try:
        return get_tokenizer(path)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the tokenizer {path} cannot be loaded here ({reason}); name it with --tokenizer"
        ) from error
