"""Stock SGLang and APE measured side by side: two servers, one after the other, one results file.

A long measurement can be split over several commands (``--only``): each adds its rows to those
that are in the folder already, and says on which machine and with which flags it was taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import machine
from benchmarks.common.client import Client
from benchmarks.common.fresh import vocab_of
from benchmarks.common.options import add_server_options, model_of, quick_flags
from benchmarks.common.results import Results, command_line, without_folder
from benchmarks.common.server import started
from benchmarks.common.shape import LLAMA_8B, write_config

WINDOW_SLACK = 64  # positions that SGLang wants beyond those of a request


class Kind(StrEnum):
    """A server; its value is its name in tables, files and options."""

    STOCK = "stock"
    APE = "ape"


class OtherSettingsError(Exception):
    """Rows that were taken with different settings do not belong into one file."""


def add_pair_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Those of :func:`add_server_options`, and which servers are measured.

    Args:
        parser: gets the options.
        results: name of the folder of results.
    """
    add_server_options(parser, results)
    add = parser.add_argument
    add(
        "--dummy-8b",
        action="store_true",
        help="no --model: the shape of Llama-3.1-8B with random weights and no tokenizer",
    )
    add("--only", choices=[*Kind], help="measure one server and add to the results in the folder")
    add(
        "--stock-flags",
        type=shlex.split,
        default=[],
        metavar="'FLAGS'",
        help="further flags of the stock server alone, as in --stock-flags='--attention-backend "
        "fa3'; they come last",
    )
    add(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="measure nothing: show and plot the results in a folder",
    )


def kinds_of(args: argparse.Namespace) -> list[Kind]:
    return [Kind(args.only)] if args.only else [*Kind]


class Model(NamedTuple):
    """What both servers serve."""

    path: str
    name: str  # for a reader
    flags: tuple[str, ...]
    vocab: int


def pair_model(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Model:
    """The model of the options; with ``--dummy-8b`` its shape is written to the results' folder."""
    if not args.dummy_8b:
        path = model_of(args, parser)
        try:
            return Model(path, Path(path).name, (), vocab_of(path))
        except (OSError, ValueError) as error:
            parser.error(f"{path} is no model: {error}")
    if args.model or args.quick:
        parser.error("--dummy-8b is a model of its own: it takes neither --model nor --quick")
    folder = args.out.resolve() / "model"
    folder.mkdir(parents=True, exist_ok=True)
    write_config(LLAMA_8B, folder)
    flags = ("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", LLAMA_8B.dtype)
    return Model(str(folder), "shape of Llama-3.1-8B, dummy weights", flags, LLAMA_8B.vocab)


def window_flags(args: argparse.Namespace, row: int) -> list[str]:
    """Flags that make the window of a model without weights as long as the longest request.

    The page table has a row of that length for every request that may run, so longer is not better.

    Args:
        args: of a parser with :func:`add_pair_options`.
        row: tokens of the longest request and its answer.
    """
    return ["--context-length", str(row + WINDOW_SLACK)] if args.dummy_8b else []


class PairServer(NamedTuple):
    """A server that answers."""

    client: Client
    flags: list[str]
    start_seconds: float | None
    info: dict[str, Any]  # /server_info

    @property
    def pool_tokens(self) -> int:
        return self.info["max_total_num_tokens"]


@contextlib.contextmanager
def pair_server(
    kind: Kind, model: Model, args: argparse.Namespace, flags: Mapping[Kind, Sequence[str]]
) -> Iterator[PairServer]:
    """Start one of the two servers, and stop it in the end.

    Args:
        kind: which of them.
        model: what it serves.
        args: of a parser with :func:`add_pair_options`.
        flags: of each server, before those that the user gave.

    Raises:
        ServerError: it does not come up.
    """
    quick = quick_flags() if args.quick else []
    everything = [*model.flags, *quick, *flags[kind], *args.server]
    if kind is Kind.APE:
        everything.insert(0, "--enable-ape")
    else:
        everything += args.stock_flags
    print(f"{kind}: {shlex.join(everything)}", flush=True)
    with started(model.path, everything, args.out / f"server_{kind}.log") as server:
        client = Client(server.url)
        yield PairServer(client, everything, server.start_seconds, client.info())


class PairResults(Results):
    """``results.json`` of both servers, over one command or several.

    Args:
        folder: made if it is not there.
        benchmark: its name.
        settings: all that rows must have in common to be compared.
        key: fields that name a row; measured again, it replaces the earlier one.
        adds: keep the rows that are in the folder already.

    Raises:
        OtherSettingsError: those were taken with other settings.
    """

    def __init__(
        self,
        folder: Path,
        benchmark: str,
        settings: Mapping[str, Any],
        key: Sequence[str],
        adds: bool,
    ) -> None:
        self._key = key
        self._earlier = read_results(folder) if adds else None
        super().__init__(folder, benchmark, settings)

    def _first(self, benchmark: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        earlier = self._earlier or {"runs": [], "rows": []}
        if self._earlier:
            _require_same(self.folder, earlier["settings"], settings)
        return {
            "benchmark": benchmark,
            "settings": dict(settings),
            "runs": earlier["runs"],
            "rows": earlier["rows"],
            "finished": False,
        }

    def begin(self, kind: Kind, server: PairServer, measured: Mapping[str, Any]) -> None:
        """Rows that are added from now on belong to this server.

        Args:
            kind: which server it is.
            server: as it runs.
            measured: options of this command that other commands may give otherwise.
        """
        run = {
            "kind": kind.value,
            "command": command_line(self.content["benchmark"]),
            "flags": [without_folder(flag) for flag in server.flags],
            "start_seconds": server.start_seconds,
            "pool_tokens": server.pool_tokens,
            "attention_backend": server.info["attention_backend"],
            "dtype": server.info["dtype"],
            "measured": dict(measured),
            "machine": machine.describe(),
        }
        self.content["runs"].append(run)
        self.write()

    def add(self, row: Mapping[str, Any]) -> None:
        name = self._name(row)
        self.rows[:] = [one for one in self.rows if self._name(one) != name]
        super().add({**row, "run": len(self.content["runs"]) - 1})

    def _name(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in self._key)


def read_results(folder: Path) -> dict[str, Any] | None:
    """What ``results.json`` in a folder holds, None if there is none.

    Raises:
        OtherSettingsError: it holds something else.
    """
    path = folder / "results.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except json.JSONDecodeError as error:
        raise OtherSettingsError(f"{path} is damaged: {error}") from error


def reported(folder: Path, benchmark: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The results that ``--report`` names; the parser says what is wrong with them."""
    content = read_results(folder)
    if content is None:
        parser.error(f"there is no results.json in {folder}")
    if content.get("benchmark") != benchmark:
        parser.error(f"{folder} holds results of {content.get('benchmark')}, not of {benchmark}")
    return content


def _require_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = [
        f"{name} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise OtherSettingsError(
            f"the results in {folder} were taken with other settings ({'; '.join(differing)}): "
            "choose another --out, or leave --only out to begin anew"
        )


def title_of(content: Mapping[str, Any]) -> str:
    """The model, and what each server ran on, for above a table."""
    lines = [f"model: {content['settings']['model']}"]
    for run in content["runs"]:
        on = run["machine"]["gpu"] or f"CPU, {run['machine']['cores']} cores"
        lines.append(
            f"{run['kind']}: {on}; {run['attention_backend']}, {run['dtype']}, "
            f"KV pool of {run['pool_tokens']:,} tokens"
        )
    return "\n".join(dict.fromkeys(lines))
