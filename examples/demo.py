"""The demo: a real server, the official OpenAI client, and a few documents as contexts.

``python -m examples.demo`` asks five questions and shows what of each prompt came from the cache.
A document that has been read once is never computed again: not for another question, not in
another order, not among other documents, and not at the head of an ordinary request.

Exits with 1 if a shuffled request had to read its documents again, or an answer was empty.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import httpx
import openai
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples import small_model

DOCUMENTS = Path(__file__).parent / "documents"
SYSTEM = "Answer the question from the documents in one short sentence."
MAX_TOKENS = 24
CPU_POOL_TOKENS = 16384
START_SECONDS = 3600  # a hub model may have to be downloaded first
STOP_SECONDS = 20
REQUEST_SECONDS = 600
LOG_LINES = 30
SEAM_TOKENS = 2  # where P meets Q, some tokenizers merge what the server tokenizes apart

Process = subprocess.Popen[bytes]


class DemoError(Exception):
    """The demo cannot go on; the message is for the user."""


@dataclass(frozen=True)
class Step:
    """One request of the demo."""

    name: str
    what: str
    question: str
    documents: tuple[str, ...]
    plain: bool = False  # an ordinary request: the documents stand in the user's message
    all_cached: bool = False  # the prefix and every context must come from the cache

    def contexts(self) -> list[str]:
        return [(DOCUMENTS / f"{name}.txt").read_text() for name in self.documents]


@dataclass(frozen=True)
class Answer:
    """What came back for a step."""

    step: Step
    text: str
    prompt_tokens: int
    cached_tokens: int
    first_token_ms: float

    @property
    def cached_share(self) -> str:
        return f"{100 * self.cached_tokens / self.prompt_tokens:.0f} %"


WARM_UP = Step("warm-up", "one document", "Who directs the observatory?", ("observatory",))
COLD = Step(
    "cold",
    "four documents",
    "In which year did the Kelder Mountain Railway open?",
    ("harbour_museum", "mountain_railway", "bakery_cooperative", "lighthouse"),
)
SHUFFLED = Step(
    "shuffled",
    "another order, another question",
    "How high is the tower of the Skarn Point Lighthouse?",
    ("lighthouse", "bakery_cooperative", "harbour_museum", "mountain_railway"),
    all_cached=True,
)
STEPS = (
    COLD,
    Step("again", "the same request", COLD.question, COLD.documents),
    SHUFFLED,
    Step(
        "subset",
        "two of them and a new one",
        "Who is the librarian of the Brae Hill Library?",
        ("lighthouse", "mountain_railway", "town_library"),
    ),
    Step(
        "ordinary",
        "no contexts: the first document, then the question, in the message",
        "In which year was the Harbour Museum founded?",
        ("harbour_museum",),
        plain=True,
    ),
)


##### The server


def server_command(model: str, port: int, device: str) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # Without the second flag SGLang leaves cached_tokens out of the OpenAI routes' usage.
    command += ["--enable-ape", "--enable-cache-report"]
    if device == "cpu":
        command += ["--device", "cpu", "--dtype", "float32"]
        # Otherwise the KV pool takes, and clears, nearly all of the memory there is.
        command += ["--max-total-tokens", str(CPU_POOL_TOKENS)]
    return command


def server_environment(device: str) -> dict[str, str]:
    """Ours, so changed that the server finds itself behind a proxy, and no GPU on the CPU."""
    env = dict(os.environ)
    unproxied = env.get("no_proxy") or env.get("NO_PROXY")
    env["no_proxy"] = f"{unproxied},127.0.0.1" if unproxied else "127.0.0.1"
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


@contextmanager
def running(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    """Run ``command`` in a process group of its own, which ends with the block."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise DemoError(
            f"cannot write {log} ({error.strerror}): set SGLANG_APE_CACHE to a folder elsewhere"
        ) from error
    with output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: Process) -> None:
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)  # whatever is left of the group
        process.wait()


