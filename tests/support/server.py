"""A real SGLang server in a process of its own, for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 400
IDLE_SECONDS = 60


class Server:
    """``python -m sglang.launch_server`` on a free port of 127.0.0.1; a context manager.

    Args:
        model: path of the checkpoint.
        flags: further flags; without ``--device`` and ``--dtype`` it runs on the CPU in fp32.
        env: environment variables to add.
        log: file that gets the server's output.
        module: what is run, with the arguments of ``sglang.launch_server``.
    """

    def __init__(
        self,
        model: Path,
        flags: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        module: str = "sglang.launch_server",
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [
            *(sys.executable, "-m", module, "--model-path", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--random-seed", "1"),
            *("--log-level", "warning", "--sleep-on-idle"),
            *(() if "--device" in flags else ("--device", "cpu", "--dtype", "float32")),
            *flags,
        ]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.client = httpx.Client(base_url=self.url, timeout=300)

    def __enter__(self) -> "Server":
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self._command,
                env=self._env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.assert_alive()
            try:
                if self.client.get("/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.__exit__()
        raise TimeoutError(f"the server did not come up in {START_SECONDS} s:\n{self.log_tail()}")

    def __exit__(self, *_: object) -> None:
        self.client.close()
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def generate(self, body: Mapping[str, Any]) -> Any:
        """POST /generate, which must succeed."""
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def assert_alive(self) -> None:
        code = self.process.poll()
        assert code is None, f"the server ended with {code}:\n{self.log_tail()}"

    def assert_clean(self) -> None:
        """Idle, with every KV slot free or evictable: nothing locked, nothing leaked.

        SGLang's own check at idle, which ends the scheduler when slots are unaccounted for, runs
        before the load is reported.
        """
        deadline = time.monotonic() + IDLE_SECONDS
        load: dict[str, Any] = {}
        while time.monotonic() < deadline:
            self.assert_alive()
            load = self.client.get("/v1/loads").json()["loads"][0]
            if not any(load[key] for key in _BUSY):
                return
            time.sleep(0.2)
        raise AssertionError(f"not idle and clean after {IDLE_SECONDS} s: {load}")

    def flush(self) -> None:
        """Empty the KV cache."""
        self.assert_clean()
        response = self.client.post("/flush_cache", params={"timeout": 30})
        assert response.status_code == 200, response.text

    def log_tail(self, size: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""


_BUSY = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
