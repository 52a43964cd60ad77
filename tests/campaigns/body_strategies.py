"""Malformed and hostile bodies for every route, as hypothesis strategies.

A body begins as a valid one, drawn from a short description of its route's fields. A mutation then
changes one thing about it: a value somewhere in its tree, the fields that it has, or its bytes.
Some bodies stay valid, so a test may ask only that an answer is no failure of the server.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields as fields_of_dataclass
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote

from hypothesis import strategies as st

VOCAB_SIZE = 512  # of the tiny checkpoints
OTHER_TENANT = "somebody else"
APE_FIELDS = ("contexts", "prefix", "prefix_ids", "ape")
PLAIN_ROUTES = ("generate", "completions", "chat")  # these exist without the plugin
JSON_TYPE = ("Content-Type", "application/json")

Draw = Callable[[st.SearchStrategy[Any]], Any]
Tree = Any  # what json.loads gives, with Raw for what it cannot
Mutation = Callable[[Draw, "Route", Tree, "Known"], "Tree | bytes"]
Place = tuple[str | int, ...]


class Known(NamedTuple):
    """Ids of contexts that the server knows."""

    own: tuple[str, ...]  # registered without a key
    foreign: tuple[str, ...]  # registered by another tenant


class Body(NamedTuple):
    """One request to send."""

    route: str
    mutation: str
    method: str
    target: str  # path and query, quoted
    content: bytes
    headers: tuple[tuple[str, str], ...] = (JSON_TYPE,)


def is_plain(body: Body) -> bool:
    """Whether SGLang alone answers it, because none of the plugin's fields is given."""
    if body.route not in PLAIN_ROUTES or body.headers[0][0] == "Content-Encoding":
        return False
    if not any(f'"{name}"'.encode() in body.content for name in APE_FIELDS):
        return True
    try:
        tree = json.loads(body.content)
    except (ValueError, RecursionError):
        return False
    return not isinstance(tree, dict) or all(tree.get(name) is None for name in APE_FIELDS)


class Raw(str):
    """JSON text that json.dumps would not write."""


class Route(NamedTuple):
    """Where bodies go, and what a valid one looks like."""

    name: str
    target: str
    valid: Callable[[Known], st.SearchStrategy[Tree]]
    query: str  # field that holds Q
    fields: Callable[[], Sequence[str]]  # of the route itself, SGLang's and the plugin's
    sampling: str | None = None  # field that holds the sampling parameters


# Values


_NUMBERS = (
    *(
        sign * 2**power + off
        for power in (31, 32, 53, 63, 64)
        for sign in (1, -1)
        for off in (0, -1)
    ),
    *(-1, 0, 1, 0.5, -0.5, -0.0, 1e308, -1e308, 5e-324, 10**30, -(10**400)),
    *(math.nan, math.inf, -math.inf, Raw("1e999"), Raw("-1e999"), Raw("9" * 5000), True, False),
)
_TEXTS = (
    *("", " ", "\x00", "a\x00b", "\x1b[2J", "\r\n\r\n", "\ud800", "a\udfff", "\ufeff", "\u202e"),
    *("</s>", "<|im_start|>", "<|ape_contexts_0|>", "{{ 7*7 }}", "%s%n", "../../etc/passwd", "("),
    *("🦢" * 40, "a" * 300, "nan", "1", "ctx-", "null", "file:///etc/hostname"),
)
_TEXT = st.sampled_from(_TEXTS) | st.text(max_size=8)
_JUNK: st.SearchStrategy[Tree] = st.recursive(
    st.none() | st.booleans() | st.sampled_from(_NUMBERS) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=2),
    max_leaves=4,
)
_LONG = ("a" * 1_000_000, "the harbour master keeps a ledger " * 3000, "\n" * 50_000, "🦢" * 20_000)

_WORDS = ("A lighthouse stands on the cliff.", "tin melts at 232 degrees\n", "beans", "snow.")
_QUERY = st.sampled_from(("Who keeps the lamp?", "Which ship?", "\nAnswer:"))
_IDS = st.lists(st.integers(4, VOCAB_SIZE - 1), min_size=1, max_size=9)
_NEW_TOKENS = st.integers(1, 3)
_OPTIONS = st.fixed_dictionaries(
    {}, optional={"temperature": st.sampled_from((0.5, 1.0, 9)), "scale": st.sampled_from((0, 0.9))}
)


