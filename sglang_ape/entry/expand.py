"""From P, contexts and Q to the token row of one ordinary request."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sglang_ape.entry.call import ApeOptions, Context, ContextId, Ids, Text, check_text
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.spec import ApeSpec
from sglang_ape.store.contexts import digest_of

# From here down the softmax over contexts is one-hot in fp32 and its result no longer changes, but
# logits divided by an ever smaller T would overflow.
_MIN_TEMPERATURE = 1e-4


class Row(NamedTuple):
    """One request as SGLang gets it."""

    input_ids: array  # of type "q", as SGLang's scheduler gets it
    spec: ApeSpec | None  # None: attention is plain, so the request is an ordinary one


class Reading(NamedTuple):
    """How the contexts of one request are read."""

    temperature: float  # T
    scale: float  # S
    soft: float = 0.0  # λ; 0: off
    refine: int = 0  # m; 0: off


class Defaults(NamedTuple):
    """What requests have that do not give their own."""

    temperature: float
    scale: float
    prefix: str | None = None  # None: as encode_prefix says
    soft: float = 0.0  # λ; 0: off
    refine: int = 0  # m; 0: off
    warm: tuple[Ids, ...] = ()  # items that end the server's own P, and that of a chat


def encode_text(tokenizer: Any, text: str, param: str, special_tokens: bool = False) -> Ids:
    """Token ids of one text by itself.

    Raises:
        ApeRequestError: the engine has no tokenizer (``skip_tokenizer_init``).
    """
    if tokenizer is None:
        raise ApeRequestError(f"{param}: without a tokenizer, give token ids", param)
    return array("I", tokenizer.encode(check_text(text, param), add_special_tokens=special_tokens))


def encode_prefix(tokenizer: Any, prefix: Text | None, name: str) -> Ids:
    """Token ids of P, the only text that gets special tokens.

    The default is the BOS token, if the model has one, and two newlines: a shared start keeps the
    attention sink of every context in one place (APE paper, section 4.1).
    """
    if isinstance(prefix, array):
        return prefix
    if prefix is not None:
        return encode_text(tokenizer, prefix, name, special_tokens=True)
    newlines = encode_text(tokenizer, "\n\n", name)
    bos = tokenizer.bos_token_id
    return newlines if bos is None else array("I", [bos]) + newlines


def server_prefix(tokenizer: Any, defaults: Defaults, name: str) -> Ids:
    """Token ids of P where a request gives none."""
    return with_warm(encode_prefix(tokenizer, defaults.prefix, name), defaults)


def with_warm(prefix: Ids, defaults: Defaults) -> Ids:
    """P with the server's warm items at its end; for a P that no request gave as it is."""
    return sum(defaults.warm, start=prefix)


def encode_warm(tokenizer: Any, texts: Sequence[str], window: int) -> tuple[Ids, ...]:
    """Token ids of the warm items, each tokenised as a context is.

    Args:
        tokenizer: None with ``skip_tokenizer_init``.
        texts: of the items.
        window: of the model, in tokens.

    Raises:
        ValueError: there is no tokenizer, an item has no token, or all have too many.
    """
    if texts and tokenizer is None:
        raise ValueError("--ape-warm needs a tokenizer")
    encoded = tuple(encode_text(tokenizer, text, "--ape-warm") for text in texts)
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"--ape-warm: the item {text[:80]!r} has no token")
    if (tokens := sum(map(len, encoded))) >= window:
        raise ValueError(f"--ape-warm: {tokens} tokens; the model's window is {window}")
    return encoded


def encode_contexts(tokenizer: Any, contexts: Sequence[Context], at: str) -> list[Ids | ContextId]:
    """Token ids of each context, tokenised by itself and without special tokens.

    Contexts given by id stay as they are.
    """
    texts = [context for context in contexts if isinstance(context, str)]
    encoded: list[list[int]] = []
    if texts:
        if tokenizer is None:
            raise ApeRequestError("contexts: without a tokenizer, give token ids", f"contexts{at}")
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    of_text = iter(encoded)
    ids = [
        array("I", next(of_text)) if isinstance(context, str) else context for context in contexts
    ]
    for i, own in enumerate(ids):
        if not own:
            param = f"contexts{at}[{i}]"
            raise ApeRequestError(f"{param} has no token", param)
    return ids


def reading_of(options: ApeOptions, defaults: Defaults) -> Reading:
    """What a request asks for, and the server's defaults for the rest.

    Refined contexts are one sequence, in which soft has nothing to act on: a request that asks for
    one of the two does not get the other by default.
    """

    def chosen(name: str) -> Any:
        given = getattr(options, name)
        return getattr(defaults, name) if given is None else given

    refine = 0 if options.soft and options.refine is None else chosen("refine")
    temperature = max(float(chosen("temperature")), _MIN_TEMPERATURE)
    return Reading(
        temperature, float(chosen("scale")), 0.0 if refine else float(chosen("soft")), refine
    )


