"""A conversation over one set of contexts: the second question builds on the first answer.

``python -m examples.two_turns [--url http://127.0.0.1:30000]`` asks a server that was started with
``--enable-ape``. The second request finds the contexts and the first turn in the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import sglang as sgl

import sglang_ape  # noqa: F401  adds sgl.parallel_contexts

DOCUMENTS = Path(__file__).parent / "documents"
NAMES = ("lighthouse", "mountain_railway", "town_library")
QUESTIONS = (
    "Who was the last keeper of the Skarn Point Lighthouse?",
    "And when was its lamp lit for the first time?",
)


@sgl.function
def conversation(s: Any, documents: list[str], questions: tuple[str, ...]) -> None:
    s += sgl.system("Answer from the documents in one short sentence.")
    s += sgl.user_begin()
    s += sgl.parallel_contexts(documents)
    s += questions[0] + sgl.user_end()
    s += sgl.assistant(sgl.gen("answer_0", max_tokens=24, temperature=0))
    for i, question in enumerate(questions[1:], start=1):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer_{i}", max_tokens=24, temperature=0))


class Turn(NamedTuple):
    """What came back for a question."""

    answer: str
    prompt_tokens: int
    cached_tokens: int


def run(url: str, chat_template: str | None = None) -> list[Turn]:
    """Hold the conversation with the server at ``url``."""
    documents = [(DOCUMENTS / f"{name}.txt").read_text() for name in NAMES]
    backend = sgl.RuntimeEndpoint(url, chat_template_name=chat_template)
    state = conversation.run(documents=documents, questions=QUESTIONS, backend=backend)
    turns = []
    for i in range(len(QUESTIONS)):
        meta = state.get_meta_info(f"answer_{i}")
        turns.append(Turn(state[f"answer_{i}"], meta["prompt_tokens"], meta["cached_tokens"]))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--chat-template", help="a name; by default SGLang guesses by the model's")
    args = parser.parse_args()
    for question, turn in zip(QUESTIONS, run(args.url, args.chat_template), strict=True):
        print(question)
        print(f"  {turn.answer.strip()}")
        print(f"  {turn.cached_tokens} of {turn.prompt_tokens} prompt tokens from the cache")


if __name__ == "__main__":
    main()
