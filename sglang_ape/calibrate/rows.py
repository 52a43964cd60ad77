"""The rows that a calibration can use: encoded, checked against the engine's limits, counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sglang_ape.calibrate.backend import Facts
from sglang_ape.calibrate.data import InputError, Line, Parts
from sglang_ape.calibrate.run import Plan
from sglang_ape.calibrate.tokens import Encoder, Row
from sglang_ape.entry.call import Ids
from sglang_ape.entry.expand import Names, check_row
from sglang_ape.errors import ApeRequestError

_NAMES = Names("prefix", "contexts", "query", "--max-new-tokens")
_SHOWN_LINES = 10


class Prepared(NamedTuple):
    """Rows to ask."""

    validation: list[Row]
    held_out: list[Row]
    prefixes: dict[str, Ids]  # token ids of the candidates
    warm: Ids  # token ids of all warm items
    notes: list[str]  # what was left out, and why


def prepare(parts: Parts, facts: Facts, plan: Plan, max_new_tokens: int, source: str) -> Prepared:
    """Encode all rows and leave out those that the objective cannot use.

    Args:
        parts: of the file.
        facts: of the engine.
        plan: what will be searched.
        max_new_tokens: of an answer.
        source: name of the file, for messages.

    Raises:
        InputError: a row cannot be served, or none is left to choose on.
    """
    encoder = Encoder(facts.tokenizer)
    prefixes = {text: encoder.prefix(text) for text in plan.prefixes}
    warm = encoder.warm(plan.warm)
    notes: list[str] = []
    found: list[list[Row]] = []
    for lines in parts:
        rows = [_encoded(line, encoder, facts, source) for line in lines]
        for row in rows:
            _check(row, prefixes.values(), warm, facts, max_new_tokens, source)
        found.append(rows)
    if plan.objective == "match":
        usable = [[row for row in rows if fits(row, facts, max_new_tokens)] for rows in found]
        why = "their sequential prompt does not fit the model's window or the KV pool"
    else:
        usable = [[row for row in rows if row.answers] for rows in found]
        why = "they have no answers"
    lost = {row.line for rows in found for row in rows} - {
        row.line for rows in usable for row in rows
    }
    if lost:
        notes.append(f"left out {len(lost)} rows: {why} (lines {_listed(sorted(lost))})")
    if not usable[0]:
        raise InputError(f"{source}: no row is left to choose on; {'; '.join(notes)}")
    if plan.rungs and not any(row.answers for row in usable[0]):
        raise InputError(f"{source}: no row with answers is left to choose soft, refine or warm on")
    return Prepared(usable[0], usable[1], prefixes, warm, notes)


def fits(row: Row, facts: Facts, max_new_tokens: int) -> bool:
    """Whether the sequential prompt with its answer can be asked."""
    tokens = len(row.sequential)
    room = min(facts.limits.window, facts.limits.usable_pool_tokens)
    return tokens < facts.longest_prompt and tokens + max_new_tokens <= room


def _encoded(line: Line, encoder: Encoder, facts: Facts, source: str) -> Row:
    if line.example.messages is not None and facts.chat_template is not None:
        raise InputError(
            f"{source}, line {line.number}: messages are rendered with the tokenizer's own chat "
            f"template, and the server has another (--chat-template {facts.chat_template}); give "
            "prefix and query"
        )
    try:
        return encoder.row(line.number, line.example)
    except Exception as error:  # a chat template raises what it likes
        raise InputError(f"{source}, line {line.number}: {error}") from error


def _check(
    row: Row,
    prefixes: Iterable[Ids],
    warm: Ids,
    facts: Facts,
    max_new_tokens: int,
    source: str,
) -> None:
    for prefix in (row.prefix, *prefixes):
        try:
            check_row(prefix + warm, row.contexts, row.query, max_new_tokens, facts.limits, _NAMES)
        except ApeRequestError as error:
            raise InputError(f"{source}, line {row.line}: {error.param}: {error}") from None


def _listed(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:_SHOWN_LINES]))
    return shown if len(lines) <= _SHOWN_LINES else f"{shown} and further"
