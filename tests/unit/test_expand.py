"""From a checked call to the token row of one ordinary request."""

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.entry import expand
from sglang_ape.entry.call import (
    CHAT,
    COMPLETIONS,
    ENGINE,
    NATIVE,
    ApeItem,
    ApeOptions,
    Door,
    current_call,
    parse_call,
)
from sglang_ape.entry.expand import Defaults, Names, Reading, Row, reading_of
from sglang_ape.entry.layout import lay_out
from sglang_ape.entry.prepare import prepare_call
from sglang_ape.entry.tokenizer_manager import Entry, around_generate_request
from sglang_ape.errors import ApeRequestError
from sglang_ape.limits import Limits
from sglang_ape.scoring.question import Scores
from sglang_ape.spec import BIAS, COPY_LEN, CUSTOM_PARAM_KEYS, PROBE_LENS, ApeSpec
from sglang_ape.store.contexts import ContextStore

BOS, START = 1, 2
VOCAB = 1000
LIMITS = Limits(window=64, context_tokens=200, pool_tokens=300, vocab_size=VOCAB)
DEFAULTS = Defaults(0.8, 0.7)
NAMES = Names("prefix", "contexts", "text", "sampling_params.max_new_tokens")
fast = settings(deadline=None, max_examples=60)
tokens = st.lists(st.integers(0, 5), max_size=4)
context_sets = st.lists(tokens.filter(bool), min_size=1, max_size=4)


class CharTokenizer:
    """One token a character, and START before whatever takes special tokens."""

    def __init__(self, bos: int | None = BOS) -> None:
        self.bos_token_id = bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([START] if add_special_tokens else []) + ids_of(text)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text, add_special_tokens) for text in texts]}


def ids_of(text: str) -> list[int]:
    return [ord(char) for char in text if char != "\0"]  # NUL is a text without tokens


def make_store() -> ContextStore:
    return ContextStore("model", 10_000, 0)


def make_entry(tokenizer: Any = None, limits: Limits = LIMITS) -> Entry:
    return Entry(tokenizer or CharTokenizer(), limits, DEFAULTS, None, make_store())


def make_item(temperature: float | None = None, scale: float | None = None) -> ApeItem:
    return ApeItem([], None, "prefix", ApeOptions(temperature=temperature, scale=scale), "")


def make_obj(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"text": None, "input_ids": None, "sampling_params": None} | fields))


def apply(
    obj: SimpleNamespace, ape: dict[str, Any], entry: Entry | None = None, door: Door = NATIVE
) -> SimpleNamespace:
    entry = entry or make_entry()
    lay_out(entry, obj, prepare_call(entry, parse_call(ape, door), obj))
    return obj


def ids(values: list[int]) -> array:
    return array("I", values)


def listed(row: array) -> list[int]:
    """The ids of one row for SGLang, which must be the array that SGLang itself makes."""
    assert isinstance(row, array), type(row)
    assert row.typecode == "q"
    return row.tolist()


def build_row(
    prefix: list[int],
    contexts: list[list[int]],
    query: list[int],
    item: ApeItem,
    defaults: Defaults,
    bias: tuple[float, ...] = (),
) -> Row:
    reading = reading_of(item.options, defaults)
    row = expand.build_row(ids(prefix), list(map(ids, contexts)), ids(query), reading, bias)
    return row._replace(input_ids=listed(row.input_ids))


def check_row(prefix: list[int], contexts: list[list[int]], query: list[int], *rest: Any) -> None:
    expand.check_row(ids(prefix), list(map(ids, contexts)), ids(query), *rest)


def namespace_of(prefix: list[int], contexts: list[list[int]], t: float, s: float) -> str:
    return expand.namespace_of(ids(prefix), list(map(ids, contexts)), t, s)


def spec_in(params: dict[str, Any]) -> ApeSpec | None:
    return ApeSpec.from_custom_params(params.get("custom_params"))


# ---------------------------------------------------------------- build_row and namespace_of


@fast
@given(prefix=tokens, contexts=context_sets, query=tokens)
def test_a_row_is_prefix_contexts_and_query(
    prefix: list[int], contexts: list[list[int]], query: list[int]
) -> None:
    row = build_row(prefix, contexts, query, make_item(), DEFAULTS)
    assert row.input_ids == prefix + [token for own in contexts for token in own] + query
    assert row.spec is not None
    assert row.spec.prefix_len == len(prefix)
    assert row.spec.context_lens == tuple(len(own) for own in contexts)


