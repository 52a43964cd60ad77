"""Programs with parallel contexts: the exact bodies of their requests, and their errors."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend

import sglang_ape
from sglang_ape.errors import ApeRequestError
from sglang_ape.frontend import patches, runtime
from sglang_ape.frontend.attach import attach_to_sglang

DOCUMENTS = ["The Heron carries salt.\n", "The Lark carries wool.\n"]
GREEDY = {"temperature": 0, "max_new_tokens": 4}

Body = dict[str, Any]


class FakeServer:
    """Answers as ``/generate`` does and keeps the bodies; every answer is a number."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.info: dict[str, Any] = {"enable_ape": True}
        self.infos_asked = 0
        self.refusal: Body | None = None
        self._answers = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def take(self) -> list[Body]:
        """The bodies so far, without what does not change."""
        bodies, self.bodies = self.bodies, []
        for body in bodies:
            params = body["sampling_params"]
            body["sampling_params"] = {
                name: params[name] for name in ("max_new_tokens", "temperature") if name in params
            }
        return bodies

    def get(self, path: str) -> Body:
        if path == "/server_info":
            self.infos_asked += 1
            return self.info
        return {"model_path": "a-model"}

    def generate(self, body: Body) -> Any:
        with self._lock:
            self.bodies.append(body)
            self._answers += 1
            text = f" {self._answers}."
        if body.get("return_logprob"):
            queries = body.get("text", body.get("input_ids"))
            return [self._scored(i) for i in range(len(queries))]
        return {"text": text, "meta_info": {"prompt_tokens": 7}}

    def _scored(self, i: int) -> Body:
        rows = [[None, 1, "x"], [-3.0, 2, "y"], [-1.0 - i, 3, "z"]]
        return {
            "text": "",
            "meta_info": {"input_token_logprobs": rows, "output_token_logprobs": []},
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps(fake.get(self.path)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if fake.refusal is not None:
                    self._send(400, json.dumps(fake.refusal))
                    return
                answer = fake.generate(body)
                if not body.get("stream"):
                    self._send(200, json.dumps(answer))
                    return
                parts = [answer["text"][:2], answer["text"]]
                events = [json.dumps({**answer, "text": part}) for part in parts]
                self._send(200, "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))

            def _send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def backend(server: FakeServer) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(server.url)


@sgl.function
def ask(s: Any, documents: Any, question: str = " Who?", ape: Any = None) -> None:
    s += "Notes:\n"
    s += sgl.parallel_contexts(documents, **({} if ape is None else ape))
    s += question
    s += sgl.gen("answer", max_tokens=4, temperature=0)


def _body(text: str | list[str], **further: Any) -> Body:
    return {
        "prefix": "Notes:\n",
        "contexts": DOCUMENTS,
        "text": text,
        "sampling_params": GREEDY,
    } | further


##### Requests


def test_gen(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    state = ask.run(documents=DOCUMENTS, backend=backend)
    assert state["answer"] == " 1."
    assert server.take() == [_body(" Who?")]
    assert state.text() == "Notes:\n Who? 1."
    assert state.error() is None


def test_temperature_and_scale(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    for ape in ({"temperature": 0.8, "scale": 1}, {"scale": 0}, {"temperature": None}):
        ask.run(documents=tuple(DOCUMENTS), ape=ape, backend=backend).sync()
    assert server.take() == [
        _body(" Who?", ape={"temperature": 0.8, "scale": 1.0}),
        _body(" Who?", ape={"scale": 0.0}),
        _body(" Who?"),
    ]


def test_every_later_gen_has_the_contexts_and_what_was_generated(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Plan:" + sgl.gen("plan", max_tokens=4, temperature=0)
        s += sgl.parallel_contexts(DOCUMENTS) + " Who?"
        s += sgl.gen("first", max_tokens=4, temperature=0)
        s += " Sure?" + sgl.gen("second", max_tokens=4, temperature=0)

    program.run(backend=backend).sync()
    assert server.take() == [
        {"text": "Plan:", "sampling_params": GREEDY},
        _body(" Who?", prefix="Plan: 1."),
        _body(" Who? 2. Sure?", prefix="Plan: 1."),
    ]


def test_roles(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("Be short.")
        s += sgl.user_begin()
        s += sgl.parallel_contexts(DOCUMENTS)
        s += "Who?" + sgl.user_end()
        s += sgl.assistant(sgl.gen("answer", max_tokens=4, temperature=0))
        s += sgl.user("Sure?")
        s += sgl.assistant(sgl.gen("again", max_tokens=4, temperature=0))

    @sgl.function
    def in_one_expression(s: Any) -> None:
        with s.user():
            s += "Read: " + sgl.parallel_contexts(DOCUMENTS) + "Who?"
        s += sgl.assistant(sgl.gen("answer", max_tokens=4, temperature=0))

    state = program.run(backend=backend)
    assert state.messages()[1] == {"role": "user", "content": "Who?"}
    prefix = "SYSTEM:Be short.\nUSER:"
    assert server.take() == [
        _body("Who?\nASSISTANT:", prefix=prefix),
        _body("Who?\nASSISTANT: 1.\nUSER:Sure?\nASSISTANT:", prefix=prefix),
    ]
    in_one_expression.run(backend=backend).sync()
    assert server.take() == [_body("Who?\nASSISTANT:", prefix="USER:Read: ")]


def test_a_program_that_begins_with_its_contexts_gets_the_prefix_of_the_server(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS)
        s += " Who?" + sgl.gen("answer", max_tokens=4, temperature=0)

    program.run(backend=backend).sync()
    (body,) = server.take()
    assert "prefix" not in body
    assert (body["contexts"], body["text"]) == (DOCUMENTS, " Who?")


def test_streaming(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    state = ask.run(documents=DOCUMENTS, backend=backend, stream=True)
    assert "".join(state.text_iter("answer")) == " 1."
    assert server.take() == [_body(" Who?", stream=True)]


def test_asynchronous_streaming(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    async def collect() -> list[str]:
        state = ask.run(documents=DOCUMENTS, backend=backend, stream=True)
        return [part async for part in state.text_async_iter("answer")]

    assert "".join(asyncio.run(collect())) == " 1."
    assert server.take() == [_body(" Who?", stream=True)]


def test_select(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def program(s: Any, method: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS) + " Who?"
        s += sgl.select("choice", [" A", " B"], choices_method=method)

    state = program.run(method=sgl.token_length_normalized, backend=backend)
    assert state["choice"] == " A"
    first, scores = server.take()
    assert first == _body(" Who?", sampling_params={"max_new_tokens": 0})
    assert scores == _body(
        [" Who? A", " Who? B"],
        contexts=[DOCUMENTS, DOCUMENTS],
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        return_text_in_logprobs=True,
        logprob_start_len=5,
    )


def test_the_unconditional_pass_of_select_has_no_contexts(
    server: FakeServer, backend: sgl.RuntimeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS) + " Who?"
        s += sgl.select(
            "choice", [" A", " B"], choices_method=sgl.unconditional_likelihood_normalized
        )

    scored = [[-2.0, 1, "x"], [-3.0, 2, "y"]]
    answer = {"input_token_logprobs": scored, "output_token_logprobs": []}
    monkeypatch.setattr(server, "_scored", lambda i: {"text": "", "meta_info": answer})
    program.run(backend=backend).sync()
    assert server.take()[2] == {
        "input_ids": [[1, 2], [1, 2]],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
    }


def test_fork(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS) + " Q:"
        branches = s.fork(2)
        for branch, question in zip(branches.states, (" Who?", " Where?"), strict=True):
            branch += question
            branch += sgl.gen("answer", max_tokens=4, temperature=0)
            branch.sync()
        branches.join()
        s += " So:" + sgl.gen("last", max_tokens=4, temperature=0)

    state = program.run(backend=backend)
    assert state["answer"] == [" 2.", " 3."]
    state.sync()
    assert server.take() == [
        _body(" Q:", sampling_params={"max_new_tokens": 0}),
        _body(" Q: Who?"),
        _body(" Q: Where?"),
        _body(" Q: So:"),
    ]


def test_a_fork_right_behind_the_contexts_has_them_encoded_once(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS)
        branches = s.fork(2)
        branches += lambda i: f" Q{i}" + sgl.gen("answer", max_tokens=4, temperature=0)
        branches.join()

    state = program.run(backend=backend)
    assert sorted(state["answer"]) == [" 2.", " 3."]
    first, *others = server.take()
    assert first == _body("\n", sampling_params={"max_new_tokens": 0})
    assert sorted(others, key=lambda body: body["text"]) == [_body(" Q0"), _body(" Q1")]
    assert state.text() == "Notes:\n"

    @sgl.function
    def without_prefix(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS)
        s.fork(2)

    without_prefix.run(backend=backend)
    (body,) = server.take()
    assert (body["contexts"], body["text"]) == (DOCUMENTS, "\n")


def test_a_fork_before_the_contexts_lets_each_branch_have_its_own(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n"
        s.sync()  # SGLang fills the cache only for what it has evaluated before the fork
        for branch, document in zip(s.fork(2).states, DOCUMENTS, strict=True):
            branch += sgl.parallel_contexts([document]) + " Who?"
            branch += sgl.gen("answer", max_tokens=4, temperature=0)
            branch.sync()

    program.run(backend=backend).sync()
    assert server.take() == [
        {"text": "Notes:\n", "sampling_params": {"max_new_tokens": 0}},
        _body(" Who?", contexts=DOCUMENTS[:1]),
        _body(" Who?", contexts=DOCUMENTS[1:]),
    ]


def test_run_batch(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def program(s: Any, documents: Any, question: str) -> None:
        s += "A prefix that is long enough for SGLang to have it cached before the batch.\n"
        s += sgl.parallel_contexts(documents)
        s += question
        s += sgl.gen("answer", max_tokens=4, temperature=0)

    arguments = [
        {"documents": [DOCUMENTS[i % 2]] * (i + 1), "question": f" {i}?"} for i in range(5)
    ]
    states = program.run_batch(arguments, backend=backend)
    assert len({state["answer"] for state in states}) == 5
    cached, *bodies = server.take()
    prefix = cached["text"]
    assert cached == {"text": prefix, "sampling_params": {"max_new_tokens": 0}}
    assert sorted(bodies, key=lambda body: body["text"]) == [
        _body(own["question"], prefix=prefix, contexts=own["documents"]) for own in arguments
    ]
    assert server.infos_asked == 1


def test_one_expression_may_serve_many_programs(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    shared = sgl.parallel_contexts(DOCUMENTS)

    @sgl.function
    def program(s: Any, prefix: str) -> None:
        s += prefix
        s += shared
        s += " Who?" + sgl.gen("answer", max_tokens=4, temperature=0)

    for prefix in ("One:", "Another:"):
        program.run(prefix=prefix, backend=backend).sync()
    assert server.take() == [_body(" Who?", prefix="One:"), _body(" Who?", prefix="Another:")]


def test_a_runtime_is_a_backend(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    class Runtime:
        endpoint = backend

    assert ask.run(documents=DOCUMENTS, backend=Runtime())["answer"] == " 1."
    assert server.take() == [_body(" Who?")]


def test_a_program_can_be_traced(backend: sgl.RuntimeEndpoint) -> None:
    nodes = ask.trace(backend=backend, ape={}).nodes
    assert "ParallelContexts" in str(nodes)


def test_programs_without_contexts_send_what_they_always_sent(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n"
        s.sync()
        branches = s.fork(2)
        for branch in branches.states:
            branch += sgl.gen("answer", max_tokens=4, temperature=0)
            branch.sync()
        s += sgl.select("choice", ["A", "B"])

    server.info = {}  # not an APE server
    state = program.run(backend=backend)
    assert state["choice"] == "A"
    with pytest.raises(KeyError):
        state["nothing"]
    texts = [body["text"] for body in server.bodies]
    assert texts == [*["Notes:\n"] * 4, ["Notes:\nA", "Notes:\nB"]]
    assert not any({"contexts", "prefix", "ape"} & body.keys() for body in server.take())
    assert server.infos_asked == 0


##### Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": []}, "documents must not be empty"),
        ({"documents": "a text"}, "documents must be a list, got str"),
        ({"documents": None}, "documents must be a list, got NoneType"),
        ({"documents": ["a", 3]}, r"documents\[1\] must be a string or .*, got int"),
        ({"documents": [{"text": "a"}]}, r"documents\[0\] must be a string or "),
        ({"documents": ["a", {"id": 1}]}, r"documents\[1\] must be a string or "),
        ({"documents": ["a", {"id": ""}]}, r"documents\[1\] must not be empty"),
        ({"documents": ["a", ""]}, r"documents\[1\] must not be empty"),
        ({"documents": ["a"], "temperature": 0}, r"temperature must be in \(0, 10\], got 0"),
        ({"documents": ["a"], "temperature": float("nan")}, "temperature must be in .*, got nan"),
        ({"documents": ["a"], "temperature": True}, "temperature must be a number, got bool"),
        ({"documents": ["a"], "scale": -1}, r"scale must be in \[0, 10\], got -1"),
        ({"documents": ["a"], "scale": "1"}, "scale must be a number, got str"),
    ],
)
def test_wrong_arguments_reach_the_caller(
    server: FakeServer, backend: sgl.RuntimeEndpoint, arguments: Any, message: str
) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(**arguments) + " Who?"
        s += sgl.gen("answer", max_tokens=4)

    with pytest.raises(ValueError, match=message):
        program.run(backend=backend)
    with pytest.raises(ValueError, match=message):
        program.run_batch([{}, {}], backend=backend)
    assert server.take() == []


@pytest.mark.parametrize("threads", [1, 4])
def test_one_wrong_program_of_a_batch_fails_the_batch(
    backend: sgl.RuntimeEndpoint, threads: int
) -> None:
    batch = [{"documents": DOCUMENTS}, {"documents": []}, {"documents": DOCUMENTS}]
    with pytest.raises(ApeRequestError, match="must not be empty"):
        ask.run_batch(batch, backend=backend, num_threads=threads)


def test_a_second_use_is_refused(server: FakeServer, backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def twice(s: Any) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS) + " Who?"
        s += sgl.gen("answer", max_tokens=4)
        s += sgl.user(sgl.parallel_contexts(DOCUMENTS))

    @sgl.function
    def in_one_expression(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS) + " and " + sgl.parallel_contexts(DOCUMENTS)

    @sgl.function
    def in_a_branch(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS)
        s += " Who?"
        branch = s.fork(1)[0]
        branch += sgl.parallel_contexts(DOCUMENTS)

    for program in (twice, in_one_expression, in_a_branch):
        with pytest.raises(ApeRequestError, match="a second time"):
            program.run(backend=backend)
    assert all(body["contexts"] == DOCUMENTS for body in server.take())


def test_another_backend_is_refused() -> None:
    class Other(BaseBackend):
        pass

    with pytest.raises(ApeRequestError, match=r"needs an SGLang server .*, got Other"):
        ask.run(documents=DOCUMENTS, backend=Other())


@pytest.mark.parametrize("info", [{}, {"enable_ape": False}])
def test_a_server_without_ape_is_refused(
    server: FakeServer, backend: sgl.RuntimeEndpoint, info: Any
) -> None:
    server.info = info
    with pytest.raises(ApeRequestError, match=f"{server.url} was started without --enable-ape"):
        ask.run(documents=DOCUMENTS, backend=backend)
    assert server.take() == []
    server.info = {"enable_ape": True}  # started anew
    assert ask.run(documents=DOCUMENTS, backend=backend)["answer"] == " 1."


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
@pytest.mark.parametrize("stream", [False, True])
def test_contexts_without_a_query_are_refused(
    server: FakeServer, backend: sgl.RuntimeEndpoint, stream: bool
) -> None:
    state = ask.run(documents=DOCUMENTS, question="", backend=backend, stream=stream)
    with pytest.raises(ApeRequestError, match="nothing follows parallel_contexts"):
        list(state.text_iter("answer"))
    with pytest.raises(ApeRequestError, match="nothing follows parallel_contexts"):
        state["answer"]
    assert isinstance(state.error(), ApeRequestError)
    assert server.take() == []


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_refusal_of_the_server_reaches_whoever_asks_for_the_result(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def forking(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS)
        s.fork(2)

    server.refusal = {"error": {"message": "the contexts hold 9 tokens"}}
    for stream in (False, True):
        state = ask.run(documents=DOCUMENTS, backend=backend, stream=stream)
        with pytest.raises(RuntimeError, match="the contexts hold 9 tokens"):
            list(state.text_iter())
        with pytest.raises(RuntimeError, match="the contexts hold 9 tokens"):
            state["answer"]
    with pytest.raises(RuntimeError, match="the contexts hold 9 tokens"):
        forking.run(backend=backend)


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_after_an_error_a_program_ends_instead_of_waiting(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    @sgl.function
    def program(s: Any, forks: bool) -> None:
        s += "Notes:\n" + sgl.parallel_contexts(DOCUMENTS) + " Who?"
        s += sgl.gen("first", max_tokens=4)
        s.sync()
        if forks:
            s.fork(2)
        s += sgl.gen("second", max_tokens=4)

    server.refusal = {"error": {"message": "the contexts hold 9 tokens"}}
    for forks in (False, True):
        with pytest.raises(RuntimeError, match="the contexts hold 9 tokens"):
            program.run(forks=forks, backend=backend)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_wrong_arguments_reach_the_reader_of_a_stream(backend: sgl.RuntimeEndpoint) -> None:
    async def collect() -> None:
        state = ask.run(documents=[], backend=backend, stream=True)
        async for _ in state.text_async_iter("answer"):
            pass

    state = ask.run(documents=[], backend=backend, stream=True)
    with pytest.raises(ApeRequestError, match="documents must not be empty"):
        list(state.text_iter("answer"))
    with pytest.raises(ApeRequestError, match="documents must not be empty"):
        state["answer"]
    assert "documents must not be empty" in str(state.error())
    with pytest.raises(ApeRequestError, match="documents must not be empty"):
        asyncio.run(collect())


def test_no_thread_is_left_behind_by_an_error(backend: sgl.RuntimeEndpoint) -> None:
    @sgl.function
    def in_a_branch(s: Any) -> None:
        s += sgl.parallel_contexts(DOCUMENTS) + " Who?"
        branch = s.fork(1)[0]
        branch += sgl.parallel_contexts(DOCUMENTS)

    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(ApeRequestError):
            ask.run(documents=[], backend=backend)
        with pytest.raises(ApeRequestError):
            in_a_branch.run(backend=backend)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_failed_program_can_be_collected_while_a_thread_is_being_started(
    server: FakeServer, backend: sgl.RuntimeEndpoint
) -> None:
    """``threading`` starts and forgets threads under one lock, and may collect garbage there."""
    server.refusal = {"error": {"message": "contexts: too long"}}
    executor = ask.run(documents=DOCUMENTS, backend=backend).stream_executor
    executor.worker._tstate_lock.acquire()  # held as long as the worker lives
    executor.worker._tstate_lock.release()
    collector = threading.Thread(target=executor.end, daemon=True)
    with threading._shutdown_locks_lock:
        collector.start()
        collector.join(10)
        assert not collector.is_alive()


##### Attachment


def test_importing_the_package_is_light_and_order_does_not_matter(tmp_path: Path) -> None:
    """In a process of its own, with a stand-in for SGLang of which one method is missing."""
    package = tmp_path / "sglang"
    backend_folder = package / "lang" / "backend"
    backend_folder.mkdir(parents=True)
    (package / "__init__.py").write_text("from sglang.lang.backend import runtime_endpoint\n")
    (package / "lang" / "__init__.py").write_text("")
    (package / "lang" / "ir.py").write_text(
        "".join(f"class {name}: pass\n" for name in ("SglExpr", "SglExprList", "SglCommitLazy"))
    )
    (package / "lang" / "interpreter.py").write_text("class StreamExecutor: pass\n")
    (backend_folder / "__init__.py").write_text("")
    (backend_folder / "runtime_endpoint.py").write_text(
        "import sglang.lang.interpreter\nclass RuntimeEndpoint: pass\nclass Runtime: pass\n"
    )
    for imports in ("import sglang_ape, sglang", "import sglang, sglang_ape"):
        script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
finders = list(sys.meta_path)
import sglang_ape
assert not {{"sglang", "torch", "numpy"}} & sys.modules.keys()
del sys.modules["sglang_ape"], sys.modules["sglang_ape.frontend.attach"]
sys.meta_path[:] = finders
{imports}
assert sys.meta_path == finders
try:
    sglang.parallel_contexts(["a"])
except RuntimeError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(sglang_ape.__file__).parents[1])},
        )
        assert done.returncode == 0, done.stderr
        assert "sglang.lang.interpreter.StreamExecutor.submit is missing" in done.stdout


def test_every_patched_method_is_patched_once() -> None:
    patches.install()
    for patch in patches.PATCHES:
        method = getattr(getattr(patch.module, patch.owner), patch.method)
        assert tuple(inspect.signature(method).parameters) == patch.parameters
        assert not hasattr(method.__wrapped__, "__wrapped__")


def test_another_sglang_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(self: Any, other: Any, more: Any) -> None:
        raise AssertionError("never called")

    monkeypatch.setattr(sgl, "parallel_contexts", None)
    monkeypatch.setattr(patches, "_installed", False)
    monkeypatch.setattr("sglang.lang.interpreter.StreamExecutor._execute", execute)
    attach_to_sglang()
    with pytest.raises(RuntimeError, match=r"StreamExecutor\._execute takes \(self, other, more\)"):
        sgl.parallel_contexts(["a"])
    monkeypatch.setattr("sglang_ape.compat.version", lambda name: "0.5.99")
    attach_to_sglang()
    with pytest.raises(RuntimeError, match=r"supports SGLang 0\.5\.17, but 0\.5\.99 is installed"):
        sgl.parallel_contexts(["a"])


@pytest.mark.parametrize(
    ("kwargs", "loads"), [({"enable_ape": True}, 1), ({"ape_scale": 1.0}, 1), ({"tp_size": 1}, 0)]
)
def test_a_runtime_with_ape_flags_loads_the_plugins(
    monkeypatch: pytest.MonkeyPatch, kwargs: Any, loads: int
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: calls.append("plugins"))
    original: Callable[..., None] = lambda *args, **kwargs: calls.append(kwargs)  # noqa: E731
    runtime.around_init(original, object(), log_level="error", **kwargs)
    assert calls == [*["plugins"] * loads, {"log_level": "error", **kwargs}]
