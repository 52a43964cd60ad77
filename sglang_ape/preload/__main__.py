"""Register every document of a JSONL file with a server's context store.

    python -m sglang_ape.preload --url http://127.0.0.1:30000 documents.jsonl

A line of the file is a JSON string, or an object with the field ``text`` (``--text-field``) or
``input_ids``. The ids go into a second JSONL file, after every batch: a run that ended early is
taken up by the same command. What stands in that file and is known to the server is not sent again;
remove the file to have everything sent.

Exit status: 0, done; 1, the server refused something or went away; 2, the input is wrong and
nothing was sent; 130, interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from sglang_ape.client import ContextStore
from sglang_ape.command import add_server_options, api_key, ended, positive
from sglang_ape.errors import ApeRequestError
from sglang_ape.preload.documents import Documents, InputError
from sglang_ape.preload.id_file import IdFile
from sglang_ape.preload.run import Preload, Settings


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = _parser().parse_args(argv)
    try:
        preload = _prepared(args)
    except (InputError, ApeRequestError, OSError, UnicodeDecodeError) as error:
        return ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return ended("interrupted, nothing was sent", 130)
    try:
        preload.run(args.batch_size)
        summary = preload.summary()
    except KeyboardInterrupt:
        return ended(f"interrupted: {preload.progress}", 130)
    except (InputError, ApeRequestError, OSError) as error:  # OSError: also those of requests
        return ended(f"error: {_explained(error, args)}\n{preload.progress}", 1)
    print(*summary, f"time        {time.monotonic() - started:.1f} s", sep="\n")
    return 0


def _prepared(args: argparse.Namespace) -> Preload:
    store = ContextStore(args.url, api_key(args), timeout=args.timeout)
    ids = args.ids or args.documents.with_name(f"{args.documents.name}.ids.jsonl")
    tenant = {"lora_path": args.lora_path, "extra_key": args.extra_key}
    settings = Settings(
        _before(args), {name: text for name, text in tenant.items() if text is not None}, args.pin
    )
    return Preload(store, Documents(args.documents, args.text_field), IdFile(ids), settings)


def _before(args: argparse.Namespace) -> dict[str, Any]:
    if args.system is not None:
        return {"messages": [{"role": "system", "content": args.system}]}
    if args.prefix_file is not None:
        return {"prefix": args.prefix_file.read_bytes().decode()}  # line ends as they are
    return {} if args.prefix is None else {"prefix": args.prefix}


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """In one line."""
    if isinstance(error, requests.ReadTimeout):
        return f"{args.url} did not answer within {args.timeout:g} s (--timeout)"
    message = " ".join(str(error).split())
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {args.url}: {message}"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ape.preload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("documents", type=Path, metavar="FILE", help="the documents, in JSON lines")
    add("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    add("--text-field", default="text", metavar="NAME", help="field of a text (default: text)")
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--prefix", metavar="TEXT", help="the text before each document")
    before.add_argument("--prefix-file", type=Path, metavar="FILE", help="a file with that text")
    before.add_argument(
        "--system", metavar="TEXT", help="for chats: the system message that they will have"
    )
    add("--pin", action="store_true", help="keep the documents from being evicted")
    add("--lora-path", metavar="NAME", help="name of the adapter that will use them")
    add("--extra-key", metavar="KEY", help="SGLang's namespace of cached prompts")
    add(
        "--ids",
        type=Path,
        metavar="FILE",
        help="where the ids go (default: FILE.ids.jsonl, beside the documents); one file for each "
        "prefix, adapter and key",
    )
    add("--batch-size", type=positive(int), default=32, metavar="N", help="documents a call")
    add_server_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
