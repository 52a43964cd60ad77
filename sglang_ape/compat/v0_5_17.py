"""SGLang 0.5.17: new fields on ``ServerArgs``.

``ServerArgs`` is a plain dataclass there; the command line, ``Engine(**kwargs)`` and
``/server_info`` all follow its fields (``server_args.py``, ``arg_groups/arg_utils.py``). The class
object must stay the same, because ``Engine.server_args_class`` holds it, so the fields are added
in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang_ape.arguments import Flag


def extend_server_args(flags: Sequence[Flag]) -> None:
    """Add ``flags`` to ``ServerArgs``; a second call changes nothing."""
    from sglang.srt import server_args
    from sglang.srt.arg_groups import arg_utils

    cls = server_args.ServerArgs
    if flags[0].name in cls.__dataclass_fields__:
        return
    for field in dataclasses.fields(cls):  # dataclass() removed these class attributes
        if field.default_factory is not dataclasses.MISSING:
            factory = dataclasses.field(
                default_factory=field.default_factory, repr=field.repr, init=field.init
            )
            setattr(cls, field.name, factory)
    for flag in flags:
        cls.__annotations__[flag.name] = arg_utils.A[flag.type, arg_utils.Arg(help=flag.help)]
        setattr(cls, flag.name, flag.default)
    for generated in ("__init__", "__repr__", "__eq__", "__match_args__"):
        if generated in cls.__dict__:  # dataclass() does not overwrite what is there
            delattr(cls, generated)
    dataclasses.dataclass(cls)
    arg_utils.namespace_of.cache_clear()
    arg_utils.resolvable_fields.cache_clear()
