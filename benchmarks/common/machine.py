"""The machine: what it is, what it can do at best, and how much GPU memory is in use."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "sglang",
    "torch",
    "triton",
    "flashinfer-python",
    "sglang-kernel",
    "sgl-kernel",
    "numpy",
    "sglang-ape",
)
GEMM_SIZE = 8192
COPY_BYTES = 1 << 30
WARM_UP, REPEATS = 50, 200  # calls, of about a millisecond on a large GPU


def describe() -> dict[str, Any]:
    return {
        "gpu": _query_gpu("name,driver_version,memory.total"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def used_memory() -> int | None:
    """Bytes in use on the first GPU by all processes, None without a GPU.

    PyTorch keeps what it has once taken, so this is the peak of what was reserved.
    """
    mebibytes = _query_gpu("memory.used")
    return int(mebibytes.splitlines()[0].split()[0]) << 20 if mebibytes else None


def measure_floor() -> dict[str, float]:
    """Bytes a second of a copy on the device, and operations a second of a bf16 product.

    A forked process measures them, so that its memory and its context are gone afterwards. Call
    this before anything touches CUDA in the present process.
    """
    import torch  # noqa: F401  imported once, here, and inherited by the fork

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send,))
    process.start()
    send.close()
    try:
        found = receive.recv() if receive.poll(60) else "it took over 60 s"
    except EOFError:
        found = "its process died"
    process.join(10)
    if process.is_alive():
        process.kill()
    if isinstance(found, str):
        raise RuntimeError(f"the floor was not measured: {found}")
    return found


def _measure(send: Any) -> None:
    try:
        send.send(_rates())
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


def _rates() -> dict[str, float]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, count = (GEMM_SIZE, COPY_BYTES) if device == "cuda" else (256, 1 << 22)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    matmul = _median_seconds(lambda: left @ right, device)
    return {"copy": 2 * count / copy, "matmul": 2 * size**3 / matmul}


def _median_seconds(call: Callable[[], Any], device: str) -> float:
    """Of calls timed one by one, after a warm-up, by the device's own clock if it has one."""
    import torch

    times = []
    if device == "cpu":
        for _ in range(5):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    for _ in range(WARM_UP):
        call()
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _query_gpu(fields: str) -> str | None:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    return _output(command)


def _commit() -> str | None:
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
