"""What the commands of this package have in common: how they are told which engine to use, types of
numbers for argparse, and endings.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_ape.calibrate.backend import Backend

API_KEY_VARIABLE = "SGLANG_API_KEY"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """How to talk to a server."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"of the server (default: ${API_KEY_VARIABLE}, which other users of the machine do "
        "not see)",
    )
    parser.add_argument(
        "--timeout",
        type=positive(float),
        default=600.0,
        metavar="SECONDS",
        help="how long a call may take (default: 600)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """A server that runs, or a model to start here."""
    engine = parser.add_mutually_exclusive_group(required=True)
    engine.add_argument("--url", help="a running server, with --enable-ape")
    engine.add_argument(
        "--model", help="path or name of a model to start here; SGLang's flags for it go after --"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="with --url (default: what the server names)"
    )
    add_server_options(parser)


def parse_with_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a parser with :func:`add_engine_options`, and what stands behind ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:at]), list(argv[at + 1 :])
    if flags and args.model is None:
        parser.error("server flags after -- go with --model")
    if args.model is not None and (args.tokenizer or args.api_key):
        parser.error("--tokenizer and --api-key go with --url")
    return args, flags


def api_key(args: argparse.Namespace) -> str | None:
    return args.api_key or os.environ.get(API_KEY_VARIABLE) or None


def open_backend(args: argparse.Namespace, flags: Sequence[str]) -> Backend:
    """The engine that the options name, started if need be; to be closed by the caller.

    Raises:
        InputError: it cannot be used.
        requests.RequestException: the server does not answer.
    """
    from sglang_ape.calibrate.backend import InProcess, Server

    if args.model is not None:
        print(f"starting {args.model}", file=sys.stderr, flush=True)
        return InProcess(args.model, flags)
    return Server(args.url, api_key(args), args.timeout, args.tokenizer)


def check_folder(path: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        OSError: no file can be made at ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent}")


def ended(message: str, status: int) -> int:
    """Tell why a command ends, and return its exit status."""
    print(message, file=sys.stderr)
    return status


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parsed.__name__ = f"positive {kind.__name__}"
    return parsed


def not_negative(text: str) -> float:
    """An argparse type."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value
