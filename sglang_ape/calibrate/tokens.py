"""From a row of the file to the token ids of P, the contexts and Q, as the server makes them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_ape.calibrate.data import Example
from sglang_ape.entry.call import ContextId, Ids
from sglang_ape.entry.chat import ContextMarker
from sglang_ape.entry.expand import encode_contexts, encode_prefix, encode_text


class Row(NamedTuple):
    """One row as the server gets it."""

    line: int  # of the file
    prefix: Ids  # P of its own, or the default
    contexts: tuple[Ids, ...]
    query: Ids
    answers: tuple[str, ...]  # none: the row has no label

    @property
    def context_tokens(self) -> int:
        return sum(map(len, self.contexts))

    def tokens_before_query(self, prefix: Ids) -> int:
        return len(prefix) + self.context_tokens

    @property
    def sequential(self) -> list[int]:
        """The ordinary prompt of the same tokens: P, the contexts in the given order, Q."""
        parts = (self.prefix, *self.contexts, self.query)
        return [token for part in parts for token in part]


class Encoder:
    """Encodes rows with a model's tokenizer.

    Args:
        tokenizer: a Hugging Face one. The first chat adds a marker token to it, which stands for
            the contexts and is in no row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._marker: ContextMarker | None = None

    def row(self, line: int, example: Example) -> Row:
        """Encode a row.

        Raises:
            ApeRequestError: a context or the query has no token, or the chat cannot be rendered.
        """
        if example.query is None:
            prefix, query = self._chat(example)
        else:
            prefix = self.prefix(example.prefix)
            query = encode_text(self._tokenizer, example.query, "query")
        encoded = encode_contexts(self._tokenizer, example.contexts, "")
        contexts = tuple(ids for ids in encoded if not isinstance(ids, ContextId))  # none has an id
        return Row(line, prefix, contexts, query, tuple(example.answers or ()))

    def prefix(self, text: str | None) -> Ids:
        """P of a text, or the built-in default."""
        return encode_prefix(self._tokenizer, text, "prefix")

    def warm(self, items: Sequence[str]) -> Ids:
        """All warm items, each encoded as a context is."""
        encoded = (encode_text(self._tokenizer, item, "--warm") for item in items)
        return sum(encoded, start=array("I"))

    def _chat(self, example: Example) -> tuple[Ids, Ids]:
        """P and Q of a chat, as the chat route cuts it.

        Source: entrypoints/openai/serving_chat.py, which renders first and encodes then.
        """
        if self._marker is None:
            self._marker = ContextMarker(self._tokenizer)
        messages = [message.model_dump() for message in example.messages or ()]
        rendered = self._tokenizer.apply_chat_template(
            self._marker.mark(messages), tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        prefix, query = self._marker.split(ids)
        return array("I", prefix), array("I", query)
