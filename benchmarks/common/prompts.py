"""From texts to token ids: P, contexts and Q of one question, the same for every method.

Each part is tokenised by itself, as the server does it, so that methods differ in how tokens are
encoded and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Ids = list[int]


class Prompt(NamedTuple):
    """Token ids of one question."""

    prefix: Ids
    contexts: tuple[Ids, ...]
    query: Ids
    warm: tuple[int, ...] = ()  # invented items in the format of the contexts, for the end of P

    @property
    def warmed(self) -> Prompt:
        """The prompt with its warm items at the end of P."""
        return self._replace(prefix=[*self.prefix, *self.warm], warm=())

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.contexts)) + len(self.query)

    @property
    def sequence(self) -> Ids:
        """The ordinary prompt P + C_1 + ... + C_N + Q."""
        return [*self.prefix, *(token for own in self.contexts for token in own), *self.query]

    def with_contexts(self, indices: Sequence[int]) -> Prompt:
        """The prompt over some of its contexts, in the order of the indices."""
        return self._replace(contexts=tuple(self.contexts[i] for i in indices))


class Encoder:
    """A model's tokenizer, and its chat template if wanted.

    Args:
        model: path or name of the model.
        chat: put the instruction into a system message and the contexts and the query into a user
            message, as ``/v1/chat/completions`` does; otherwise all is plain text.
    """

    def __init__(self, model: str, chat: bool = False) -> None:
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        from sglang_ape.entry.chat import ContextMarker

        self._tokenizer: Any = get_tokenizer(model)
        self._marker = ContextMarker(self._tokenizer) if chat else None
        self._contexts: dict[str, Ids] = {}

    def prompt(
        self, instruction: str, contexts: Sequence[str], query: str, warm: str = ""
    ) -> Prompt:
        """Encode one question.

        Args:
            instruction: goes before the contexts; plain text ends it with its own line breaks.
            contexts: each with its own line breaks.
            query: what follows them.
            warm: items for the end of P, with their own line breaks.
        """
        parts = tuple(map(self._context, contexts))
        items = tuple(self._context(warm)) if warm else ()
        if self._marker is None:
            prefix = self._tokenizer.encode(instruction, add_special_tokens=True)
            return Prompt(prefix, parts, self._plain(query), items)
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": query}]
        text = self._tokenizer.apply_chat_template(
            self._marker.mark(messages), add_generation_prompt=True, tokenize=False
        )
        prefix, after = self._marker.split(self._plain(text))
        return Prompt(prefix, parts, after, items)

    def _context(self, text: str) -> Ids:
        if text not in self._contexts:
            self._contexts[text] = self._plain(text)
        return self._contexts[text]

    def _plain(self, text: str) -> Ids:
        return self._tokenizer.encode(text, add_special_tokens=False)
