"""Classification from examples: every context holds some of them, ``select`` picks the label.

``python -m examples.many_shot [--url http://127.0.0.1:30000]`` asks a server that was started with
``--enable-ape``. The prefix shows the format; each context goes on in it.
"""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl

import sglang_ape  # noqa: F401  adds sgl.parallel_contexts

LABELS = ("person", "place", "number")
SHOTS = (
    ("Who painted the ceiling of the town hall?", "person"),
    ("Where is the oldest bridge of the valley?", "place"),
    ("How many steps lead up to the tower?", "number"),
    ("Who wrote the song of the ferrymen?", "person"),
    ("In which village was the potter born?", "place"),
    ("How many boats crossed the lake in May?", "number"),
    ("Which captain sailed around the cape first?", "person"),
    ("What city has the largest harbour?", "place"),
    ("How old is the lime tree at the well?", "number"),
    ("Who keeps the key of the mill?", "person"),
    ("Where do the storks spend the winter?", "place"),
    ("How far is it from the inn to the pass?", "number"),
)
SHOTS_PER_CONTEXT = 3
QUESTIONS = (
    "Who repaired the clock of the station?",
    "How many windows does the mill have?",
    "Where does the river begin?",
)


def shot(question: str, label: str) -> str:
    return f"Question: {question}\nType: {label}\n\n"


def contexts() -> list[str]:
    """The examples, a few in each context."""
    shots = [shot(*one) for one in SHOTS]
    starts = range(0, len(shots), SHOTS_PER_CONTEXT)
    return ["".join(shots[start : start + SHOTS_PER_CONTEXT]) for start in starts]


@sgl.function
def classify(s: Any, question: str) -> None:
    s += f"Each question asks for one of these: {', '.join(LABELS)}.\n\n"
    s += sgl.parallel_contexts(contexts())
    s += f"Question: {question}\nType:"
    s += sgl.select("label", [f" {label}" for label in LABELS])


def run(url: str) -> list[str]:
    """The label of each question, asked of the server at ``url`` in one batch."""
    batch = [{"question": question} for question in QUESTIONS]
    states = classify.run_batch(batch, backend=sgl.RuntimeEndpoint(url))
    return [state["label"].strip() for state in states]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    for question, label in zip(QUESTIONS, run(parser.parse_args().url), strict=True):
        print(f"{label:8} {question}")


if __name__ == "__main__":
    main()
