"""The code blocks of a page of the documentation, run as they stand."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE_URL = "http://127.0.0.1:30000"  # of the server that the pages talk to
SCRIPT_SECONDS = 400
BASH_SECONDS = 120

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SHOWN = ("text", "json")
_MODEL = "ensure_small_model()"
# Every answer of a server is kept in a file of its own beside being printed, and a block that shows
# no error ends at a status of 400 or more.
_CURL = 'curl() { command curl %s "$@" | tee "$(mktemp "$ANSWERS/XXXXXX")"; }\n'


class Block(NamedTuple):
    """Code of a page."""

    page: str  # path below the root, for messages
    line: int  # of the page, where the code begins
    language: str
    code: str
    shown: str  # the output that the page shows below it, if it shows any

    @property
    def is_script(self) -> bool:
        """Whether it is a whole program, with an engine of its own."""
        return self.language == "python" and "__main__" in self.code

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The Python and shell blocks of a page, in its order."""
    text = (ROOT / page).read_text()
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        language, code = match.groups()
        if language in _SHOWN:
            found[-1] = found[-1]._replace(shown=code)
        else:
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Block(page, line, language, code, ""))
    return found


def run_blocks(page: str, url: str, folder: Path) -> None:
    """Run all blocks of a page but its scripts against a server.

    The Python blocks share one namespace, the shell blocks the working folder.

    Raises:
        AssertionError: a shell block failed, or was refused where the page shows no error, or was
            not where it shows one.
    """
    names: dict[str, Any] = {"__name__": Path(page).stem}
    for block in blocks_of(page):
        if block.is_script:
            continue
        code = block.code.replace(PAGE_URL, url)
        if block.language == "bash":
            _run_bash(block, code, folder)
        else:
            # The page's own line numbers in tracebacks.
            exec(compile("\n" * (block.line - 1) + code, page, "exec"), names)


def _run_bash(block: Block, code: str, folder: Path) -> None:
    answers = folder / f"answers-{block.line}"
    answers.mkdir()
    shows_error = '"error"' in block.shown
    curl = _CURL % ("" if shows_error else "--fail-with-body")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", curl + code],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "ANSWERS": str(answers)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BASH_SECONDS,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{block} ended with {done.returncode}: {done.stdout}"
    for file in answers.iterdir():
        answer = json.loads(file.read_text())
        has_error = isinstance(answer, dict) and "error" in answer
        assert has_error == shows_error, f"{block}: {answer}"


def run_script(block: Block, model: Path, folder: Path) -> str:
    """Run a script of a page, on another checkpoint, in a session of its own.

    Its output goes into a file, not into a pipe, which processes left behind would keep open.

    Returns:
        What it printed.
    """
    assert block.code.count(_MODEL) == 1, block
    script, log = folder / "script.py", folder / "log"
    script.write_text(block.code.replace(_MODEL, repr(str(model))))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(SCRIPT_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = log.read_text(errors="replace")
    assert status == 0, f"{block} ended with {status}:\n{printed[-6000:]}"
    return printed


def scripts_of(*pages: str) -> list[Block]:
    return [block for page in pages for block in blocks_of(page) if block.is_script]