def build_row(
    prefix: Ids,
    contexts: Sequence[Ids],
    query: Ids,
    reading: Reading,
    bias: tuple[float, ...] = (),
) -> Row:
    """Lay out one row.

    One context at T = S = 1 attends exactly as the ordinary request P + C + Q does, and is sent
    as that.
    """
    temperature, scale = reading.temperature, reading.scale
    ids = joined_ids(prefix, *contexts, query)
    if len(contexts) == 1 and temperature == 1 and scale == 1:
        return Row(ids, None)
    spec = ApeSpec(
        prefix_len=len(prefix),
        context_lens=tuple(map(len, contexts)),
        temperature=temperature,
        scale=scale,
        namespace=namespace_of(prefix, contexts, temperature, scale, bias),
        bias=bias,
    )
    return Row(ids, spec)


def namespace_of(
    prefix: Ids,
    contexts: Sequence[Ids],
    temperature: float,
    scale: float,
    bias: tuple[float, ...] = (),
) -> str:
    """A name for all that the query's KV depends on; the order of contexts is no part of it."""
    whole = hashlib.sha256(repr((float(temperature), float(scale))).encode())
    whole.update(digest_of(prefix))
    parts = list(map(digest_of, contexts))
    if bias:
        own = [repr(value).encode() for value in bias]
        parts = [part + value for part, value in zip(parts, own, strict=True)]
    for part in sorted(parts):
        whole.update(part)
    return whole.hexdigest()


class Names(NamedTuple):
    """What the caller calls the parts of a request, for error messages."""

    prefix: str
    contexts: str
    query: str
    new_tokens: str


def check_row(
    prefix: Ids,
    contexts: Sequence[Ids],
    query: Ids,
    max_new_tokens: int | None,
    limits: Limits,
    names: Names,
) -> None:
    """Refuse a row that the engine could not serve.

    Raises:
        ApeRequestError: with the numbers.
    """
    if not query:
        raise ApeRequestError(f"{names.query} must not be empty", names.query)
    if _numbers((prefix, *contexts, query)).max() >= limits.vocab_size:
        _check_vocabulary(prefix, names.prefix, limits.vocab_size)
        _check_vocabulary(query, names.query, limits.vocab_size)
        for i, context in enumerate(contexts):
            _check_vocabulary(context, f"{names.contexts}[{i}]", limits.vocab_size)

    lens = [len(context) for context in contexts]
    total, longest = sum(lens), max(lens)
    if total > limits.context_tokens:
        raise ApeRequestError(
            f"the contexts hold {total} tokens in all, more than --ape-max-context-tokens "
            f"{limits.context_tokens}",
            names.contexts,
        )
    positions = len(prefix) + longest + len(query)
    if positions >= limits.window:
        too_long = lens.index(longest)
        over = longest >= len(query)
        raise ApeRequestError(
            f"prefix ({len(prefix)}), longest context ({longest}) and query ({len(query)}) take "
            f"{positions} positions; the model's window is {limits.window}",
            f"{names.contexts}[{too_long}]" if over else names.query,
        )
    if max_new_tokens is not None and positions + max_new_tokens > limits.window:
        raise ApeRequestError(
            f"{positions} positions of input and {max_new_tokens} new tokens exceed the model's "
            f"window of {limits.window}",
            names.new_tokens,
        )
    tokens = len(prefix) + total + len(query)
    if tokens > limits.usable_pool_tokens:
        raise ApeRequestError(
            f"the request holds {tokens} tokens in all; the KV pool has room for "
            f"{limits.usable_pool_tokens}",
            names.contexts,
        )


def check_refined(
    prefix: Ids,
    contexts: Sequence[Ids],
    query: Ids,
    max_new_tokens: int | None,
    refine: int,
    limits: Limits,
    name: str,
) -> None:
    """Refuse to refine so many contexts that they could exceed the window, one after another.

    Raises:
        ApeRequestError: with the numbers.
    """
    longest = sorted(map(len, contexts))[-refine:]
    positions = len(prefix) + sum(longest) + len(query)
    if positions + (max_new_tokens or 1) > limits.window:
        raise ApeRequestError(
            f"{name}: the longest {len(longest)} contexts take, one after another with prefix and "
            f"query, {positions} positions; the model's window is {limits.window}",
            name,
        )


def check_contexts(prefix: Ids, contexts: Sequence[Ids], limits: Limits) -> None:
    """Refuse contexts that no request could use: each must fit, with a query of one token.

    Raises:
        ApeRequestError: with the numbers.
    """
    _check_vocabulary(prefix, "prefix", limits.vocab_size)
    room = min(limits.window - 2, limits.usable_pool_tokens - 1, limits.context_tokens)
    for i, context in enumerate(contexts):
        _check_vocabulary(context, f"contexts[{i}]", limits.vocab_size)
        if len(prefix) + len(context) > room:
            raise ApeRequestError(
                f"contexts[{i}]: prefix ({len(prefix)}) and context ({len(context)}) take "
                f"{len(prefix) + len(context)} tokens; there is room for {room} beside a query",
                f"contexts[{i}]",
            )


def _check_vocabulary(ids: Ids, param: str, vocab_size: int) -> None:
    largest = _numbers([ids]).max(initial=0)
    if largest >= vocab_size:
        raise ApeRequestError(
            f"{param} holds token id {largest}, outside the vocabulary of {vocab_size}", param
        )


def joined_ids(*parts: Ids) -> array:
    """The parts in one array of type "q", the form in which SGLang's scheduler gets ids."""
    return array("q", _numbers(parts).astype(np.int64).tobytes())


def _numbers(parts: Iterable[Ids]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), np.uint32)