def _signal_group(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def wait_until_ready(process: Process, http: httpx.Client, log: Path) -> None:
    """Return when /health answers; raise DemoError when the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with code {process.returncode}.\n{_tail(log)}")
        with suppress(httpx.TransportError):
            if http.get("/health").is_success:
                return
        time.sleep(0.5)
    raise DemoError(f"the server was not ready after {START_SECONDS} s.\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"The last lines of its log, {log}:", *(f"  {line}" for line in lines)])


##### The requests


def ask(client: openai.OpenAI, model: str, step: Step, max_tokens: int = MAX_TOKENS) -> Answer:
    """Send ``step`` and read the stream to its end."""
    contexts = step.contexts()
    content = "".join(contexts) + step.question if step.plain else step.question
    started = time.perf_counter()
    first = None
    text = ""
    usage = None
    stream = client.chat.completions.create(
        model=model,
        messages=_messages(content),
        extra_body={} if step.plain else {"contexts": contexts},
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=max_tokens,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
    if usage is None:
        raise DemoError(f"{step.name}: the stream ended without usage")
    details = usage.prompt_tokens_details
    return Answer(
        step=step,
        text=text.strip(),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens if details else None) or 0,
        first_token_ms=1000 * ((first or time.perf_counter()) - started),
    )


def _messages(content: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def warm_up(client: openai.OpenAI, http: httpx.Client, model: str) -> None:
    """Have kernels compiled before the first time is taken, and leave the cache empty."""
    ask(client, model, WARM_UP, max_tokens=2)
    http.post("/flush_cache", params={"timeout": 30}).raise_for_status()


def shared_tokens(http: httpx.Client, step: Step) -> int:
    """How many tokens the prefix and the contexts of ``step`` have."""
    question, other = (_tokenize(http, messages=_messages(c)) for c in (step.question, "0"))
    prefix = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question, other, strict=False))
    )
    contexts = _tokenize(http, prompt=step.contexts(), add_special_tokens=False)
    return prefix + sum(map(len, contexts))


def _tokenize(http: httpx.Client, **body: object) -> list:
    response = http.post("/tokenize", json=body)
    response.raise_for_status()
    return response.json()["tokens"]


##### What is shown


def table(answers: Sequence[Answer], asking: Step | None = None) -> Table:
    shown = Table(show_lines=True)
    shown.add_column("Request and answer", ratio=1)
    for title in ("Tokens", "Cached", "First token"):
        shown.add_column(title, justify="right")
    for answer in answers:
        shown.add_row(
            _exchange(answer.step, answer.text),
            str(answer.prompt_tokens),
            f"{answer.cached_tokens}\n{answer.cached_share}",
            f"{answer.first_token_ms:.0f} ms",
        )
    if asking:
        shown.add_row(_exchange(asking, "…"))
    return shown


def _exchange(step: Step, answer: str) -> Text:
    heading = (step.name, "bold"), f": {step.what}"
    return Text.assemble(*heading, "\n", (step.question, "italic"), "\n", (answer, "green"))


def summary(answers: Sequence[Answer]) -> str:
    shares = ", ".join(f"{answer.step.name} {answer.cached_share}" for answer in answers)
    first = {answer.step: answer.first_token_ms for answer in answers}
    ratio = first[COLD] / first[SHUFFLED]
    return (
        f"Prompt tokens from the cache: {shares}. The cold request took {ratio:.1f} times as long "
        "to its first token as the shuffled one."
    )


def problems(answers: Sequence[Answer], http: httpx.Client) -> list[str]:
    """What did not go as it must, a sentence each."""
    found = [f"{a.step.name}: the answer is empty." for a in answers if not a.text]
    for answer in answers:
        needed = shared_tokens(http, answer.step) if answer.step.all_cached else 0
        if answer.cached_tokens < needed - SEAM_TOKENS:
            found.append(
                f"{answer.step.name}: {answer.cached_tokens} tokens were cached, but the prefix "
                f"and the contexts have {needed}: some were computed again."
            )
    return found


##### The whole


def run(model: str, port: int, device: str, console: Console) -> int:
    log = small_model.cache_folder() / "demo-server.log"
    url = f"http://127.0.0.1:{port}"
    starting = f"start the server on the {device} (log: {log})"
    with (
        running(server_command(model, port, device), server_environment(device), log) as process,
        httpx.Client(base_url=url, timeout=REQUEST_SECONDS, trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="EMPTY",
            max_retries=0,
            timeout=REQUEST_SECONDS,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client,
    ):
        try:
            with small_model.steps_shown() as progress:
                with small_model.step_shown(progress, starting):
                    wait_until_ready(process, http, log)
                with small_model.step_shown(progress, "warm up"):
                    warm_up(client, http, model)
            answers = _ask_all(client, model, console)
            found = problems(answers, http)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise DemoError(f"a request failed: {error}\n{_tail(log)}") from error
    console.print(f"\n{summary(answers)}")
    for problem in found:
        console.print(problem, style="red", markup=False)
    return 1 if found else 0


def _ask_all(client: openai.OpenAI, model: str, console: Console) -> list[Answer]:
    answers: list[Answer] = []
    with Live(console=console) as live:
        for step in STEPS:
            live.update(table(answers, asking=step))
            answers.append(ask(client, model, step))
            live.update(table(answers))
    return answers


def _pick_port(asked: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", asked or 0))
        except OSError as error:
            reason = f"port {asked} cannot be used ({error.strerror})"
            raise DemoError(f"{reason}: leave --port out for a free one") from error
        return probe.getsockname()[1]


def _pick_device(asked: str) -> str:
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise DemoError("PyTorch finds no CUDA device here: use --device cpu")
    return "cpu"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="path or hub name (default: a small model, made once)")
    parser.add_argument("--port", type=int, help="the server's port (default: a free one)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # the server ends, too
    try:
        port = _pick_port(arguments.port)
        device = _pick_device(arguments.device)
        model = arguments.model or str(small_model.ensure_small_model())
        return run(model, port, device, Console())
    except (DemoError, small_model.SmallModelError) as error:
        text = Text(f"error: {error}", style="red")
        Console(stderr=True).print(text, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