def test_a_row_does_not_change_its_parts() -> None:
    prefix, contexts, query = ids([1]), [ids([2]), ids([3])], ids([4])
    row = expand.build_row(prefix, contexts, query, Reading(0.8, 0.7))
    row.input_ids[:] = array("q", [9] * 4)
    assert (prefix, contexts, query) == (ids([1]), [ids([2]), ids([3])], ids([4]))


@pytest.mark.parametrize(
    ("given_t", "given_s", "expected"),
    [
        (None, None, (0.8, 0.7)),
        (0.5, None, (0.5, 0.7)),
        (None, 0.0, (0.8, 0.0)),
        (1, 1, (1.0, 1.0)),
    ],
)
def test_a_request_overrides_the_defaults(
    given_t: float | None, given_s: float | None, expected: tuple[float, float]
) -> None:
    row = build_row([1], [[2], [3]], [4], make_item(given_t, given_s), DEFAULTS)
    assert row.spec is not None
    assert (row.spec.temperature, row.spec.scale) == expected
    assert type(row.spec.temperature) is type(row.spec.scale) is float


@pytest.mark.parametrize("defaults", [Defaults(0.8, 0.7), Defaults(1.0, 1.0)])
def test_one_context_with_neutral_numbers_is_an_ordinary_request(defaults: Defaults) -> None:
    item = make_item(1, 1)
    assert build_row([1], [[2, 3]], [4], item, defaults).spec is None
    assert build_row([1], [[2, 3]], [4], item, defaults).input_ids == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("contexts", "temperature", "scale"),
    [([[2], [3]], 1, 1), ([[2]], 0.9, 1), ([[2]], 1, 0.9), ([[2]], 1, 0)],
)
def test_all_else_is_an_ape_request(
    contexts: list[list[int]], temperature: float, scale: float
) -> None:
    row = build_row([1], contexts, [4], make_item(temperature, scale), Defaults(1, 1))
    assert row.spec is not None


@fast
@given(data=st.data(), prefix=tokens, contexts=context_sets)
def test_the_namespace_does_not_know_the_order(
    data: st.DataObject, prefix: list[int], contexts: list[list[int]]
) -> None:
    other = data.draw(st.permutations(contexts))
    assert namespace_of(prefix, contexts, 0.9, 0.8) == namespace_of(prefix, other, 0.9, 0.8)


@fast
@given(first=st.tuples(tokens, context_sets), second=st.tuples(tokens, context_sets))
def test_different_prefixes_or_sets_of_contexts_have_different_namespaces(
    first: tuple[list[int], list[list[int]]], second: tuple[list[int], list[list[int]]]
) -> None:
    same = first[0] == second[0] and sorted(first[1]) == sorted(second[1])
    assert (namespace_of(*first, 1, 1) == namespace_of(*second, 1, 1)) == same


def test_the_namespace_knows_every_thing_the_answer_depends_on() -> None:
    variants = [
        ([1, 2], [[3, 4], [5]], 0.9, 0.8),
        ([1], [[2, 3, 4], [5]], 0.9, 0.8),  # a token moved from P into a context
        ([1, 2], [[3], [4, 5]], 0.9, 0.8),  # a boundary moved
        ([1, 2], [[3, 4, 5]], 0.9, 0.8),
        ([1, 2], [[3, 4]], 0.9, 0.8),
        ([1, 2], [[3, 4], [5], [5]], 0.9, 0.8),
        ([1, 2], [[3, 4], [3, 4], [5]], 0.9, 0.8),
        ([1, 2], [[3, 4], [5]], 0.8, 0.9),
        ([1, 2], [[3, 4], [5]], 0.90001, 0.8),
        ([1, 2], [[3, 4], [5]], 0.9, 0.0),
        ([], [[1, 2], [3, 4], [5]], 0.9, 0.8),
        ([3, 4], [[1, 2], [5]], 0.9, 0.8),
    ]
    assert len({namespace_of(*variant) for variant in variants}) == len(variants)


def test_whole_numbers_and_floats_have_one_namespace() -> None:
    assert namespace_of([1], [[2]], 1, 0) == namespace_of([1], [[2]], 1.0, 0.0)


def test_the_row_carries_the_namespace_of_its_content() -> None:
    rows = [
        build_row([1], contexts, [4], make_item(0.5, 0.6), DEFAULTS)
        for contexts in ([[2], [3]], [[3], [2]], [[2], [3], [3]])
    ]
    names = [row.spec.namespace for row in rows if row.spec]
    assert names[0] == names[1] != names[2]


# ---------------------------------------------------------------- check_row


def refusal(
    prefix: list[int],
    contexts: list[list[int]],
    query: list[int],
    max_new_tokens: int | None = None,
    limits: Limits = LIMITS,
) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        check_row(prefix, contexts, query, max_new_tokens, limits, NAMES)
    assert caught.value.status_code == 400
    return caught.value


