"""How a benchmark ends: a message and a status, no traceback, and no server left behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from benchmarks.common.client import Refused
from benchmarks.common.controls import ControlError
from benchmarks.common.data import DataError, Unavailable
from benchmarks.common.pairs import OtherSettingsError
from benchmarks.common.server import ServerError

# What a user can do something about; anything else is a bug and keeps its traceback.
FAILURES = (
    ServerError,
    Refused,
    ControlError,
    OtherSettingsError,
    DataError,
    Unavailable,
    OSError,  # a file or folder that cannot be read or written; it names it
)
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def exit_status(main: Callable[[], None]) -> int:
    """Run a benchmark: 0 if it was measured, 1 with a message if not, 130 after Ctrl-C.

    SIGTERM, as ``timeout`` sends it, unwinds the stack too, so that servers are stopped.

    Args:
        main: parses the arguments and measures.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except FAILURES as error:
        what = "the server refused a request: " if isinstance(error, Refused) else ""
        print(f"error: {what}{error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(TERMINATED)
