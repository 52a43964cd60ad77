"""Options that all benchmarks share, and the server that they stand for."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.client import Client
from benchmarks.common.server import started
from sglang_ape.command import API_KEY_VARIABLE

QUICK_POOL_TOKENS = 16384


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring.

    Args:
        module: its name, as in ``python -m benchmarks.rag_qa``.
        doc: its docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_server_options(parser: argparse.ArgumentParser, results: str) -> None:
    """The model, where results go, the seed, and ``--quick``.

    Args:
        parser: gets the options.
        results: name of the folder of results.
    """
    add = parser.add_argument
    add("--model", help="path or name of the model (with --quick: a small one, made on first use)")
    add("--quick", action="store_true", help="a small setting that takes minutes on a CPU")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("results") / results,
        metavar="FOLDER",
        help="for results.json, plots and the server's log (default: %(default)s)",
    )
    add("server", nargs="*", metavar="-- FLAGS", help="further flags of the server, after --")


def add_url_option(parser: argparse.ArgumentParser) -> None:
    """For benchmarks that can do with one server that runs already."""
    parser.add_argument(
        "--url",
        help="a server that runs already with --enable-ape and that nobody else uses, instead of "
        f"--model; its key is taken from ${API_KEY_VARIABLE}",
    )


def model_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The model to serve; with ``--quick`` the small one unless another is given."""
    if args.model:
        return args.model
    if not args.quick:
        parser.error("--model is needed, except with --quick")
    from examples.small_model import SmallModelError, ensure_small_model

    try:
        return str(ensure_small_model())
    except SmallModelError as error:
        parser.error(str(error))


def quick_flags(pool_tokens: int = QUICK_POOL_TOKENS) -> list[str]:
    """Server flags of ``--quick``: fp32 on the CPU where there is no GPU, and a small KV pool."""
    import torch

    flags = ["--max-total-tokens", str(pool_tokens), "--log-level", "warning"]
    if not torch.cuda.is_available():
        flags += ["--device", "cpu", "--dtype", "float32", "--grammar-backend", "none"]
    return flags


@contextlib.contextmanager
def ape_server(
    args: argparse.Namespace, parser: argparse.ArgumentParser, flags: Sequence[str]
) -> Iterator[Client]:
    """The server at ``--url``, or one with APE that is started for the benchmark.

    Args:
        args: of a parser with both kinds of options.
        parser: reports what is wrong with them.
        flags: of the server, before those that the user gave.

    Raises:
        ServerError: the server does not come up.
    """
    if args.url:
        if args.model or args.server:
            parser.error("--url takes no --model and no server flags: that server is there already")
        yield Client(args.url, os.environ.get(API_KEY_VARIABLE))
        return
    model = model_of(args, parser)
    quick = quick_flags() if args.quick else []
    everything = ["--enable-ape", *quick, *flags, *args.server]
    with started(model, everything, args.out / "server.log") as server:
        yield Client(server.url)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they stand in results; of a path, its last part."""

    def shown(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [shown(one) for one in value]
        is_path = isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value))
        return Path(value).name if is_path else value

    return {name: shown(value) for name, value in vars(args).items()}