def assert_says(error: ApeRequestError, param: str, *numbers: int) -> None:
    assert error.param == param
    for number in numbers:
        assert str(number) in str(error), f"{number} is missing in: {error}"


def test_a_row_within_every_limit_passes() -> None:
    check_row([1] * 10, [[2] * 30, [3] * 5], [4] * 20, 4, LIMITS, NAMES)


def test_an_empty_query_is_refused() -> None:
    assert_says(refusal([1], [[2]], []), "text")


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 1, 2**31, 2**32 - 1])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    assert_says(refusal([1, token], [[2]], [3]), "prefix", token, VOCAB)
    assert_says(refusal([1], [[2], [2, token]], [3]), "contexts[1]", token, VOCAB)
    assert_says(refusal([1], [[2]], [token]), "text", token, VOCAB)


def test_contexts_over_the_limit_are_refused_with_the_numbers() -> None:
    contexts = [[2] * 20] * 11
    assert_says(refusal([1], contexts, [3]), "contexts", 220, 200)
    assert "--ape-max-context-tokens" in str(refusal([1], contexts, [3]))


def test_contexts_at_the_limit_pass() -> None:
    check_row([1], [[2] * 20] * 10, [3], 4, LIMITS, NAMES)


def test_contexts_may_hold_more_than_the_window_in_all() -> None:
    check_row([1] * 4, [[2] * 40] * 4, [3] * 10, 10, LIMITS, NAMES)


def test_positions_over_the_window_name_the_longest_context() -> None:
    error = refusal([1] * 10, [[2] * 5, [2] * 40], [3] * 20)
    assert_says(error, "contexts[1]", 10, 40, 20, 70, 64)


def test_positions_over_the_window_name_the_query_if_it_is_longer() -> None:
    assert_says(refusal([1] * 10, [[2] * 5, [2] * 9], [3] * 50), "text", 10, 9, 50, 69, 64)


def test_there_must_be_a_position_left_for_an_answer() -> None:
    assert_says(refusal([1] * 10, [[2] * 30], [3] * 24), "contexts[0]", 64)
    check_row([1] * 10, [[2] * 30], [3] * 23, 1, LIMITS, NAMES)


def test_new_tokens_beyond_the_window_are_refused() -> None:
    error = refusal([1] * 10, [[2] * 30, [2] * 30], [3] * 20, max_new_tokens=5)
    assert_says(error, "sampling_params.max_new_tokens", 60, 5, 64)
    check_row([1] * 10, [[2] * 30, [2] * 30], [3] * 20, 4, LIMITS, NAMES)


def test_a_row_larger_than_the_pool_is_refused() -> None:
    small = LIMITS._replace(pool_tokens=100)
    error = refusal([1] * 10, [[2] * 20] * 4, [3] * 20, limits=small)
    assert_says(error, "contexts", 110)


# ---------------------------------------------------------------- apply_call


def test_every_text_is_tokenised_by_itself_and_special_tokens_go_to_the_prefix_alone() -> None:
    obj = apply(
        make_obj(text="why"), {"contexts": ["ab", {"text": "c"}, {"input_ids": [9]}], "prefix": "P"}
    )
    assert obj.text is None
    row = listed(obj.input_ids)
    assert row == [START, *ids_of("P"), *ids_of("ab"), *ids_of("c"), 9, *ids_of("why")]
    spec = spec_in(obj.sampling_params)
    assert spec is not None
    assert (spec.prefix_len, spec.context_lens) == (2, (2, 1, 1))
    assert (spec.temperature, spec.scale) == (DEFAULTS.temperature, DEFAULTS.scale)


def test_ids_are_taken_as_they_are() -> None:
    obj = apply(make_obj(input_ids=[7, 8]), {"contexts": ["a", "b"], "prefix_ids": [5]})
    assert listed(obj.input_ids) == [5, ord("a"), ord("b"), 7, 8]


def test_the_default_prefix_is_bos_and_two_newlines() -> None:
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"]})
    assert listed(obj.input_ids) == [BOS, *ids_of("\n\nabq")]
    assert spec_in(obj.sampling_params).prefix_len == 3


def test_the_default_prefix_of_a_model_without_bos_is_two_newlines() -> None:
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"]}, make_entry(CharTokenizer(bos=None)))
    assert listed(obj.input_ids) == ids_of("\n\nabq")