def _context(known: Known) -> st.SearchStrategy[Tree]:
    text = st.sampled_from(_WORDS)
    return st.one_of(
        text,
        st.builds(lambda text: {"text": text}, text),
        st.builds(lambda ids: {"input_ids": ids}, _IDS),
        st.builds(lambda id: {"id": id}, st.sampled_from(known.own)),
    )


def _contexts(known: Known) -> st.SearchStrategy[Tree]:
    return st.lists(_context(known), min_size=1, max_size=3)


_PREFIX = {"prefix": st.sampled_from(("Notes:\n", "")), "prefix_ids": _IDS}


# Routes


def _native(known: Known) -> st.SearchStrategy[Tree]:
    params = {"temperature": st.just(0), "max_new_tokens": _NEW_TOKENS}
    return st.fixed_dictionaries(
        {
            "contexts": _contexts(known),
            "text": _QUERY,
            "sampling_params": st.fixed_dictionaries(params),
        },
        optional={
            "prefix": _PREFIX["prefix"],
            "ape": _OPTIONS,
            "stream": st.booleans(),
            "return_logprob": st.booleans(),
        },
    )


def _completion(known: Known) -> st.SearchStrategy[Tree]:
    return st.fixed_dictionaries(
        {
            "contexts": _contexts(known),
            "prompt": _QUERY | _IDS,
            "max_tokens": _NEW_TOKENS,
            "temperature": st.just(0),
        },
        optional={
            "prefix_ids": _PREFIX["prefix_ids"],
            "ape": _OPTIONS,
            "stream": st.booleans(),
            "logprobs": st.integers(0, 3),
        },
    )


def _chat(known: Known) -> st.SearchStrategy[Tree]:
    message = _QUERY.map(_user)
    system = {"role": "system", "content": "Answer from the notes."}
    return st.fixed_dictionaries(
        {
            "messages": message.map(lambda own: [system, own]) | message.map(lambda own: [own]),
            "contexts": _contexts(known),
            "max_tokens": _NEW_TOKENS,
            "temperature": st.just(0),
        },
        optional={"ape": _OPTIONS, "stream": st.booleans(), "logprobs": st.booleans()},
    )


def _registration(known: Known) -> st.SearchStrategy[Tree]:
    return st.fixed_dictionaries(
        {"contexts": _contexts(known)},
        optional={
            **_PREFIX,
            "pin": st.booleans(),
            "extra_key": st.sampled_from(("one", "two")),
            "messages": st.just([_user("")]),
        },
    )


@cache
def _native_fields() -> tuple[str, ...]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    return (*_OWN, *(field.name for field in fields_of_dataclass(GenerateReqInput)))


@cache
def _completion_fields() -> tuple[str, ...]:
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest

    return (*_OWN, *CompletionRequest.model_fields)


@cache
def _chat_fields() -> tuple[str, ...]:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    return (*_OWN, *ChatCompletionRequest.model_fields)


@cache
def _sampling_fields() -> tuple[str, ...]:
    from sglang.srt.sampling.sampling_params import SamplingParams

    return (*SamplingParams.__struct_fields__, "ape_context_lens", "no_such_parameter")


def _registration_fields() -> tuple[str, ...]:
    return (*_OWN, "messages", "tools", "chat_template_kwargs", "pin", "lora_path", "extra_key")


_OWN = (*APE_FIELDS, "no_such_field")

BODY_ROUTES = {
    route.name: route
    for route in (
        Route("generate", "/generate", _native, "text", _native_fields, "sampling_params"),
        Route("completions", "/v1/completions", _completion, "prompt", _completion_fields),
        Route("chat", "/v1/chat/completions", _chat, "messages", _chat_fields),
        Route("register", "/ape/contexts", _registration, "prefix", _registration_fields),
    )
}
ROUTES = (*BODY_ROUTES, "list", "get", "delete")


# Trees


def encoded(tree: Tree, ascii_only: bool = True) -> bytes:
    """The tree as JSON; Python's writer also takes NaN, infinities and lone surrogates."""
    raw: list[Raw] = []

    def marked(value: Tree) -> Tree:
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw-{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: marked(own) for key, own in value.items()}
        return [marked(own) for own in value] if isinstance(value, list) else value

    text = json.dumps(marked(tree), ensure_ascii=ascii_only)
    for i, literal in enumerate(raw):
        text = text.replace(f'"@raw-{i}@"', literal)
    return text.encode(errors="surrogatepass")


