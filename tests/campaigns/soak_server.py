"""SGLang's server, which at SIGUSR1 writes down the asyncio tasks that its main process has.

Run as ``python -m sglang.launch_server`` is; the file is named by the environment variable
``SOAK_TASKS``.
"""

import asyncio
import gc
import json
import os
import runpy
import signal
from collections import Counter
from pathlib import Path
from typing import Any


def write_tasks(*_: Any) -> None:
    """The coroutines of all tasks that have not ended, by name."""
    tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
    names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)
    path = Path(os.environ["SOAK_TASKS"])
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(names))
    partial.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, write_tasks)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
