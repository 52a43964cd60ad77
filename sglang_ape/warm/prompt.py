"""What the model is shown and asked, and how its answer becomes an item."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

_ASKED = (
    "{shown}\n\n"
    "These are {count} texts of one collection. Write one more that could stand among them: in the "
    "same format and style, about as long, but about something else, which you invent. Its names, "
    "places, numbers and facts must occur in none of them and need not exist. Write the text alone."
)
_HEADING = "Text {number}:\n"
_LAST_WORD, _WORD_GOES_ON = re.compile(r"\w+\Z"), re.compile(r"\w")


class Form(NamedTuple):
    """What all texts of a corpus have in common."""

    opening: str  # whole words, no blank at its end
    ending: str  # blanks and line ends
    stop: str | None  # line ends that no text has inside

    def item(self, answer: str) -> str:
        """The item of an answer, which goes on after the opening; empty if nothing follows it."""
        if not answer.strip():
            return ""
        answer = answer if self.opening else answer.lstrip()
        return self.opening + answer.rstrip() + self.ending


def form_of(texts: Sequence[str]) -> Form:
    """The form of a corpus: texts that differ, at least one."""
    first, last = min(texts), max(texts)  # what these two begin with, all do
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    opening = "".join(char for char, _ in same) if len(texts) > 1 else ""
    if any(_WORD_GOES_ON.match(text, len(opening)) for text in texts):
        opening = _LAST_WORD.sub("", opening)
    endings = [text[len(text.rstrip()) :] for text in texts]
    inside = [text.strip() for text in texts]
    unseen = [end for end in ("\n", "\n\n") if not any(end in text for text in inside)]
    stop = unseen[0] if unseen else None
    return Form(opening.rstrip(" \t"), max(endings, key=endings.count), stop)


def prompt_ids(tokenizer: Any, shown: Sequence[str], form: Form, with_template: bool) -> list[int]:
    """Token ids of a prompt whose answer goes on after the opening.

    Args:
        tokenizer: a Hugging Face one.
        shown: texts of the corpus.
        form: of the corpus.
        with_template: whether to ask in a chat; otherwise the texts are a list to go on with.
    """
    if not with_template:
        texts = [_HEADING.format(number=i) + text.strip() for i, text in enumerate(shown, 1)]
        heading = _HEADING.format(number=len(shown) + 1)
        return tokenizer.encode("\n\n".join([*texts, heading + form.opening]))
    asked = _ASKED.format(shown="\n\n".join(map(str.strip, shown)), count=len(shown))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(rendered + form.opening, add_special_tokens=False)


def stops(form: Form, with_template: bool) -> list[str]:
    """What ends an answer: what no text of the corpus has inside, and a further heading."""
    return [form.stop] if form.stop else [] if with_template else ["\n\nText "]