def _places(tree: Tree) -> list[Place]:
    """Where each value of the tree stands, the root left out."""
    if isinstance(tree, dict):
        items = list(tree.items())
    else:
        items = list(enumerate(tree)) if isinstance(tree, list) else []
    return [(key, *rest) for key, value in items for rest in ((), *_places(value))]


def _value_at(tree: Tree, path: Place) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def _with_value(tree: Tree, path: Place, value: Tree) -> Tree:
    """A copy with another value there; a new key is added."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = _with_value(copy[path[0]] if path[1:] else None, path[1:], value)
    return copy


def _without(tree: Tree, path: Place) -> Tree:
    parent = _value_at(tree, path[:-1])
    copy = dict(parent) if isinstance(parent, dict) else list(parent)
    del copy[path[-1]]
    return _with_value(tree, path[:-1], copy)


def _somewhere(draw: Draw, tree: Tree) -> Place:
    paths = _places(tree)
    return draw(st.sampled_from(paths)) if paths else ()


def _affordable(name: str | int, value: Tree) -> Tree:
    """SGLang copies a request ``n`` times before it checks anything.

    A number that fits the memory of no machine is refused there at once; one that nearly fits would
    take the memory of the machine that runs the test.
    """
    is_count = isinstance(value, int) and name in ("n", "best_of")
    return 2**63 if is_count and 64 < value < 2**53 else value


def _user(content: Tree) -> Tree:
    return {"role": "user", "content": content}


# Mutations


def _wrong_type(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    path = _somewhere(draw, tree)
    return _with_value(tree, path, _affordable(path[-1] if path else "", draw(_JUNK)))


def _extreme_number(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    return _with_value(tree, _somewhere(draw, tree), draw(st.sampled_from(_NUMBERS)))


def _hostile_text(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    texts = [path for path in _places(tree) if isinstance(_value_at(tree, path), str)]
    if not texts:
        return draw(_TEXT)
    path = draw(st.sampled_from(texts))
    before = draw(st.sampled_from(("", _value_at(tree, path))))
    return _with_value(tree, path, before + draw(_TEXT))


def _missing(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    path = _somewhere(draw, tree)
    return _without(tree, path) if path else {}


def _extra(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    objects = [(), *(path for path in _places(tree) if isinstance(_value_at(tree, path), dict))]
    path = draw(st.sampled_from(objects))
    if not isinstance(tree, dict):
        return tree
    return _with_value(tree, (*path, draw(_TEXT)), draw(_JUNK))


def _own_field(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    """Any value for any field that the route knows."""
    name = draw(st.sampled_from(route.fields()))
    return {**tree, name: _affordable(name, draw(_JUNK))}


def _sampling(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    if route.sampling is None:
        return _own_field(draw, route, tree, known)
    name = draw(st.sampled_from(_sampling_fields()))
    params = {**tree[route.sampling], name: _affordable(name, draw(_JUNK))}
    as_list = draw(st.sampled_from((False, False, False, True)))
    return {**tree, route.sampling: [params] if as_list else params}


def _nested(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    depth = draw(st.sampled_from((20, 300, 900, 1500, 100_000)))
    opening, closing = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ('[{"text":', "}]"))))
    inner = draw(st.sampled_from(("", "1"))) if opening == "[" else "1"
    closed = draw(st.sampled_from((True, True, False)))
    literal = Raw(opening * depth + inner + (closing * depth if closed else ""))
    names = st.sampled_from(route.fields()).map(lambda name: (name,))
    at = draw(names) if draw(st.booleans()) else _somewhere(draw, tree)
    return _with_value(tree, at, literal)


def _truncated(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    whole = encoded(tree)
    return whole[: draw(st.integers(0, len(whole) - 1))]


def _wrong_bytes(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    whole = encoded(tree)
    at = draw(st.integers(0, len(whole)))
    piece = draw(
        st.sampled_from((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xf5", b"\\u00", b'"'))
    )
    kept = draw(st.integers(0, 1))
    return whole[:at] + piece + whole[at + kept :]


def _surrogates(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    """Lone surrogates as the bytes that UTF-8 forbids, not as escapes."""
    return encoded(_hostile_text(draw, route, tree, known), ascii_only=False)


def _no_json(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    whole = encoded(tree)
    return draw(
        st.sampled_from(
            (
                *(
                    b"",
                    b" ",
                    b"null",
                    b"[]",
                    b"1",
                    b'"contexts"',
                    b"{}",
                    b'{"contexts"',
                    b"contexts",
                ),
                *(b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole + whole),
                *(b"[" + whole + b"]", whole + b"\x00", b'{"contexts":}', b"contexts=a&text=b"),
                *(whole.replace(b'"', b"'"), whole[:-1] + b",}", b"// a\n" + whole),
            )
        )
        | st.binary(max_size=40)
    )


def _duplicate_key(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    name = draw(st.sampled_from([*tree, *_OWN]))
    other = encoded({name: _affordable(name, draw(_JUNK))})
    whole = encoded(tree)
    first, second = (whole, other) if draw(st.booleans()) else (other, whole)
    return first[:-1] + b"," + second[1:]


def _wrong_id(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    unknown = st.sampled_from(("ctx-", "", "ctx-" + "0" * 32, known.own[0].upper())) | _TEXT
    id = draw(st.sampled_from(known.foreign) | unknown | _JUNK)
    keys = st.sampled_from((None, OTHER_TENANT, "one", OTHER_TENANT + " ", "", 7, [OTHER_TENANT]))
    mixed = {**tree, "contexts": [*tree["contexts"], {"id": id}]}
    name = draw(st.sampled_from(("extra_key", "cache_salt", "lora_path")))
    key = draw(keys)
    return mixed if key is None else {**mixed, name: key}


def _batch(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    """Lists whose lengths need not agree."""
    count = st.integers(0, 3)
    batch = {**tree, "contexts": [tree["contexts"]] * draw(count)}
    if draw(st.booleans()):
        batch["contexts"].append(draw(_JUNK | _contexts(known)))
    if draw(st.booleans()):
        batch[route.query] = [tree.get(route.query)] * draw(count)
    for name in ("prefix", "ape", "prefix_ids", "extra_key", "rid", "lora_path", "return_logprob"):
        if draw(st.sampled_from((True, False, False))):
            batch[name] = [tree.get(name, draw(_JUNK))] * draw(count)
    if route.sampling and draw(st.booleans()):
        batch[route.sampling] = [tree[route.sampling]] * draw(count)
    return batch


def _exclusive(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    """Fields that cannot stand beside the others."""
    message = _user([{"type": "image_url", "image_url": {"url": "a"}}])
    others = (
        {"prefix": "a", "prefix_ids": [5]},
        {"prefix": "a", "messages": [message]},
        {"text": "a", "input_ids": [5], "prompt": [5]},
        {"messages": [message]},
        {"messages": [{"role": "tool"}, message, 7]},
        {"messages": [_user([])]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"tools": [{"type": "function", "function": {}}], "tool_choice": "required"},
        {"image_data": ["a"], "session_params": {"id": "a"}, "session_id": "a"},
        {"input_embeds": [[0.5]]},
        {"sampling_params": {"custom_params": {"ape_context_lens": [1], "ape_prefix_len": -1}}},
        {"custom_params": {"ape_context_lens": [2**40], "ape_temperature": 0}},
        {"ape": {"soft": 0.5}},
        {"ape": {"refine": 2, "temperature": 0}},
        {"contexts": None, "prefix": "a", "ape": {}},
        {"response_format": {"type": "json_schema"}, "regex": "(", "ebnf": "root ::= "},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": 7}},
            }
        },
    )
    return {**tree, **draw(st.sampled_from(others))}


def _long_text(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree:
    text = draw(st.sampled_from(_LONG))
    any_field = draw(st.sampled_from(route.fields()))
    places: list[Place] = [("contexts", 0), ("prefix",), ("extra_key",), (route.query,), ("ape",)]
    places += [(any_field,)] * 5 + [(text[:9000],)]
    if route.sampling:
        places += [(route.sampling, draw(st.sampled_from(_sampling_fields())))] * 3
    path = draw(st.sampled_from(places))
    return _with_value(tree, path, [_user(text)] if path == ("messages",) else text)


def _huge_list(draw: Draw, route: Route, tree: Tree, known: Known) -> bytes:
    item = draw(
        st.sampled_from(
            (
                '""',
                "{}",
                "[]",
                '"a"',
                "null",
                "0",
                '[""]',
                '["a"]',
                '{"input_ids":[7]}',
                '{"id":""}',
            )
        )
    )
    places = ("contexts", "contexts", "contexts", "contexts", "prefix_ids", "ape", route.query)
    name = draw(st.sampled_from(places))
    count = draw(st.sampled_from((2001, 50_000, 1_000_000)))
    values = Raw("[" + ",".join([item] * count) + "]")
    return encoded({**tree, name: values})


def _several(draw: Draw, route: Route, tree: Tree, known: Known) -> Tree | bytes:
    for _ in range(draw(st.integers(2, 3))):
        if not isinstance(tree, dict):
            break
        tree = draw(st.sampled_from(_ANYWHERE))(draw, route, tree, known)
    return tree


_ANYWHERE: tuple[Mutation, ...] = (
    *(_wrong_type, _extreme_number, _hostile_text, _missing, _extra, _own_field),
    *(_nested, _exclusive),
)
_MUTATIONS: dict[str, tuple[int, Mutation]] = {  # with their weights
    "none": (6, lambda draw, route, tree, known: tree),
    "wrong type": (24, _wrong_type),
    "extreme number": (12, _extreme_number),
    "hostile text": (12, _hostile_text),
    "missing": (10, _missing),
    "extra key": (8, _extra),
    "any field": (24, _own_field),
    "sampling parameter": (24, _sampling),
    "nested": (8, _nested),
    "truncated": (8, _truncated),
    "wrong bytes": (10, _wrong_bytes),
    "surrogates": (4, _surrogates),
    "no JSON": (8, _no_json),
    "duplicate key": (8, _duplicate_key),
    "wrong id": (12, _wrong_id),
    "batch": (14, _batch),
    "exclusive": (10, _exclusive),
    "several": (16, _several),
    "long text": (1, _long_text),
    "huge list": (1, _huge_list),
}
_NAMES = tuple(name for name, (weight, _) in _MUTATIONS.items() for _ in range(weight))

_HEADERS = (
    *(JSON_TYPE,) * 12,
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/x-www-form-urlencoded"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "multipart/form-data"),
    ("Content-Type", ""),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "zstd"),
    ("Content-Encoding", "br, gzip"),
)


@st.composite
def bodies(draw: Draw, route: Route, known: Known) -> Body:
    """Bodies of one route."""
    name = draw(st.sampled_from(_NAMES))
    tree = draw(route.valid(known))
    mutated = _MUTATIONS[name][1](draw, route, tree, known)
    content = mutated if isinstance(mutated, bytes) else encoded(mutated)
    header = draw(st.sampled_from(_HEADERS))
    if header == ("Content-Encoding", "gzip") and draw(st.booleans()):
        content = gzip.compress(content, mtime=0)
    if header != JSON_TYPE:
        name = header[0].lower()
    return Body(route.name, name, "POST", route.target, content, (header,))


# Requests without a body of their own


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


@st.composite
def listings(draw: Draw, known: Known) -> Body:
    """Pages of ``GET /ape/contexts``."""
    names = st.sampled_from(("limit", "after", "extra_key", "lora_path", "no_such_parameter"))
    number = st.sampled_from(_NUMBERS).map(str) | st.integers(-3, 1200).map(str)
    text = _TEXT | st.sampled_from((OTHER_TENANT, "一", "²", "1_000", "+5", "0x10", "9" * 300))
    pairs = draw(st.lists(st.tuples(names, number | text), max_size=4))
    query = "&".join(f"{name}={_quoted(value)}" for name, value in pairs)
    tail = draw(st.sampled_from(("", "", "", "&", "&limit", "&%ff=%ff", "&after=%00", ";")))
    content = draw(st.sampled_from((b"", b"", b"{}", b'{"contexts": [')))
    return Body("list", "query", "GET", f"/ape/contexts?{query}{tail}", content)


@st.composite
def lookups(draw: Draw, known: Known, route: str) -> Body:
    """``GET`` and ``DELETE`` of one id; never a good id to delete."""
    good = known.own[:1] if route == "get" else ()
    odd = ("ctx-", ".", "..", "../ctx-", "%", "ctx-" + "0" * 32, "ctx-" + "g" * 32, "a" * 8000, "*")
    id = draw(st.sampled_from((*good, *known.foreign[:1], *odd)) | _TEXT | st.text(max_size=30))
    if route == "delete" and id in known.foreign:
        id += " "
    tail = draw(st.sampled_from(("", "", "", "?extra_key=a", "/", "/more", "%2f..", "#a", "?%00")))
    content = draw(st.sampled_from((b"", b"", b"{}", b"\xff" * 9)))
    return Body(route, "id", route.upper(), f"/ape/contexts/{_quoted(id)}{tail}", content)


def requests_to(route: str, known: Known) -> st.SearchStrategy[Body]:
    """Whatever the campaign sends to one of :data:`ROUTES`."""
    if route in BODY_ROUTES:
        return bodies(BODY_ROUTES[route], known)
    return listings(known) if route == "list" else lookups(known, route)
