"""The raw samples of one engine, written to a file each time one comes in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ENGINES = ("ape", "apart", "flashinfer", "fa3")  # apart: APE without shared reads


class Record:
    """Samples by figure: seconds, or bytes for memory and bytes or operations a second for floors.

    A run that is killed leaves what it had measured: the file is replaced at every addition.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self._start = time.monotonic()
        self.content: dict[str, Any] = {
            **facts,
            "samples": {},
            "warnings": [],
            "errors": {},
            "finished": False,
        }
        self.write()

    def add(self, figure: str, samples: Iterable[float]) -> None:
        rounded = [float(f"{sample:.6g}") for sample in samples]
        self.content["samples"].setdefault(figure, []).extend(rounded)
        self.write()

    def warn(self, text: str) -> None:
        self.say(f"WARNING {text}")
        self.content["warnings"].append(text)

    def fail(self, section: str, trace: str) -> None:
        self.say(f"FAILED {section}\n{trace}")
        self.content["errors"][section] = trace
        self.write()

    def say(self, text: str) -> None:
        """A line of progress."""
        elapsed = time.monotonic() - self._start
        print(f"{time.strftime('%H:%M:%S')} {elapsed:6.1f} s  {text}", flush=True)

    def write(self) -> None:
        self.content["elapsed_s"] = round(time.monotonic() - self._start, 1)
        partial = self._path.with_name(self._path.name + ".part")
        partial.write_text(json.dumps(self.content, indent=None) + "\n")
        partial.replace(self._path)


def read_records(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Records by engine, the samples of several files of one engine joined.

    Raises:
        ValueError: the files are of different scales.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        read = json.loads(path.read_text())
        first = records.setdefault(read["engine"], read)
        if first is not read:
            for figure, samples in read["samples"].items():
                first["samples"].setdefault(figure, []).extend(samples)
            first["warnings"] += read["warnings"]
            first["errors"].update(read["errors"])
            first["finished"] &= read["finished"]
    if len({record["scale"] for record in records.values()}) > 1:
        raise ValueError("the files are of different scales")
    return records
