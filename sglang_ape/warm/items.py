"""The file of warm items, which ``--ape-warm`` loads: JSON lines, each a string or ``{"text": …}``.

The server imports this module; it needs neither torch nor SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson


class WarmError(ValueError):
    """The file holds no warm items; the message names the file, the line and the reason."""


def read(path: str | Path) -> tuple[str, ...]:
    """The items of a file, in order; blank lines are left out.

    Raises:
        WarmError: the file cannot be read, holds no item, or a line is no item.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise WarmError(f"{path}: {error.strerror or error}") from None
    items = []
    for number, raw in enumerate(lines, 1):
        if raw.strip():
            try:
                items.append(_item(raw))
            except ValueError as error:
                raise WarmError(f"{path}, line {number}: {error}") from None
    if not items:
        raise WarmError(f"{path} holds no item")
    return tuple(items)


def write(items: Sequence[str], path: Path) -> None:
    """Put the file there at once: at any moment it is the old one or the new one."""
    content = b"".join(orjson.dumps({"text": item}) + b"\n" for item in items)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _item(raw: bytes) -> str:
    try:
        value: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    if isinstance(value, dict):
        if value.keys() != {"text"}:
            raise ValueError("an object must have the key 'text' and no other")
        value = value["text"]
    if not isinstance(value, str):
        raise ValueError(f'must be a string or {{"text": ...}}, got {type(value).__name__}')
    if not value:
        raise ValueError("is empty")
    return value