def test_the_default_prefix_of_a_profile_is_text_with_special_tokens() -> None:
    entry = make_entry()._replace(defaults=DEFAULTS._replace(prefix="N"))
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"]}, entry)
    assert listed(obj.input_ids) == [START, *ids_of("Nabq")]
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"], "prefix": "P"}, entry)
    assert listed(obj.input_ids) == [START, *ids_of("Pabq")]
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"], "prefix_ids": []}, entry)
    assert listed(obj.input_ids) == ids_of("abq")


def test_an_empty_prefix_is_a_prefix() -> None:
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"], "prefix_ids": []})
    assert listed(obj.input_ids) == ids_of("abq")
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"], "prefix": ""})
    assert listed(obj.input_ids) == [START, *ids_of("abq")]


def test_one_neutral_context_leaves_the_sampling_params_alone() -> None:
    params = {"temperature": 0.3}
    obj = apply(
        make_obj(text="q", sampling_params=params),
        {"contexts": ["a"], "ape": {"temperature": 1, "scale": 1}},
    )
    assert obj.sampling_params == params
    assert listed(obj.input_ids) == [BOS, *ids_of("\n\naq")]


def test_custom_params_of_the_user_are_kept() -> None:
    params = {"temperature": 0, "custom_params": {"mine": [1, 2]}}
    obj = apply(make_obj(text="q", sampling_params=params), {"contexts": ["a", "b"]})
    custom = obj.sampling_params["custom_params"]
    assert custom["mine"] == [1, 2]
    assert set(custom) == {"mine", *CUSTOM_PARAM_KEYS - {BIAS, COPY_LEN, PROBE_LENS}}
    assert obj.sampling_params["temperature"] == 0


def test_the_callers_own_dictionaries_are_not_written_to() -> None:
    params = {"custom_params": {"mine": 1}}
    apply(make_obj(text="q", sampling_params=params), {"contexts": ["a", "b"]})
    assert params == {"custom_params": {"mine": 1}}


def test_custom_params_that_are_no_object_are_refused() -> None:
    obj = make_obj(text="q", sampling_params={"custom_params": [1]})
    with pytest.raises(ApeRequestError):
        apply(obj, {"contexts": ["a", "b"]})


def apply_refused(
    fields: dict[str, Any], ape: dict[str, Any], entry: Entry | None = None, door: Door = NATIVE
) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        apply(make_obj(**fields), ape, entry, door)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_data", ["image.png"]),
        ("image_data", "image.png"),
        ("video_data", ["v"]),
        ("audio_data", ["a"]),
        ("session_params", {"id": "s"}),
        ("session_id", "s"),
    ],
)
def test_images_and_sessions_are_refused_beside_contexts(name: str, value: Any) -> None:
    error = apply_refused({"text": "q", name: value}, {"contexts": ["a"]})
    assert error.param == name


def test_embeddings_are_refused_beside_contexts() -> None:
    error = apply_refused({"input_embeds": [[0.1, 0.2]]}, {"contexts": ["a"]})
    assert error.param == "input_embeds"


def test_text_and_ids_together_are_refused() -> None:
    error = apply_refused({"text": "q", "input_ids": [1]}, {"contexts": ["a"]})
    assert error.param == "input_ids"


def test_contexts_without_a_query_are_refused() -> None:
    assert apply_refused({}, {"contexts": ["a"]}).param == "text"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"text": ""}, "text"), ({"input_ids": []}, "input_ids"), ({"text": "\0"}, "text")],
)
def test_an_empty_query_is_named_as_the_caller_wrote_it(fields: dict[str, Any], param: str) -> None:
    assert apply_refused(fields, {"contexts": ["a", "b"]}).param == param


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([True, 700], "must hold integers only, got bool"),
        ([700, False], "must hold integers only, got bool"),
        ([7, 8.0], "must hold integers only, got float"),
        ([7, None], "must hold integers only, got null"),
        ([7, [8]], "must hold integers only, got list"),
        ([7, "8"], "must hold integers only, got str"),
        ([7, -1], "holds token id -1, outside any vocabulary"),
        ([7, 2**32], "holds token id 4294967296, outside any vocabulary"),
        ([7, 1000], "holds token id 1000, outside the vocabulary of 1000"),
    ],
)
def test_the_ids_of_a_query_are_checked_and_named_as_the_caller_wrote_them(
    wrong: list[Any], message: str
) -> None:
    def assert_refused(value: Any, contexts: list[Any], door: Door, param: str) -> None:
        error = apply_refused({"input_ids": value}, {"contexts": contexts}, door=door)
        assert (error.param, str(error)) == (param, f"{param} {message}")

    for door, name in ((NATIVE, "input_ids"), (ENGINE, "input_ids"), (COMPLETIONS, "prompt")):
        assert_refused(wrong, ["a", "b"], door, name)
        assert_refused([[7], wrong], [["a"], ["b"]], door, f"{name}[1]")


