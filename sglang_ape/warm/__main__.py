"""Propose warm items: invented texts in the format of a corpus, for --ape-warm.

    python -m sglang_ape.warm --url http://127.0.0.1:30000 --data documents.jsonl
    python -m sglang_ape.warm --model MODEL --data documents.jsonl -- --dtype float32

A line of the corpus is a JSON string, or an object with the field `text` (--text-field). The model
sees a few contexts and is asked for one more of the same format about something else. Answers that
are empty, cut off, or of another length are rejected, and so are those that have 8 words in a row,
or a name, from the corpus. Read the items before a server gets them: whether they are invented, and
answer no question, is for you to say.

Exit status: 0, done; 1, too few good items, or the engine refused something or went away; 2, the
input is wrong; 130, interrupted. The file is written in the end and as a whole, or not at all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_ape.command import (
    add_engine_options,
    check_folder,
    ended,
    not_negative,
    open_backend,
    parse_with_flags,
    positive,
)

if TYPE_CHECKING:
    from sglang_ape.warm.propose import Rejected


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args, flags = parse_with_flags(_parser(), sys.argv[1:] if argv is None else argv)
    # Not before: --help needs none of it.
    from requests import RequestException

    from sglang_ape.calibrate.data import InputError
    from sglang_ape.errors import ApeRequestError
    from sglang_ape.preload.documents import InputError as CorpusError
    from sglang_ape.warm.propose import WarmFailure

    try:
        _propose(args, flags)
    except (InputError, CorpusError, UnicodeDecodeError) as error:
        return ended(f"error: {error}", 2)
    except RequestException as error:
        return ended(f"error: no answer from {args.url}: {' '.join(str(error).split())}", 1)
    except (WarmFailure, ApeRequestError) as error:
        return ended(f"error: {error}", 1)
    except OSError as error:
        return ended(f"error: {error}", 2)
    except KeyboardInterrupt:
        return ended("interrupted: no file was written", 130)
    print(f"time        {time.monotonic() - started:.1f} s")
    return 0


def _propose(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Everything: read the corpus, start, ask, tell, write.

    Raises:
        InputError: the engine cannot be used.
        CorpusError: a line of the corpus is wrong.
        WarmFailure: too few good items.
        ApeRequestError: the engine refused something.
        requests.RequestException: it did not answer.
        OSError: a file cannot be read or written.
    """
    from sglang_ape.warm import items
    from sglang_ape.warm.propose import Proposer, Settings

    corpus = _corpus(args.data, args.text_field)
    check_folder(args.out)
    settings = Settings(args.items, args.shown, args.tries, args.temperature, args.seed)
    backend = open_backend(args, flags)
    try:
        proposer = Proposer(backend, corpus, settings)
        found = proposer.run()
        tokenizer = backend.facts.tokenizer
        tokens = [len(tokenizer.encode(item, add_special_tokens=False)) for item in found]
    finally:
        backend.close()
    items.write(found, args.out)
    for item, size in zip(found, tokens, strict=True):
        print(f"item, {size} tokens:\n{item.rstrip()}\n")
    print(f"rejected    {_counted(proposer.rejected)}")
    print(f"items       {len(found)}, {sum(tokens)} tokens of P")
    print(f"file        {args.out} (read it, then --ape-warm)")


def _corpus(path: Path, text_field: str) -> list[str]:
    from sglang_ape.preload.documents import Documents
    from sglang_ape.preload.documents import InputError as CorpusError

    documents = Documents(path, text_field)
    documents.survey()  # names all wrong lines
    texts = []
    for document in documents:
        if not isinstance(document.context, str):
            raise CorpusError(f"{path}, line {document.line}: token ids cannot be shown; give text")
        texts.append(document.context)
    return texts


def _counted(rejected: Sequence[Rejected]) -> str:
    """How many, and of each kind; a reason begins with its kind."""
    kinds = Counter(one.reason.partition(":")[0] for one in rejected)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{len(rejected)} ({listed})" if rejected else "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ape.warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--url URL | --model MODEL) --data FILE [options] [-- FLAGS]",
    )
    add_engine_options(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="the corpus, in JSON lines")
    add("--text-field", default="text", metavar="NAME", help="field of a text (default: text)")
    add(
        "--out",
        type=Path,
        default=Path("warm.jsonl"),
        metavar="FILE",
        help="the items (default: %(default)s)",
    )
    add("--items", type=positive(int), default=2, metavar="N", help="(default: %(default)s)")
    add(
        "--shown",
        type=positive(int),
        default=3,
        metavar="N",
        help="contexts that the model sees each time (default: %(default)s)",
    )
    add(
        "--tries",
        type=positive(int),
        default=8,
        metavar="N",
        help="for each item (default: %(default)s)",
    )
    add(
        "--temperature",
        type=not_negative,
        default=0.8,
        metavar="X",
        help="of sampling; 0: greedy, and the same items again (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the choice of contexts (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
