"""``sgl.parallel_contexts``: one more expression of SGLang's frontend language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sglang.lang.ir import SglExpr, SglExprList

from sglang_ape.frontend.contexts import Document


class SglParallelContexts(SglExpr):
    """Where the contexts of a program stand, and what they are.

    The arguments are checked when the program runs: a program that SGLang merely traces gets
    stand-ins for them.
    """

    def __init__(self, documents: Sequence[Document], **options: Any) -> None:
        super().__init__()
        self.documents = documents
        self.options = options  # of ``frontend.contexts.check_contexts``

    def __repr__(self) -> str:
        return f"ParallelContexts({self.documents!r})"


def parallel_contexts(
    documents: Sequence[Document],
    temperature: float | None = None,
    scale: float | None = None,
    soft: float | None = None,
    refine: int | None = None,
) -> SglParallelContexts:
    """Texts that are encoded independently of each other, at this place of a program.

    The program's text before is their prefix P, its text behind is the query Q, which attends to
    all of them at once. A program may use it once.

    Args:
        documents: the contexts; a list of strings, or of ``{"id": "ctx-..."}`` for contexts that
            the server knows (``sglang_ape.ContextStore``) after this very prefix.
        temperature: T of this program, 0 < T <= 10; by default the server's.
        scale: S of this program, 0 <= S <= 10; by default the server's.
        soft: λ >= 0: contexts weigh less, the less likely they make what follows them; by default
            the server's, 0 is off.
        refine: m >= 0: only the m contexts that make it likeliest are read, as one sequence; by
            default the server's, 0 is off. Not together with ``soft``.
    """
    return SglParallelContexts(
        documents, temperature=temperature, scale=scale, soft=soft, refine=refine
    )


def uses(expr: Any) -> Iterator[SglParallelContexts]:
    """Every ``parallel_contexts`` in an expression."""
    if isinstance(expr, SglParallelContexts):
        yield expr
    elif isinstance(expr, SglExprList):
        for part in expr.expr_list:
            yield from uses(part)