@pytest.mark.parametrize("value", [None, 7, {"ids": [7]}])
def test_a_query_of_a_batch_that_is_no_list_is_named(value: Any) -> None:
    error = apply_refused({"input_ids": [[7], value]}, {"contexts": [["a"], ["b"]]})
    assert error.param == "input_ids[1]"


def test_a_query_of_numpy_integers_is_taken() -> None:
    query = [np.int64(7), np.int32(1), np.uint8(0)]
    obj = apply(make_obj(input_ids=query), {"contexts": ["a"], "prefix_ids": []}, door=ENGINE)
    assert listed(obj.input_ids) == [ord("a"), 7, 1, 0]


def test_the_completions_route_calls_the_query_prompt() -> None:
    error = apply_refused({"text": ""}, {"contexts": ["a", "b"]}, door=COMPLETIONS)
    assert error.param == "prompt"
    sampling = {"max_new_tokens": 1000}
    fields = {"text": "q", "sampling_params": sampling}
    assert apply_refused(fields, {"contexts": ["a"]}, door=COMPLETIONS).param == "max_tokens"


def test_a_text_without_tokens_is_refused_with_its_place() -> None:
    assert apply_refused({"text": "q"}, {"contexts": ["a", "\0"]}).param == "contexts[1]"
    batch = {"contexts": [["a"], ["a", "\0"]]}
    assert apply_refused({"text": ["q", "r"]}, batch).param == "contexts[1][1]"


def test_a_lone_surrogate_in_the_query_is_refused() -> None:
    assert apply_refused({"text": "\ud800"}, {"contexts": ["a"]}).param == "text"


def test_an_engine_without_tokenizer_wants_ids() -> None:
    entry = Entry(None, LIMITS, DEFAULTS, None, make_store())
    ids = {"contexts": [{"input_ids": [5]}, {"input_ids": [6]}], "prefix_ids": [4]}
    assert listed(apply(make_obj(input_ids=[7]), ids, entry).input_ids) == [4, 5, 6, 7]
    texts = {**ids, "contexts": ["a"]}
    assert apply_refused({"input_ids": [7]}, texts, entry).param == "contexts"
    assert apply_refused({"text": "q"}, ids, entry).param == "text"
    text_prefix = {"contexts": ids["contexts"], "prefix": "P"}
    assert apply_refused({"input_ids": [7]}, text_prefix, entry).param == "prefix"
    no_prefix = {"contexts": ids["contexts"]}
    assert apply_refused({"input_ids": [7]}, no_prefix, entry).param == "prefix_ids"


def test_a_batch_gets_one_row_and_one_set_of_params_each() -> None:
    obj = apply(
        make_obj(text=["q", "r"], sampling_params={"temperature": 0}),
        {"contexts": [["a", "b"], ["c", "d"]], "prefix_ids": [5], "ape": [{"scale": 0.1}, {}]},
    )
    assert obj.input_ids == [[5, *ids_of("abq")], [5, *ids_of("cdr")]]
    specs = [spec_in(params) for params in obj.sampling_params]
    assert [spec.scale for spec in specs] == [0.1, DEFAULTS.scale]
    assert all(params["temperature"] == 0 for params in obj.sampling_params)


def test_a_batch_of_ids_keeps_its_own_params() -> None:
    sampling = [{"custom_params": {"mine": 1}}, {"custom_params": {"mine": 2}}]
    obj = apply(
        make_obj(input_ids=[[7], [8, 9]], sampling_params=sampling),
        {"contexts": [["a", "b"], ["c", "d"]], "prefix_ids": []},
    )
    assert obj.input_ids == [[*ids_of("ab"), 7], [*ids_of("cd"), 8, 9]]
    assert [params["custom_params"]["mine"] for params in obj.sampling_params] == [1, 2]


@pytest.mark.parametrize("fields", [{"text": "q"}, {"input_ids": [ord("q")]}])
@pytest.mark.parametrize("contexts", [["a"], ["a", "b"]])
def test_only_a_request_that_sglang_does_not_copy_gets_an_array(
    fields: dict[str, Any], contexts: list[str]
) -> None:
    """Where SGLang copies requests (a batch, n > 1) it tells rows from ids by ``list``."""
    ape = {"contexts": contexts, "prefix_ids": [5], "ape": {"temperature": 1, "scale": 1}}
    row = [5, *ids_of("".join(contexts)), ord("q")]
    for sampling in ({}, {"n": 1}, [{}], [{"n": 1}]):
        single = apply(make_obj(**fields, sampling_params=sampling), ape)
        assert listed(single.input_ids) == row
    for several in ({"n": 2}, [{"n": 2}]):
        assert apply(make_obj(**fields, sampling_params=several), ape).input_ids == row
    batch = {name: [value] * 2 for name, value in fields.items()}
    ape["contexts"] = [contexts] * 2
    for sampling in ({}, {"n": 1}, {"n": 2}):
        assert apply(make_obj(**batch, sampling_params=sampling), ape).input_ids == [row, row]


