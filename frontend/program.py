"""The way of contexts through a running program (``lang/interpreter.py``) to its requests.

A program runs in two threads: its function submits expressions, and an executor evaluates them.
Wrong contexts are refused where they are submitted, so that the program itself fails. What fails
later, in the executor, SGLang only logs; for a program with contexts it is kept, and raised to
whoever asks for the result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from sglang.lang.ir import SglCommitLazy

from sglang_ape.errors import ApeRequestError
from sglang_ape.frontend.backend import check_backend
from sglang_ape.frontend.contexts import Contexts, check_contexts, request_fields
from sglang_ape.frontend.expression import SglParallelContexts, uses

Original = Callable[..., Any]

# Sent in place of an empty query to have the contexts encoded once before a program forks.
_STAND_IN_QUERY = "\n"


@dataclass
class Use:
    """The one use of ``parallel_contexts`` in a program; attribute ``ape_use`` of its executor.

    Attributes:
        contexts: None if they were refused.
        prefix: the text before them, once the executor has come to their place.
        failure: makes the error to raise, if there was one. Refused contexts make a new one each
            time: one that was raised holds the frames, and so the programs, that it passed, and
            a program's thread lives as long as the program.
        failed_variable: the variable that was being computed then.
    """

    contexts: Contexts | None = None
    prefix: str | None = None
    failure: Callable[[], Exception] | None = None
    failed_variable: str | None = None


def use_of(executor: Any) -> Use | None:
    return getattr(executor, "ape_use", None)


def around_submit(original: Original, executor: Any, expr: Any) -> None:
    """Around ``StreamExecutor.submit``: check the contexts in the thread of the program.

    After an error the executor has ended: whoever waited for more would wait forever.
    """
    _raise_failure(executor)
    found = list(uses(expr))
    if found:
        try:
            executor.ape_use = _claim(executor, found)
        except Exception as error:
            use = executor.ape_use = use_of(executor) or Use()
            use.failure = partial(ApeRequestError, str(error), getattr(error, "param", None))
            executor.error_ = use.failure()
            raise
    original(executor, expr)


def _claim(executor: Any, found: list[SglParallelContexts]) -> Use:
    if use_of(executor) is not None or len(found) > 1:
        raise ApeRequestError(
            "parallel_contexts is used a second time: a program can have one set of contexts; "
            "pass all documents in one call",
            "parallel_contexts",
        )
    contexts = check_contexts(found[0].documents, **found[0].options)
    check_backend(executor.backend)
    return Use(contexts)


def around_execute(original: Original, executor: Any, expr: Any) -> None:
    """Around ``StreamExecutor._execute``: place the contexts, keep the first error."""
    use = use_of(executor)
    if isinstance(expr, SglParallelContexts):
        assert use is not None  # submit set it
        use.prefix = executor.text_
        return
    try:
        original(executor, expr)
    except Exception as error:
        if use is not None and use.failure is None:
            use.failed_variable = getattr(expr, "name", None)
            use.failure = partial(_same, error)
        raise


def around_fork(
    original: Original, executor: Any, size: int = 1, position_ids_offset: Any = None
) -> list[Any]:
    """Around ``StreamExecutor.fork``: the branches have the same contexts.

    SGLang fills the cache first, unless it finds no text yet.
    """
    use = use_of(executor)
    if use is None:
        return original(executor, size, position_ids_offset)
    executor.sync()
    _raise_failure(executor)
    if size > 1 and not executor.text_:
        executor.submit(SglCommitLazy())
    branches = original(executor, size, position_ids_offset)
    if use.failure is not None:
        for branch in branches:
            branch.end()
        raise use.failure()
    for branch in branches:
        branch.ape_use = Use(use.contexts, use.prefix)
    return branches


def around_get_var(original: Original, executor: Any, name: str) -> Any:
    """Around ``StreamExecutor.get_var``: raise what kept the variable from being computed."""
    use = use_of(executor)
    try:
        value = original(executor, name)
    except KeyError:
        if use is None or use.failure is None:
            raise
    else:
        if use is None or use.failure is None or use.failed_variable != name:
            return value
    raise use.failure()


def around_end(original: Original, executor: Any) -> None:
    """Around ``StreamExecutor.end``, which the garbage collector calls for a program that failed.

    It asks whether the worker is alive. Of a worker that has ended, ``threading`` then takes the
    lock under which it starts threads; a collection that begins under that lock would wait for
    itself, and no thread of the process could be started any more. Such a worker needs no message.
    """
    if executor.is_finished:
        executor.backend.end_program(executor)
    else:
        original(executor)


def around_text_iter(original: Original, state: Any, *args: Any, **kwargs: Any) -> Iterator[str]:
    """Around ``ProgramState.text_iter``: a stream that breaks off raises the reason."""
    yield from original(state, *args, **kwargs)
    _raise_failure(state.stream_executor)


async def around_text_async_iter(
    original: Original, state: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Around ``ProgramState.text_async_iter``, likewise."""
    async for part in original(state, *args, **kwargs):
        yield part
    _raise_failure(state.stream_executor)


def around_add_images(original: Original, endpoint: Any, executor: Any, data: Any) -> None:
    """Around ``RuntimeEndpoint._add_images``: split the text of a request at the contexts.

    A request without ``text`` (the unconditional pass of ``select``) has no contexts either.
    """
    original(endpoint, executor, data)
    use = use_of(executor)
    if use is None or use.contexts is None or use.prefix is None or "text" not in data:
        return
    data.update(request_fields(use.contexts, use.prefix, data["text"]))


def around_commit(original: Original, endpoint: Any, executor: Any) -> None:
    """Around ``RuntimeEndpoint.commit_lazy_operations``, which fills the cache before a fork.

    The server takes no empty query; where nothing follows the contexts yet, another one has them
    encoded.
    """
    use = use_of(executor)
    if use is not None and executor.text_ == use.prefix:
        text = executor.text_ + _STAND_IN_QUERY
        executor = SimpleNamespace(text_=text, images_=executor.images_, ape_use=use)
    original(endpoint, executor)


def _raise_failure(executor: Any) -> None:
    use = use_of(executor)
    if use is not None and use.failure is not None:
        raise use.failure()


def _same(error: Exception) -> Exception:
    return error
