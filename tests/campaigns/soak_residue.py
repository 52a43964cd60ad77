"""What a server holds: processes, threads, file handles, memory, and tasks of its event loop."""

import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# Python's default pool starts a thread whenever it happens to be busy, up to this many.
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
_MIB = 1 << 20
TELL_SECONDS = 60


class Holdings(NamedTuple):
    """Of one process."""

    name: str
    threads: int
    handles: Counter[str]  # open file handles by what they are open on, sockets and pipes by kind
    tasks: Counter[str]  # by coroutine; of the process that tells

    def __str__(self) -> str:
        tasks = f", {self.tasks.total()} tasks" if self.tasks else ""
        return f"{self.name}: {self.handles.total()} file handles, {self.threads} threads{tasks}"


Census = dict[int, Holdings]  # by process id


class Observed(NamedTuple):
    """A server of ``soak_server.py``."""

    pid: int
    tasks: Path  # the file that it writes

    def census(self) -> Census:
        """Of the process and all that descend from it."""
        holdings = {pid: _holdings(pid) for pid in descendants(self.pid)}
        holdings[self.pid] = holdings[self.pid]._replace(tasks=self._asked_tasks())
        return holdings

    def settled(self, most: Census | None = None, seconds: float = 30) -> Census:
        """A census that no longer changes; with ``most``, one within it, if that comes about.

        What was closed by a client takes the server some seconds to close as well.
        """
        deadline = time.monotonic() + seconds
        last = self.census()
        while time.monotonic() < deadline:
            time.sleep(3)
            now = self.census()
            if now == last and (most is None or not left_over(most, now)):
                return now
            last = now
        return last

    def _asked_tasks(self) -> Counter[str]:
        self.tasks.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + TELL_SECONDS
        while not self.tasks.exists():
            assert time.monotonic() < deadline, "the server does not tell its tasks"
            time.sleep(0.05)
        return Counter(json.loads(self.tasks.read_text()))


def left_over(before: Census, after: Census) -> list[str]:
    """What is there now and was not before, in words."""
    found = [f"process {after[pid].name} ({pid}) is new" for pid in after.keys() - before.keys()]
    found += [f"process {before[pid].name} ({pid}) ended" for pid in before.keys() - after.keys()]
    for pid in before.keys() & after.keys():
        old, new = before[pid], after[pid]
        if new.handles.total() > old.handles.total():
            more = dict(new.handles - old.handles)
            found.append(f"{new.name}: file handles {old.handles.total()} before, now also {more}")
        if new.tasks - old.tasks:
            found.append(f"{new.name}: tasks {dict(new.tasks - old.tasks)}")
        if new.threads > old.threads + _POOL_THREADS:
            found.append(f"{new.name}: {new.threads} threads, {old.threads} before")
    return found


def descendants(root: int) -> list[int]:
    """The process and its children, theirs included."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def names_of(root: int) -> dict[int, str]:
    """Of the process and its descendants."""
    return {pid: _name(pid) for pid in descendants(root)}


def own_bytes(pids: Sequence[int]) -> dict[int, int]:
    """Resident memory of each process that is alive, without that of files.

    How much of a mapped file is resident, the system decides, by what others need.
    """
    sizes = {}
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
            sizes[pid] = int(kib) * 1024
    return sizes


class Memory:
    """Resident memory of processes over time, without that of files."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._samples: list[dict[int, int]] = []

    def sample(self) -> None:
        self._samples.append(own_bytes(self._pids))

    def quarters(self, pid: int) -> list[float]:
        """The median of each quarter of the time, in MiB."""
        sizes = [sample[pid] / _MIB for sample in self._samples if pid in sample]
        cuts = [len(sizes) * i // 4 for i in range(5)]
        return [statistics.median(sizes[a:b] or sizes) for a, b in pairwise(cuts)]


def _holdings(pid: int) -> Holdings:
    handles: Counter[str] = Counter()
    threads = 0
    with suppress(OSError):
        threads = len(os.listdir(f"/proc/{pid}/task"))
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                handles[os.readlink(handle).split(":[")[0]] += 1
    return Holdings(_name(pid), threads, handles, Counter())


def _name(pid: int) -> str:
    """The title that a process gave itself, or the module or program that it runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "?"
    if "-m" in words:
        return words[words.index("-m") + 1]
    if "-c" in words:
        return words[words.index("-c") + 1][:60]
    return words[0].strip()
