"""Forms of contexts, each with invented items of the very same form: what warm prefixes hold.

No item is a row of a data set, and none takes part in a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.common.demonstrations import Example


class Passage(NamedTuple):
    """A document."""

    title: str  # may be empty
    text: str


class Form(NamedTuple):
    """What the contexts of a data set look like.

    Attributes:
        warm: invented items of this form.
        is_short: a context is a sentence or a line.
        answer_tokens: room for an answer.
        needs_all: every accepted answer is needed, not any one of them.
    """

    warm: tuple[Passage, ...]
    is_short: bool = True
    answer_tokens: int = 32
    needs_all: bool = False


def code_sentence(name: str, code: str) -> str:
    return f"The secret code of the {name} is {code}."


def key_line(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


def keeper_sentence(place: str, person: str) -> str:
    return f"The {place} is looked after by {person}."


def birth_sentence(person: str, town: str) -> str:
    return f"{person} was born in {town}."


DOCUMENTS = Form(
    warm=(
        Passage(
            "Tarn Hollow rope works",
            "The Tarn Hollow rope works made ropes for fishing boats until its last foreman, Odwin "
            "Pratchley, retired. The long brick hall by the canal is 212 metres long, because a "
            "rope can be no longer than the walk on which it is twisted. Hemp came by barge, tar "
            "from the forests to the north. After the closure the hall stood empty for eleven "
            "years, until a choir from the neighbouring village asked to use it for its "
            "rehearsals. Today the middle part is a small theatre; the machines at the eastern end "
            "still run on the first Sunday of each month, and visitors may take a yard of rope "
            "home.",
        ),
        Passage(
            "Velmar blue sheep",
            "The Velmar blue is a breed of sheep that was kept on the salt meadows of the Velmar "
            "estuary. Its fleece is slate grey and looks blue when wet, which gave the breed its "
            "name. Ewes weigh about 48 kilograms and usually bear twins. A herd book was opened by "
            "the teacher Ilvane Dorst, who counted only 63 animals in the first year. The wool is "
            "coarse, and was mostly made into blankets and sailors' caps. The milk is used for a "
            "hard cheese that ripens in sea caves for two winters before it is sold at the harbour "
            "market.",
        ),
    ),
    is_short=False,
)
CODES = Form(
    warm=(
        Passage("", code_sentence("wooden staircase", "9035")),
        Passage("", code_sentence("paper lighthouse", "6172")),
    )
)
KEYS = Form(
    warm=(
        Passage(
            "",
            key_line(
                "b41f6e0a-93c7-4d28-8a15-6f0e2d97c3b4", "7d20c5e9-1f84-4b6a-9e33-c08a51b7f2d6"
            ),
        ),
        Passage(
            "",
            key_line(
                "05c9e7d3-6a1b-4f92-b7d8-394e8c60a1f5", "e86b13f0-a94d-4c57-8f2e-71d5093bc64a"
            ),
        ),
    ),
    answer_tokens=64,
)
TWO_CODES = CODES._replace(needs_all=True, answer_tokens=48)
TWO_HOPS = Form(
    warm=(
        Passage("", keeper_sentence("Tarn Hollow windmill", "Odwin Pratchley")),
        Passage("", birth_sentence("Ilvane Dorst", "Velmar")),
    )
)

_PROBLEMS = (
    Example(
        "A baker fills 6 trays with 8 rolls each and sells 30 of the rolls. How many rolls are "
        "left?",
        "18",
        "There are 6 x 8 = 48 rolls.\nOf these, 48 - 30 = 18 are left.",
    ),
    Example(
        "Pia walks 3 kilometres to the lake and twice as far to the mill beyond it. How many "
        "kilometres does she walk in all?",
        "9",
        "From the lake to the mill it is 2 x 3 = 6 kilometres.\n"
        "In all she walks 3 + 6 = 9 kilometres.",
    ),
)


def warm_examples(labels: Sequence[str]) -> tuple[Example, ...]:
    """Invented demonstrations.

    Args:
        labels: of a classification; none for problems with a number as their answer.
    """
    if not labels:
        return _PROBLEMS
    two = (labels[0], labels[len(labels) // 2])
    forms = ("I am writing to you because of this: {}.", "Can you help me? It is about {}.")
    return tuple(Example(form.format(label), label) for form, label in zip(forms, two, strict=True))
