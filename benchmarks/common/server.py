"""Real servers: one that a benchmark starts for itself, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

START_SECONDS = 1800  # the first start on a GPU may compile a kernel
STOP_SECONDS = 20
LOG_CHARACTERS = 3000  # of its end, shown when a server fails


class ServerError(Exception):
    """No server to measure; the message is for the user."""


class Running(NamedTuple):
    """A server that answers."""

    url: str
    start_seconds: float | None  # until its first healthy answer; None if it ran before


@contextlib.contextmanager
def started(model: str, flags: Sequence[str], log: Path) -> Iterator[Running]:
    """Start ``sglang.launch_server`` on a free port of this machine, and stop it in the end.

    Args:
        model: path or name of the model.
        flags: all other flags of the server.
        log: file for all that the server prints.

    Raises:
        ServerError: it ended, or was not healthy in time; with the end of its log.
    """
    port = _free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting the server; its output goes to {log}", flush=True)
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(process, url, begin, log)
        seconds = time.perf_counter() - begin
        print(f"the server is up after {seconds:.0f} s", flush=True)
        yield Running(url, seconds)
    finally:
        _stop(process)


def _await_health(process: subprocess.Popen[bytes], url: str, begin: float, log: Path) -> None:
    while process.poll() is None and time.perf_counter() - begin < START_SECONDS:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    end = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    code = process.poll()
    what = f"was not up after {START_SECONDS} s" if code is None else f"ended with status {code}"
    raise ServerError(f"the server {what}; the end of {log}:\n{end}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and its helper processes: all of its session."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    """Ours, so changed that the server's own start-up request goes past any proxy."""
    unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return {**os.environ, "no_proxy": f"{unproxied},127.0.0.1" if unproxied else "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
