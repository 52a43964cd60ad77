"""Texts of our own making, generated from a seed, for runs without any data set.

Requests to a town hall, to be classified; documents on places that do not exist, with questions
whose short answer stands in one document only; and questions that need two facts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, product

from benchmarks.common import forms
from benchmarks.common.demonstrations import Example, Examples
from benchmarks.common.passages import OpenQuestion, OpenQuestions, Passage

ASKED = 0.25  # of the invented requests
NAME = "invented"
TWO_CODES, TWO_HOPS = "two-codes", "two-hops"

_REQUESTS = {
    "lost property": (
        "I left my {thing} on the {day} tram, has anybody found it?",
        "A {thing} was gone when I came home on {day}. Who keeps what is found?",
        "Did somebody hand in a {thing} on {day}?",
        "My {thing} must have fallen out of my bag near {place}.",
    ),
    "opening hours": (
        "Until when is {place} open on {day}?",
        "Can I still come to {place} on {day} evening?",
        "At what time does {place} close on {day}?",
        "Is {place} shut on {day}?",
    ),
    "noise complaint": (
        "There was loud music at {place} all {day} night.",
        "On {day} the building work at {place} starts before six, nobody can sleep.",
        "Please tell the people at {place} to be quiet on {day} evenings.",
        "The dogs behind {place} bark from {day} morning on without a pause.",
    ),
    "permit": (
        "Which form do I need for a market stall at {place} on {day}?",
        "May I put up a tent at {place} on {day}, and who signs for it?",
        "I would like leave to hang a banner at {place} until {day}.",
        "How do I apply for a street party at {place} on {day}?",
    ),
    "broken light": (
        "The lamp in front of {place} has been dark since {day}.",
        "It is pitch black at {place}, the street light failed on {day}.",
        "Since {day} the lantern at {place} only flickers.",
        "Two bulbs at {place} burned out on {day}.",
    ),
    "waste collection": (
        "Nobody emptied the bins at {place} on {day}.",
        "Is the paper at {place} picked up on {day} or a day later?",
        "Where do I leave an old {thing} so that it is taken away on {day}?",
        "The rubbish van drove past {place} on {day} without a stop.",
    ),
}
_THINGS = ("umbrella", "suitcase", "violin", "bicycle pump", "kettle", "lamp shade", "chair")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_PLACES = ("the old mill", "the fish market", "the north gate", "the library", "the ferry stop")

_KINDS = {
    "lighthouse": ("lamp", "was lit for the first time"),
    "museum": ("collection of clocks", "was opened"),
    "ferry": ("white hull", "crossed the bay for the first time"),
    "observatory": ("copper dome", "was built"),
    "mill": ("oak wheel", "began to turn"),
    "railway": ("narrow track", "carried its first passengers"),
    "library": ("reading room", "lent its first book"),
    "bakery": ("stone oven", "sold its first loaf"),
}
_STARTS = ("Bra", "Dun", "El", "Fen", "Gor", "Hal", "Kel", "Lor", "Mar", "Nor", "Os", "Per", "Sk")
_MIDDLES = ("da", "der", "lin", "mo", "na", "ra", "sen", "ti", "var")
_ENDS = ("beck", "by", "ford", "holm", "mere", "sund", "wick")
_FIRST_NAMES = ("Agda", "Bram", "Cleo", "Dirk", "Edda", "Finn", "Greta", "Hugo", "Ilsa", "Jorn")
_LAST_PARTS = (("Ander", "Birk", "Dahl", "Holt", "Lind", "Norr", "Sand", "Vest"), ("berg", "gren"))
_LAST_ENDS = ("", "a", "en", "sson")


def requests(seed: int) -> Examples:
    """Several hundred requests with one of six labels; a quarter of them is asked.

    Args:
        seed: decides which ones are asked.
    """
    everything = [
        Example(text, label)
        for label, forms in _REQUESTS.items()
        for text in dict.fromkeys(
            form.format(thing=thing, day=day, place=place)
            for form, thing, day, place in product(forms, _THINGS, _DAYS, _PLACES)
        )
    ]
    shuffled = random.Random(f"requests {seed}").sample(everything, len(everything))
    asked = round(ASKED * len(shuffled))
    return Examples(
        NAME, tuple(shuffled[asked:]), tuple(shuffled[:asked]), tuple(sorted(_REQUESTS))
    )


def places(seed: int, documents: int) -> OpenQuestions:
    """Documents on invented places, and a question on each.

    Documents on places of the same kind are the distractors.

    Args:
        seed: of names and facts.
        documents: how many, up to a few thousand.

    Raises:
        ValueError: there are not so many names.
    """
    drawn = random.Random(f"places {seed}")
    towns = ["".join(parts) for parts in product(_STARTS, _MIDDLES, _ENDS)]
    names = list(product(towns, _KINDS))
    if documents > len(names):
        raise ValueError(f"{documents} documents: there are {len(names)} names")
    people = _people(drawn)
    found: dict[str, list[tuple[Passage, str, str]]] = {kind: [] for kind in _KINDS}
    for town, kind in drawn.sample(names, documents):
        found[kind].append(_place(drawn, town, kind, next(people)))
    questions = []
    for own in found.values():
        for passage, question, answer in own:
            others = tuple(other for other, _, _ in own if other != passage)
            questions.append(OpenQuestion(question, (answer,), passage, others))
    drawn.shuffle(questions)
    return OpenQuestions(NAME, tuple(questions), tuple(one.gold for one in questions))


def two_codes(seed: int, questions: int) -> OpenQuestions:
    """Questions for two codes, both of whose owners are named; each fact is a context.

    Args:
        seed: of names and codes.
        questions: how many, up to a few hundred.
    """
    drawn = random.Random(f"two codes {seed}")
    names = [
        f"{''.join(town)} {kind}" for town in product(_STARTS, _MIDDLES, _ENDS) for kind in _KINDS
    ]
    chosen = drawn.sample(names, 2 * questions)
    codes = [str(code) for code in drawn.sample(range(1000, 10_000), 2 * questions)]
    facts = [Passage("", forms.code_sentence(*fact)) for fact in zip(chosen, codes, strict=True)]
    made = [
        OpenQuestion(
            f"What are the secret codes of the {chosen[i]} and of the {chosen[i + 1]}?",
            (codes[i], codes[i + 1]),
            facts[i],
            (),
            (facts[i + 1],),
        )
        for i in range(0, len(facts), 2)
    ]
    return OpenQuestions(TWO_CODES, tuple(made), tuple(facts), forms.TWO_CODES)


def two_hops(seed: int, questions: int) -> OpenQuestions:
    """Questions whose answer is about a person that only another context names.

    Args:
        seed: of names.
        questions: how many, up to a few hundred.
    """
    drawn = random.Random(f"two hops {seed}")
    towns = ["".join(parts) for parts in product(_STARTS, _MIDDLES, _ENDS)]
    drawn.shuffle(towns)
    homes, births = towns[:questions], towns[questions : 2 * questions]
    made, facts = [], []
    for home, birth, person in zip(homes, births, _people(drawn), strict=False):
        place = f"{home} {drawn.choice(list(_KINDS))}"
        keeper = Passage("", forms.keeper_sentence(place, person))
        born = Passage("", forms.birth_sentence(person, birth))
        text = f"In which town was the person born who looks after the {place}?"
        made.append(OpenQuestion(text, (birth,), born, (), (keeper,)))
        facts += [keeper, born]
    return OpenQuestions(TWO_HOPS, tuple(made), tuple(facts), forms.TWO_HOPS)


def _people(drawn: random.Random) -> Iterator[str]:
    """Names, all different; numbered ones when there are no others left."""
    parts = list(product(_FIRST_NAMES, *_LAST_PARTS, _LAST_ENDS))
    drawn.shuffle(parts)
    for generation in count(1):
        for first, *last in parts:
            name = f"{first} {''.join(last)}"
            yield name if generation == 1 else f"{name} {generation}"


def _place(drawn: random.Random, town: str, kind: str, keeper: str) -> tuple[Passage, str, str]:
    """A document, a question on it and the answer."""
    feature, began = _KINDS[kind]
    name = f"the {town} {kind}"
    year, people = drawn.randint(1650, 1990), drawn.randint(12, 9000)
    facts = [
        f"Its {feature} is known all over the valley of {town}.",
        f"The {kind} {began} in {year}.",
        f"Today it is looked after by {keeper}, who lives next door.",
        f"About {people} visitors come in a good summer.",
    ]
    text = " ".join([f"There is much to tell of {name}.", *drawn.sample(facts, len(facts))])
    question, answer = drawn.choice(
        [
            (f"Who looks after {name}?", keeper),
            (f"In which year was it that {name} {began}?", str(year)),
        ]
    )
    return Passage(f"{town} {kind}", text), question, answer
