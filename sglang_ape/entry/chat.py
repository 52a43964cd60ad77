"""Where the contexts stand in a chat: before the content of the first user message.

The chat template is SGLang's business. A marker token, unknown to any user, is put where the
contexts belong; the template is rendered and tokenised as ever, and the ids are cut at the
marker: what comes before is P, what comes after is Q. The marker is a special token of the
tokenizer, so both sides are tokenised as if they stood alone.
"""

from __future__ import annotations

import secrets
from typing import Any

from sglang_ape.errors import ApeRequestError


class ContextMarker:
    """A token that marks the place of the contexts; one a server process.

    The text is random, so no request can contain it.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers import AddedToken

        self.text = f"<|ape_contexts_{secrets.token_hex(16)}|>"
        tokenizer.add_tokens([AddedToken(self.text, special=True, normalized=False)])
        self.token_id = tokenizer.convert_tokens_to_ids(self.text)
        if tokenizer.encode(self.text, add_special_tokens=False) != [self.token_id]:
            raise RuntimeError("the model's tokenizer does not take a marker token for contexts")

    def mark(self, messages: Any) -> list[Any]:
        """A copy of ``messages`` with the marker before the first user message's content.

        Raises:
            ApeRequestError: there is no such message, or it holds more than text.
        """
        if not isinstance(messages, list):
            raise ApeRequestError("messages must be a list", "messages")
        for i, message in enumerate(messages):
            _refuse_media(message, i)
        roles = [message.get("role") for message in messages]
        if "user" not in roles:
            raise ApeRequestError("contexts need a user message to stand in", "messages")
        i = roles.index("user")
        marked = {**messages[i], "content": self._marked(messages[i].get("content"), i)}
        return [*messages[:i], marked, *messages[i + 1 :]]

    def split(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Cut the rendered chat at the marker: P and Q.

        Raises:
            ApeRequestError: the template drops or repeats the first user message.
        """
        if ids.count(self.token_id) != 1:
            raise ApeRequestError(
                "the chat template does not render the first user message exactly once", "messages"
            )
        at = ids.index(self.token_id)
        return ids[:at], ids[at + 1 :]

    def _marked(self, content: Any, i: int) -> Any:
        if isinstance(content, str):
            return self.text + content
        # Into the first part, not before it: SGLang may join parts with a blank.
        first = content[0].get("text") if isinstance(content, list) and content else None
        if not isinstance(first, str):
            param = f"messages[{i}].content"
            raise ApeRequestError(f"{param} must be text", param)
        return [{**content[0], "text": self.text + first}, *content[1:]]


def _refuse_media(message: Any, i: int) -> None:
    if not isinstance(message, dict):
        raise ApeRequestError(f"messages[{i}] must be an object", f"messages[{i}]")
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") != "text":
            param = f"messages[{i}].content"
            raise ApeRequestError(f"{param}: only text can stand beside contexts", param)