def test_a_neutral_request_of_a_batch_is_ordinary_beside_the_others() -> None:
    neutral = {"temperature": 1, "scale": 1}
    obj = apply(
        make_obj(text=["q", "r"]), {"contexts": [["a"], ["c", "d"]], "ape": [neutral, neutral]}
    )
    assert [spec_in(params) is None for params in obj.sampling_params] == [True, False]


@pytest.mark.parametrize(
    ("fields", "contexts"),
    [
        ({"text": ["q", "r"]}, ["a", "b"]),
        ({"text": ["q", "r"]}, [["a"]]),
        ({"text": ["q", "r"]}, [["a"], ["b"], ["c"]]),
        ({"text": "q"}, [["a"]]),
        ({"text": "q"}, [["a"], ["b"]]),
        ({"input_ids": [1, 2]}, [["a"], ["b"]]),
        ({"input_ids": [[1], [2]]}, ["a", "b"]),
        ({"text": []}, ["a"]),
    ],
)
def test_batches_that_do_not_fit_the_queries_are_refused(
    fields: dict[str, Any], contexts: list[Any]
) -> None:
    apply_refused(fields, {"contexts": contexts})


def test_sampling_params_of_another_batch_size_are_refused() -> None:
    fields = {"text": ["q", "r"], "sampling_params": [{}]}
    error = apply_refused(fields, {"contexts": [["a"], ["b"]]})
    assert error.param == "sampling_params"


def test_an_error_in_a_batch_names_the_request() -> None:
    error = apply_refused({"text": ["q", ""]}, {"contexts": [["a"], ["b"]]})
    assert error.param == "text[1]"
    long = "x" * 100
    error = apply_refused({"text": ["q", "r"]}, {"contexts": [["a"], ["b", long]]})
    assert error.param == "contexts[1][1]"


def test_max_new_tokens_are_counted_in_positions() -> None:
    contexts = {"contexts": ["a" * 40, "b" * 40, "c" * 40], "prefix_ids": [5]}
    apply(make_obj(text="q" * 10, sampling_params={"max_new_tokens": 13}), contexts)
    fields = {"text": "q" * 10, "sampling_params": {"max_new_tokens": 14}}
    assert apply_refused(fields, contexts).param == "sampling_params.max_new_tokens"


def test_a_chat_is_cut_at_the_marker() -> None:
    marker = SimpleNamespace(split=lambda ids: (ids[: ids.index(99)], ids[ids.index(99) + 1 :]))
    entry = make_entry()._replace(marker=marker)
    obj = apply(make_obj(input_ids=[5, 6, 99, 7]), {"contexts": ["a", "b"]}, entry, CHAT)
    assert listed(obj.input_ids) == [5, 6, *ids_of("ab"), 7]
    assert spec_in(obj.sampling_params).prefix_len == 2


# ---------------------------------------------------------------- soft and refine


@pytest.mark.parametrize(
    ("given", "defaults", "soft", "refine"),
    [
        ({}, {}, 0.0, 0),
        ({}, {"soft": 0.3}, 0.3, 0),
        ({}, {"refine": 2}, 0.0, 2),
        ({"soft": 0.1}, {"soft": 0.3}, 0.1, 0),
        ({"soft": 0.0}, {"soft": 0.3}, 0.0, 0),
        ({"soft": 0.1}, {"refine": 2}, 0.1, 0),
        ({"refine": 1}, {"soft": 0.3}, 0.0, 1),
        ({"refine": 0}, {"soft": 0.3}, 0.3, 0),
        ({"refine": 0}, {"refine": 2}, 0.0, 0),
        ({"soft": 0.0}, {"refine": 2}, 0.0, 2),
        ({"soft": 0.1, "refine": 0}, {"refine": 2}, 0.1, 0),
    ],
)
def test_a_request_that_asks_for_one_rung_does_not_get_the_other_by_default(
    given: dict[str, Any], defaults: dict[str, Any], soft: float, refine: int
) -> None:
    reading = reading_of(ApeOptions(**given), Defaults(0.8, 0.7, **defaults))
    assert reading == Reading(0.8, 0.7, soft, refine)


