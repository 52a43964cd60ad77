"""The data of ``--quick``: invented facts in short documents, one question a row.

Drawn from a seed; no model has seen them, so an answer comes from the contexts.
"""

from __future__ import annotations

import random

from sglang_ape.calibrate.data import Example, Line

ROWS = 16
_DOCUMENTS = 5
_TOWNS = ("Orrin", "Lunn", "Dunmore", "Grenn", "Thornby", "Anvers", "Ossel", "Pellam", "Vask")
_THINGS = ("mill", "bridge", "clock tower", "library", "lighthouse", "market hall")
_FIRST = ("Tessa", "Marek", "Ilse", "Jonas", "Petra", "Anton", "Greta", "Ruben", "Maja", "Oskar")
_LAST = ("Vale", "Osk", "Brandt", "Pell", "Loren", "Sund", "Harrow", "Quist", "Ferro", "Amdal")
_MATERIALS = ("oak", "granite", "brick", "sandstone", "slate", "pine")


def lines(seed: int) -> list[Line]:
    """``ROWS`` rows in the form of the validation file."""
    rng = random.Random(seed)
    return [Line(number, _example(rng)) for number in range(1, ROWS + 1)]


def _example(rng: random.Random) -> Example:
    places = rng.sample([(thing, town) for thing in _THINGS for town in _TOWNS], _DOCUMENTS)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    builders = rng.sample(names, _DOCUMENTS)
    documents = [
        f"The {thing} of {town} is made of {rng.choice(_MATERIALS)}. It was built by {builder} in "
        f"{rng.randrange(1600, 1950)}.\n"
        for (thing, town), builder in zip(places, builders, strict=True)
    ]
    asked = rng.randrange(_DOCUMENTS)
    thing, town = places[asked]
    return Example(
        contexts=documents,
        query=f"\nQuestion: Who built the {thing} of {town}?\nAnswer: It was built by",
        answers=[builders[asked]],
    )
