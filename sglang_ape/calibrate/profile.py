"""The profile: what a calibration chose, in the file that ``--ape-profile`` loads.

The server imports this module; it needs neither torch nor SGLang.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_ape.arguments import MAX_SCALE, MAX_TEMPERATURE


class ProfileError(ValueError):
    """The file is no profile; the message names the file and the reason."""


class Profile(BaseModel):
    """T, S, P and the rung of the quality ladder for requests that give none.

    Attributes:
        version: of the file format.
        model: last part of the path or name of the model that it was made with.
        temperature: T.
        scale: S.
        prefix: P as text, special tokens are added to it; None: the built-in default.
        soft: λ; 0: off.
        refine: m; 0: off. Not beside ``soft``.
        warm: texts of the items that end the server's own prefix and those of chats.
        report: figures of the calibration, for people; the server does not read them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: Literal[1] = 1
    model: Annotated[str, Field(min_length=1)]
    temperature: Annotated[float, Field(gt=0, le=MAX_TEMPERATURE, allow_inf_nan=False)]
    scale: Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]
    prefix: str | None = None
    soft: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    refine: Annotated[int, Field(ge=0)] = 0
    warm: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    report: dict[str, Any] = Field(default_factory=dict)

    def is_for(self, *names: str | None) -> bool:
        """Whether one of a server's names for its model, paths or not, is the profile's."""
        return self.model in {model_name(name) for name in names if name}


def model_name(path: str) -> str:
    """The last part of a model's path or name: the rest differs between machines."""
    return os.path.basename(path.rstrip("/")) or path


def read(path: str | Path) -> Profile:
    """Load a profile.

    Raises:
        ProfileError: the file is missing, or is no profile of this version.
    """
    try:
        fields = orjson.loads(Path(path).read_bytes())
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None
    except orjson.JSONDecodeError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ProfileError(f"{path} must hold a JSON object")
    if "version" not in fields:
        raise ProfileError(f"{path}: version: Field required")
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ProfileError(f"{path}: {name}: {first['msg']}") from None


def write(profile: Profile, path: Path) -> None:
    """Put the profile there at once: at any moment the file is the old one or the new one."""
    content = orjson.dumps(profile.model_dump(), option=orjson.OPT_INDENT_2) + b"\n"
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
