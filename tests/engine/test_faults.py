"""What becomes of requests and processes when a server is stopped, hurt or started twice."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.oracle import Oracle
from tests.support.server import Server

PREFIX, QUERY = [5, 6, 7], [8, 9]
CONTEXTS = [list(range(10, 40)), list(range(50, 90)), list(range(100, 120))]
FLAGS = ("--enable-ape", "--max-total-tokens", "16384")
GRACE_SECONDS = 60

# Pins of 264 tokens in a pool of 1,200
PIN_FLAGS = ("--enable-ape", "--max-total-tokens", "1200", "--ape-max-pinned-tokens", "300")
PINNED = {"contexts": [{"input_ids": [200 + i, *range(65)]} for i in range(4)]}
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture
def server(tiny_llama: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(tiny_llama, FLAGS, tmp_path / "log") as server:
        yield server


def body(new_tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "prefix_ids": PREFIX,
        "contexts": [{"input_ids": ids} for ids in CONTEXTS],
        "input_ids": QUERY,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        **fields,
    }


def _register(server: Server, pin: bool = False) -> None:
    assert server.post("/ape/contexts", {**PINNED, "pin": pin}).status_code == 200


async def _asked(
    server: Server,
    bodies: list[tuple[str, dict[str, Any]]],
    then: Any,
    seconds: float = 1.5,
    apart: float = 0.0,
) -> list[httpx.Response | Exception]:
    """Send all, do something while they are under way, and return what became of each."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        tasks = []
        for path, given in bodies:
            tasks.append(asyncio.create_task(client.post(path, json=given)))
            await asyncio.sleep(apart)
        await asyncio.sleep(seconds)
        assert not all(task.done() for task in tasks), "they were done before anything happened"
        then()
        return await asyncio.gather(*tasks, return_exceptions=True)


def _family(server: Server) -> list[psutil.Process]:
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


def _assert_gone(family: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    alive = [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    assert not alive, [one.cmdline() for one in alive]


def test_a_stopped_server_answers_what_is_in_flight_and_ends_with_all_its_processes(
    server: Server, tiny_llama: Path
) -> None:
    """SIGTERM: SGLang drains. A registration is drained like a request."""
    family = _family(server)
    many = [{"input_ids": [200 + i, *range(20)]} for i in range(200)]
    bodies = [("/generate", body(300))] * 4
    bodies.append(("/ape/contexts", {"prefix_ids": PREFIX, "contexts": many}))
    answers = asyncio.run(_asked(server, bodies, lambda: family[0].send_signal(signal.SIGTERM)))
    expected = Oracle(tiny_llama).generate(PREFIX, CONTEXTS, QUERY, 300, 0.9, 0.9)
    for answer in answers[:4]:
        assert isinstance(answer, httpx.Response) and answer.status_code == 200, answer
        assert answer.json()["output_ids"] == expected.token_ids
    registered = answers[4]
    assert isinstance(registered, httpx.Response) and registered.status_code == 200, registered
    assert len(registered.json()["contexts"]) == 200
    _assert_gone(family, GRACE_SECONDS)


def test_a_killed_scheduler_ends_the_server_which_says_why(server: Server) -> None:
    family = _family(server)
    (scheduler,) = (one for one in family if "scheduler" in " ".join(one.cmdline()))
    begin = time.monotonic()
    bodies = [("/generate", body(2000, stream=i % 2 == 0)) for i in range(4)]
    answers = asyncio.run(_asked(server, bodies, scheduler.kill))
    assert time.monotonic() - begin < GRACE_SECONDS, "clients were left waiting"
    for answer in answers:
        assert isinstance(answer, httpx.TransportError) or answer.status_code >= 500, answer
    _assert_gone(family, GRACE_SECONDS)
    assert "scheduler" in server.log_tail().lower()


def test_a_request_that_later_pins_keep_out_is_refused_and_the_others_go_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    large = {"input_ids": [5, 6] * 500, "sampling_params": SAMPLING}
    small = {"input_ids": [5, 6], "sampling_params": SAMPLING}
    running = {"input_ids": [9] * 200, "sampling_params": {**SAMPLING, "max_new_tokens": 600}}
    with Server(tiny_llama, PIN_FLAGS, tmp_path / "log") as server:
        _register(server)
        bodies = [("/generate", running), ("/generate", large), ("/generate", small)]
        pin = partial(_register, server, pin=True)
        answers = asyncio.run(_asked(server, bodies, pin, seconds=0.1, apart=0.15))
        assert all(isinstance(answer, httpx.Response) for answer in answers), answers
        assert [answer.status_code for answer in answers] == [200, 400, 200]
        assert "pinned since it came" in answers[1].text
        for context in server.client.get("/ape/contexts").json()["contexts"]:
            server.client.delete(f"/ape/contexts/{context['id']}")
        server.generate(large)
        server.assert_clean()


def test_pins_that_come_while_a_request_runs_leave_it_the_memory_it_counts_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    chunked = {"input_ids": [5, 6] * 500, "sampling_params": SAMPLING}
    decoding = {"input_ids": [9] * 600, "sampling_params": {**SAMPLING, "max_new_tokens": 550}}
    flags = (*PIN_FLAGS, "--chunked-prefill-size", "16")
    with Server(tiny_llama, flags, tmp_path / "log") as server:
        pin = partial(_register, server, pin=True)
        for body, seconds in ((chunked, 0.05), (decoding, 0.7)):
            _register(server)
            (answer,) = asyncio.run(_asked(server, [("/generate", body)], pin, seconds))
            assert isinstance(answer, httpx.Response) and answer.status_code == 200, answer
            # What the request took of them is computed, and held, as soon as somebody asks.
            server.generate({"input_ids": [7], **PINNED, "sampling_params": SAMPLING})
            for token in range(20, 24):  # fill the rest of the pool with other things
                server.generate({"input_ids": [8, *[token] * 800], "sampling_params": SAMPLING})
            listed = server.client.get("/ape/contexts").json()["contexts"]
            assert [context["cached_tokens"] for context in listed] == [66] * 4
            for context in listed:
                server.client.delete(f"/ape/contexts/{context['id']}")
            server.flush()


def test_a_port_in_use_ends_the_start_and_leaves_the_other_server_alone(
    server: Server, tiny_llama: Path, tmp_path: Path
) -> None:
    other = Server(tiny_llama, FLAGS, tmp_path / "other")
    other.port, other.url = server.port, server.url
    command = other._command
    command[command.index("--port") + 1] = str(server.port)
    with other.log.open("wb") as log:
        done = subprocess.run(command, env=other._env, stdout=log, stderr=log, timeout=300)
    assert done.returncode != 0
    assert str(server.port) in other.log_tail() and "in use" in other.log_tail()
    assert server.generate(body(4))["meta_info"]["ape"]["contexts"] == 3
    server.assert_clean()