def ask(ape: dict[str, Any], contexts: list[str], new_tokens: int = 8) -> Any:
    fields = {"contexts": contexts, "prefix": "p", "ape": ape}
    obj = make_obj(text="q", sampling_params={"max_new_tokens": new_tokens})
    (asked,) = prepare_call(make_entry(), parse_call(fields, NATIVE), obj)
    return obj, asked


@pytest.mark.parametrize(
    ("ape", "count", "wanted"),
    [
        ({}, 3, False),
        ({"soft": 0.0}, 3, False),
        ({"soft": 0.1}, 3, True),
        ({"soft": 0.1}, 1, False),
        ({"refine": 2}, 3, True),
        ({"refine": 2}, 2, False),
        ({"refine": 5}, 2, False),
    ],
)
def test_scores_are_wanted_where_the_answer_depends_on_them(
    ape: dict[str, Any], count: int, wanted: bool
) -> None:
    assert ask(ape, ["abc"] * count)[1].wants_scores is wanted


def test_soft_gives_each_context_its_bias() -> None:
    obj, asked = ask({"soft": 0.5}, ["ab", "c", "def"])
    (parts,) = lay_out(make_entry(), obj, [asked], [Scores((-4.0, -2.0, -3.0), 9, 5)])
    assert spec_in(obj.sampling_params).bias == (-1.0, 0.0, -0.5)
    assert listed(obj.input_ids) == [START, *ids_of("pabcdefq")]
    assert [one["score"] for one in parts.scores] == [-4.0, -2.0, -3.0]
    assert all(one["id"].startswith("ctx-") for one in parts.scores)
    assert (parts.contexts, parts.is_refined) == ((2, 1, 3), False)
    assert (parts.scored_tokens, parts.encoded_tokens) == (9, 5)


def test_equal_scores_leave_attention_as_it_is_without_soft() -> None:
    obj, asked = ask({"soft": 0.5}, ["ab", "c"])
    lay_out(make_entry(), obj, [asked], [Scores((-4.0, -4.0))])
    plain = apply(make_obj(text="q"), {"contexts": ["ab", "c"], "prefix": "p"})
    assert spec_in(obj.sampling_params) == spec_in(plain.sampling_params)


def test_refined_contexts_are_an_ordinary_sequence_in_the_given_order() -> None:
    obj, asked = ask({"refine": 2}, ["ab", "c", "def"])
    (parts,) = lay_out(make_entry(), obj, [asked], [Scores((-4.0, -2.0, -3.0))])
    assert spec_in(obj.sampling_params) is None
    assert listed(obj.input_ids) == [START, *ids_of("pcdefq")]
    assert (parts.contexts, parts.is_refined, len(parts.scores)) == ((1, 3), True, 3)


def test_refining_all_contexts_needs_no_scores() -> None:
    obj, asked = ask({"refine": 3}, ["ab", "c", "def"])
    (parts,) = lay_out(make_entry(), obj, [asked])
    assert spec_in(obj.sampling_params) is None
    assert listed(obj.input_ids) == [START, *ids_of("pabcdefq")]
    assert parts.scores == ()


def test_refined_contexts_must_fit_the_window_one_after_another() -> None:
    contexts = ["a" * 30, "b" * 20, "c" * 10]
    ask({"refine": 1}, contexts)
    ask({"refine": 2}, contexts, new_tokens=11)
    with pytest.raises(ApeRequestError) as caught:
        ask({"refine": 2}, contexts, new_tokens=12)
    assert caught.value.param == "ape.refine"
    assert "53 positions" in str(caught.value)


def test_the_namespace_knows_the_bias_of_each_context() -> None:
    contexts, bias = [ids([1]), ids([2])], (0.0, -1.0)
    named = expand.namespace_of(ids([9]), contexts, 0.9, 0.9, bias)
    assert named == expand.namespace_of(ids([9]), contexts[::-1], 0.9, 0.9, bias[::-1])
    assert named != expand.namespace_of(ids([9]), contexts, 0.9, 0.9, bias[::-1])
    assert named != expand.namespace_of(ids([9]), contexts, 0.9, 0.9)


# ---------------------------------------------------------------- warm items

WARM = expand.encode_warm(CharTokenizer(), ["one", "two\n"], LIMITS.window)
WARM_IDS = ids_of("onetwo\n")
WARMED = DEFAULTS._replace(warm=WARM)


