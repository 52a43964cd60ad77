"""Programs of the frontend language get what the same requests get over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang as sgl

import sglang_ape  # noqa: F401  adds sgl.parallel_contexts
from examples import many_shot, rag, two_turns

DOCUMENTS = [
    "The Heron brought salt and timber on Monday.\n",
    "The Lark brought wool and barley on Tuesday.\n",
    "The museum opens at nine in the morning.\n",
]
OPTIONS = {"temperature": 0.8, "scale": 0.7}
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
GEN: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def runtime(tiny_llama: Path) -> Iterator[sgl.Runtime]:
    """A server started by the frontend itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        started = sgl.Runtime(
            model_path=str(tiny_llama),
            enable_ape=True,
            device="cpu",
            dtype="float32",
            random_seed=1,
            max_total_tokens=8192,
            launch_timeout=400,
        )
    yield started
    started.shutdown()


@pytest.fixture(params=["runtime", "remote"])
def backend(request: pytest.FixtureRequest, runtime: sgl.Runtime) -> Any:
    return runtime if request.param == "runtime" else sgl.RuntimeEndpoint(runtime.url)


def _ask(runtime: sgl.Runtime, text: Any, **further: Any) -> Any:
    """The same over HTTP, from an empty cache."""
    httpx.post(f"{runtime.url}/flush_cache", params={"timeout": 30}).raise_for_status()
    body = {
        "prefix": "Notes:\n",
        "contexts": DOCUMENTS,
        "text": text,
        "ape": OPTIONS,
        "sampling_params": GREEDY,
    } | further
    response = httpx.post(f"{runtime.url}/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()


def _place(s: Any, documents: list[str] = DOCUMENTS) -> None:
    s += "Notes:\n"
    s += sgl.parallel_contexts(documents, **OPTIONS)


@sgl.function
def two_questions(s: Any) -> None:
    _place(s)
    s += "Which ship carried timber?" + sgl.gen("first", **GEN)
    s += " When?" + sgl.gen("second", **GEN)


def _two_answers(runtime: sgl.Runtime) -> tuple[Any, Any]:
    first = _ask(runtime, "Which ship carried timber?")
    text = f"Which ship carried timber?{first['text']} When?"
    return first, _ask(runtime, text)


def test_gen_twice(runtime: sgl.Runtime, backend: Any) -> None:
    first, second = _two_answers(runtime)
    state = two_questions.run(backend=backend)
    assert (state["first"], state["second"]) == (first["text"], second["text"])
    meta = state.get_meta_info("second")
    assert meta["prompt_tokens"] == second["meta_info"]["prompt_tokens"]
    again = two_questions.run(backend=backend).get_meta_info("second")
    assert again["cached_tokens"] == again["prompt_tokens"] - 1


def test_contexts_make_a_difference(runtime: sgl.Runtime) -> None:
    plain = {"contexts": None, "prefix": None, "ape": None}
    other = _ask(runtime, "Which ship carried timber?", contexts=DOCUMENTS[1:])
    without = _ask(runtime, "Notes:\nWhich ship carried timber?", **plain)
    with_them = _ask(runtime, "Which ship carried timber?")
    assert len({answer["text"] for answer in (other, without, with_them)}) == 3


def test_streaming(runtime: sgl.Runtime, backend: Any) -> None:
    first, second = _two_answers(runtime)
    state = two_questions.run(backend=backend, stream=True)
    parts = list(state.text_iter("first"))
    assert "".join(parts) == first["text"]
    assert "".join(state.text_iter("second")) == second["text"]


def test_chat_roles(runtime: sgl.Runtime, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("Answer shortly.")
        s += sgl.user(sgl.parallel_contexts(DOCUMENTS, **OPTIONS) + "Which ship?")
        s += sgl.assistant(sgl.gen("answer", **GEN))

    wanted = _ask(runtime, "Which ship?\nASSISTANT:", prefix="SYSTEM:Answer shortly.\nUSER:")
    assert program.run(backend=backend)["answer"] == wanted["text"]


def test_no_prefix(runtime: sgl.Runtime) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS, **OPTIONS)
        s += "Which ship?" + sgl.gen("answer", **GEN)

    wanted = _ask(runtime, "Which ship?", prefix=None)
    assert program.run(backend=runtime)["answer"] == wanted["text"]


def test_fork(runtime: sgl.Runtime, backend: Any) -> None:
    questions = ["Which ship?", "On which day?", "When does it open?"]

    @sgl.function
    def program(s: Any) -> None:
        _place(s)
        branches = s.fork(len(questions))
        branches += lambda i: questions[i] + sgl.gen("answers", **GEN)
        branches.join()

    wanted = [_ask(runtime, question)["text"] for question in questions]
    assert program.run(backend=backend)["answers"] == wanted


def test_run_batch(runtime: sgl.Runtime, backend: Any) -> None:
    @sgl.function
    def program(s: Any, documents: list[str], question: str) -> None:
        _place(s, documents)
        s += question + sgl.gen("answer", **GEN)

    arguments = [
        {"documents": DOCUMENTS[: 1 + i % 3], "question": question}
        for i, question in enumerate(["Which ship?", "On which day?", "Where?", "Who?", "Why?"])
    ]
    wanted = [
        _ask(runtime, own["question"], contexts=own["documents"])["text"] for own in arguments
    ]
    states = program.run_batch(arguments, backend=backend)
    assert [state["answer"] for state in states] == wanted


def _scores(runtime: sgl.Runtime, question: str, choices: list[str]) -> list[float]:
    """Mean log-probability of the last token of Q and of each choice's tokens."""
    nothing = {"sampling_params": {"max_new_tokens": 0}}
    length = _ask(runtime, question, **nothing)["meta_info"]["prompt_tokens"]
    scores = []
    for choice in choices:
        answer = _ask(
            runtime, question + choice, return_logprob=True, logprob_start_len=length - 2, **nothing
        )
        rows = answer["meta_info"]["input_token_logprobs"][1:]
        scores.append(sum(row[0] for row in rows) / len(rows))
    return scores


def test_select(runtime: sgl.Runtime, backend: Any) -> None:
    choices = [" the Heron", " the Lark", " the keeper of the lighthouse"]

    @sgl.function
    def program(s: Any) -> None:
        _place(s)
        s += "Which ship carried timber? It was"
        s += sgl.select("ship", choices)
        s += "." + sgl.gen("more", **GEN)

    question = "Which ship carried timber? It was"
    wanted = _scores(runtime, question, choices)
    state = program.run(backend=backend)
    assert state["ship"] == choices[wanted.index(max(wanted))]
    served = state.get_meta_info("ship")["normalized_prompt_logprobs"]
    assert served == pytest.approx(wanted, abs=1e-4)
    assert state["more"] == _ask(runtime, f"{question}{state['ship']}.")["text"]


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_refusal_of_the_server_reaches_the_caller(runtime: sgl.Runtime) -> None:
    @sgl.function
    def program(s: Any) -> None:
        _place(s, ["salt and timber " * 20000])
        s += "Which ship?" + sgl.gen("answer", **GEN)

    with pytest.raises(RuntimeError, match="contexts"):
        program.run(backend=runtime)["answer"]


TEMPLATES = pytest.mark.parametrize("template", [None, "chatml"])


@TEMPLATES
def test_rag(runtime: sgl.Runtime, template: str | None) -> None:
    answers = rag.run(runtime.url, template)
    assert len(answers) == len(rag.QUESTIONS) and all(answers)


def test_many_shot(runtime: sgl.Runtime) -> None:
    labels = many_shot.run(runtime.url)
    assert len(labels) == len(many_shot.QUESTIONS) and set(labels) <= set(many_shot.LABELS)


@TEMPLATES
def test_two_turns(runtime: sgl.Runtime, template: str | None) -> None:
    turns = two_turns.run(runtime.url, template)
    assert len(turns) == 2 and all(turn.answer for turn in turns)
    first, second = turns
    assert second.cached_tokens >= first.prompt_tokens - 1
