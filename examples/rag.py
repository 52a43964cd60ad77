"""Questions over a few documents, with ``sgl.parallel_contexts``.

``python -m examples.rag [--url http://127.0.0.1:30000]`` asks a server that was started with
``--enable-ape``. Each question brings the documents that a search would have found for it, in an
order of its own; whatever document the server has read before comes from its cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import sglang as sgl

import sglang_ape  # noqa: F401  adds sgl.parallel_contexts

DOCUMENTS = Path(__file__).parent / "documents"


class Question(NamedTuple):
    """A question and the documents found for it."""

    text: str
    documents: tuple[str, ...]


QUESTIONS = (
    Question(
        "In which year did the Kelder Mountain Railway open?",
        ("mountain_railway", "harbour_museum", "lighthouse", "town_library"),
    ),
    Question(
        "How high is the tower of the Skarn Point Lighthouse?",
        ("town_library", "lighthouse", "mountain_railway"),
    ),
    Question(
        "Who is the librarian of the Brae Hill Library?",
        ("observatory", "town_library", "lighthouse"),
    ),
)


@sgl.function
def answer(s: Any, documents: list[str], question: str) -> None:
    s += sgl.system("Answer the question from the documents in one short sentence.")
    s += sgl.user_begin()
    s += sgl.parallel_contexts(documents)
    s += question + sgl.user_end()
    s += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))


class Answer(NamedTuple):
    """What came back for a question."""

    text: str
    prompt_tokens: int
    cached_tokens: int


def run(url: str, chat_template: str | None = None) -> list[Answer]:
    """Ask the server at ``url`` all questions, one after another."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name=chat_template)
    answers = []
    for question in QUESTIONS:
        documents = [(DOCUMENTS / f"{name}.txt").read_text() for name in question.documents]
        state = answer.run(documents=documents, question=question.text, backend=backend)
        meta = state.get_meta_info("answer")
        answers.append(Answer(state["answer"], meta["prompt_tokens"], meta["cached_tokens"]))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--chat-template", help="a name; by default SGLang guesses by the model's")
    args = parser.parse_args()
    answers = run(args.url, args.chat_template)
    for question, found in zip(QUESTIONS, answers, strict=True):
        print(question.text)
        print(f"  {found.text.strip()}")
        print(f"  {found.cached_tokens} of {found.prompt_tokens} prompt tokens from the cache")


if __name__ == "__main__":
    main()