def test_warm_items_are_tokenised_as_contexts_are() -> None:
    assert list(map(list, WARM)) == [ids_of("one"), ids_of("two\n")]


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, [BOS, *ids_of("\n\n"), *WARM_IDS]),
        ({"prefix": "x"}, [START, *ids_of("x")]),
        ({"prefix": ""}, [START]),
        ({"prefix_ids": [8, 9]}, [8, 9]),
        ({"prefix_ids": []}, []),
    ],
)
@pytest.mark.parametrize("door", [NATIVE, COMPLETIONS, ENGINE])
def test_warm_items_end_the_default_prefix_and_no_given_one(
    fields: dict[str, Any], prefix: list[int], door: Door
) -> None:
    entry = make_entry()._replace(defaults=WARMED)
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"], **fields}, entry, door)
    assert listed(obj.input_ids) == [*prefix, *ids_of("abq")]
    assert spec_in(obj.sampling_params).prefix_len == len(prefix)


def test_warm_items_end_the_prefix_of_the_server() -> None:
    entry = make_entry()._replace(defaults=WARMED._replace(prefix="x"))
    obj = apply(make_obj(text="q"), {"contexts": ["a", "b"]}, entry)
    assert listed(obj.input_ids) == [START, *ids_of("x"), *WARM_IDS, *ids_of("abq")]


def test_warm_items_end_what_a_template_puts_before_the_contexts() -> None:
    marker: Any = SimpleNamespace(split=lambda ids: (ids[:2], ids[3:]))
    entry = make_entry()._replace(marker=marker, defaults=WARMED)
    obj = apply(make_obj(input_ids=[5, 6, 99, 7]), {"contexts": ["a", "b"]}, entry, CHAT)
    assert listed(obj.input_ids) == [5, 6, *WARM_IDS, *ids_of("ab"), 7]


def test_a_prefix_is_never_changed_by_warm_items() -> None:
    prefix = ids([1, 2])
    assert list(expand.with_warm(prefix, WARMED)) == [1, 2, *WARM_IDS]
    assert prefix == ids([1, 2])
    assert expand.with_warm(prefix, DEFAULTS) == prefix


@pytest.mark.parametrize(
    ("tokenizer", "texts", "reason"),
    [
        (None, ["a"], "needs a tokenizer"),
        (CharTokenizer(), ["a", "\0"], "'\\x00' has no token"),
        (CharTokenizer(), ["a" * 60, "abcd"], "64 tokens; the model's window is 64"),
    ],
)
def test_warm_items_that_no_request_could_have_are_refused(
    tokenizer: Any, texts: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match="--ape-warm") as caught:
        expand.encode_warm(tokenizer, texts, LIMITS.window)
    assert reason in str(caught.value)


def test_without_warm_items_no_tokenizer_is_needed() -> None:
    assert expand.encode_warm(None, (), LIMITS.window) == ()


# ---------------------------------------------------------------- the hook


def never(*_: Any) -> None:
    """Stands where SGLang's ``generate_request`` is called."""


def make_manager(enable_ape: bool = True) -> SimpleNamespace:
    args = SimpleNamespace(enable_ape=enable_ape)
    return SimpleNamespace(server_args=args, ape_entry=make_entry())


@pytest.mark.parametrize("key", sorted(CUSTOM_PARAM_KEYS))
@pytest.mark.parametrize("as_list", [False, True])
def test_reserved_params_are_refused_in_every_request(key: str, as_list: bool) -> None:
    params: Any = {"custom_params": {key: 1}}
    obj = make_obj(text="q", sampling_params=[{}, params] if as_list else params)
    with pytest.raises(ApeRequestError) as caught:
        around_generate_request(never, make_manager(), obj)
    assert caught.value.param == "custom_params"
    assert key in str(caught.value)


def test_a_plain_request_passes_the_hook_untouched() -> None:
    obj = make_obj(text="q", sampling_params={"custom_params": {"mine": 1}})
    before = dict(vars(obj))
    around_generate_request(never, make_manager(), obj)
    assert vars(obj) == before


def test_a_server_without_ape_is_left_alone() -> None:
    obj = make_obj(text="q", sampling_params={"custom_params": {"ape_scale": 1}})
    around_generate_request(never, make_manager(enable_ape=False), obj)
    assert obj.sampling_params == {"custom_params": {"ape_scale": 1}}


def test_the_hook_applies_the_call_and_leaves_a_refusal_on_it() -> None:
    call = parse_call({"contexts": ["a", "b"]}, NATIVE)
    token = current_call.set(call)
    try:
        good = make_obj(text="q")
        around_generate_request(never, make_manager(), good)
        assert listed(good.input_ids) == [BOS, *ids_of("\n\nabq")]
        refused = make_obj(text="")
        with pytest.raises(ApeRequestError) as caught:
            around_generate_request(never, make_manager(), refused)
    finally:
        current_call.reset(token)
    assert call.error is caught.value
    assert (refused.is_single, refused.rid) == (False, [])  # SGLang finds nothing to abort
