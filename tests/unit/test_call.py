"""The APE fields of a call: what is taken, what is refused, and which field is named."""

import math
from array import array
from typing import Any

import numpy as np
import pytest

from sglang_ape.entry.call import CHAT, COMPLETIONS, ENGINE, NATIVE, ApeCall, Door, parse_call
from sglang_ape.errors import ApeRequestError

SURROGATE = "a\ud800b"
DOORS = [NATIVE, COMPLETIONS, CHAT, ENGINE]


def ids(*tokens: int) -> array:
    return array("I", tokens)


def parse(fields: dict[str, Any], door: Door = NATIVE) -> ApeCall:
    call = parse_call(fields, door)
    assert call is not None
    return call


def refusal(fields: dict[str, Any], door: Door = NATIVE) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        parse_call(fields, door)
    error = caught.value
    assert error.status_code == 400
    body = error.body()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == 400
    return error


def assert_refused(fields: dict[str, Any], param: str, door: Door = NATIVE) -> None:
    error = refusal(fields, door)
    assert error.param == param, f"{error.param}: {error}"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"text": "q"}, {"contexts": None}, {"contexts": None, "prefix": None, "ape": None}],
)
def test_a_call_without_ape_fields_is_plain(fields: dict[str, Any], door: Door) -> None:
    assert parse_call(fields, door) is None


@pytest.mark.parametrize("door", DOORS)
def test_strings_and_objects_are_contexts(door: Door) -> None:
    contexts = ["one", {"text": "two"}, {"input_ids": [3, 4]}]
    call = parse({"contexts": contexts}, door)
    assert (call.batched, call.door, call.error) == (False, door, None)
    (item,) = call.items
    assert item.contexts == ["one", "two", ids(3, 4)]
    assert (item.prefix, item.at) == (None, "")


def test_null_means_not_given() -> None:
    call = parse({"contexts": ["a"], "prefix": None, "prefix_ids": None, "ape": None})
    assert call.items[0].prefix is None
    assert call.items[0].options.temperature is None
    options = {"temperature": None, "scale": None}
    assert parse({"contexts": ["a"], "ape": options}).items[0].options.scale is None


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"prefix": "P"}, "P"),
        ({"prefix": ""}, ""),
        ({"prefix_ids": [1, 2]}, ids(1, 2)),
        ({"prefix_ids": []}, ids()),
    ],
)
def test_the_prefix_is_a_text_or_ids_and_may_be_empty(fields: dict[str, Any], prefix: Any) -> None:
    assert parse({"contexts": ["a"], **fields}).items[0].prefix == prefix


@pytest.mark.parametrize("temperature", [1, 1.0, 0.1, 10, 1e-3])
@pytest.mark.parametrize("scale", [0, 0.0, 0.9, 10.0])
def test_numbers_in_range_are_taken(temperature: float, scale: float) -> None:
    options = parse({"contexts": ["a"], "ape": {"temperature": temperature, "scale": scale}})
    assert options.items[0].options.temperature == temperature
    assert options.items[0].options.scale == scale


def test_soft_and_refine_may_be_given_as_off() -> None:
    parse({"contexts": ["a"], "ape": {"soft": 0, "refine": 0}})
    parse({"contexts": ["a"], "ape": {"soft": 0.0}})
    for nothing in ({}, {"soft": None, "refine": None}):
        options = parse({"contexts": ["a"], "ape": nothing}).items[0].options
        assert (options.soft, options.refine) == (None, None), "the server's default holds"


@pytest.mark.parametrize("value", ["text", {"text": "a"}, 3, True, 1.5])
def test_contexts_that_are_no_list_are_refused(value: Any) -> None:
    assert_refused({"contexts": value}, "contexts")


def test_an_empty_list_of_contexts_is_refused() -> None:
    assert_refused({"contexts": []}, "contexts")


@pytest.mark.parametrize(
    ("context", "param"),
    [
        ("", "contexts[1]"),
        (None, "contexts[1]"),
        (7, "contexts[1]"),
        (True, "contexts[1]"),
        (1.5, "contexts[1]"),
        ([1, 2], "contexts[1]"),
        ({}, "contexts[1]"),
        ({"txt": "a"}, "contexts[1]"),
        ({"text": "a", "extra": 1}, "contexts[1]"),
        ({"text": "a", "input_ids": [1]}, "contexts[1]"),
        ({"text": ""}, "contexts[1].text"),
        ({"text": None}, "contexts[1].text"),
        ({"text": 5}, "contexts[1].text"),
        ({"text": ["a"]}, "contexts[1].text"),
        ({"input_ids": []}, "contexts[1].input_ids"),
        ({"input_ids": None}, "contexts[1].input_ids"),
        ({"input_ids": "12"}, "contexts[1].input_ids"),
        ({"input_ids": 12}, "contexts[1].input_ids"),
        ({"input_ids": [1, "2"]}, "contexts[1].input_ids"),
        ({"input_ids": [1, 2.0]}, "contexts[1].input_ids"),
        ({"input_ids": [1, True]}, "contexts[1].input_ids"),
        ({"input_ids": [1, None]}, "contexts[1].input_ids"),
        ({"input_ids": [[1]]}, "contexts[1].input_ids"),
        ({"id": 5}, "contexts[1].id"),
        (SURROGATE, "contexts[1]"),
        ({"text": SURROGATE}, "contexts[1].text"),
        ({"id": SURROGATE}, "contexts[1].id"),
        ({SURROGATE: 1}, "contexts[1]"),
    ],
)
def test_a_malformed_context_is_named(context: Any, param: str) -> None:
    assert_refused({"contexts": ["fine", context]}, param)
    batched = param.replace("contexts", "contexts[1]")
    assert_refused({"contexts": [["fine"], ["fine", context]]}, batched)


def test_keys_of_several_types_are_refused_too() -> None:
    """Only ``Engine`` callers can give them; JSON cannot."""
    assert_refused({"contexts": [{"text": "a", 1: "b"}]}, "contexts[0]", ENGINE)


@pytest.mark.parametrize("contexts", [[""], [None], [7]])
def test_the_first_context_is_checked_like_the_others(contexts: list[Any]) -> None:
    assert_refused({"contexts": contexts}, "contexts[0]")


WRONG_IDS = [
    ([True, 70000], "bool"),
    ([70000, False], "bool"),
    ([1, True], "bool"),
    ([0, False, 2**32 - 1], "bool"),
    ([70000, np.True_], "bool"),
    ([5, 6.0], "float"),
    ([5, math.nan], "float"),
    ([5, "6"], "str"),
    (["5", 6], "str"),
    ([5, None], "null"),
    ([5, [6]], "list"),
    ([5, {"id": 6}], "dict"),
]


@pytest.mark.parametrize(("wrong", "kind"), WRONG_IDS)
def test_ids_that_are_no_integers_are_refused_with_their_type(wrong: list[Any], kind: str) -> None:
    error = refusal({"contexts": ["a", {"input_ids": wrong}]})
    assert error.param == "contexts[1].input_ids"
    assert str(error) == f"contexts[1].input_ids must hold integers only, got {kind}"
    error = refusal({"contexts": ["a"], "prefix_ids": wrong})
    assert error.param == "prefix_ids"
    assert str(error) == f"prefix_ids must hold integers only, got {kind}"


@pytest.mark.parametrize("token", [-1, 2**32, 10**18, -(10**18)])
def test_an_id_outside_any_vocabulary_is_named(token: int) -> None:
    error = refusal({"contexts": ["a", {"input_ids": [5, token]}]})
    assert error.param == "contexts[1].input_ids"
    assert str(error) == f"contexts[1].input_ids holds token id {token}, outside any vocabulary"
    error = refusal({"contexts": ["a"], "prefix_ids": [token, 5]})
    assert error.param == "prefix_ids"
    assert str(error) == f"prefix_ids holds token id {token}, outside any vocabulary"


@pytest.mark.parametrize("token", [10**30, -(10**30), pytest.param(10**5000, id="5001 digits")])
def test_an_id_too_long_to_print_is_refused_too(token: int) -> None:
    assert_refused({"contexts": ["a", {"input_ids": [5, token]}]}, "contexts[1].input_ids")
    assert_refused({"contexts": ["a"], "prefix_ids": [token, 5]}, "prefix_ids")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_numpy_integers_are_ids(dtype: type[np.integer]) -> None:
    """Only ``Engine`` callers can give them."""
    given = [dtype(0), dtype(1), dtype(70)]
    call = parse({"contexts": [{"input_ids": given}], "prefix_ids": given}, ENGINE)
    assert call.items[0].contexts == [ids(0, 1, 70)]
    assert call.items[0].prefix == ids(0, 1, 70)


def test_ids_become_an_array_of_32_bits_and_the_callers_list_stays_a_list() -> None:
    """What is hashed and looked at as ``np.uint32`` must be exactly that."""
    given = [0, 1, 2**32 - 1]
    call = parse({"contexts": [{"input_ids": given}, {"input_ids": (3,)}], "prefix_ids": given})
    item = call.items[0]
    assert [*item.contexts, item.prefix] == [ids(*given), ids(3), ids(*given)]
    assert {own.typecode for own in (*item.contexts, item.prefix)} == {"I"}
    assert given == [0, 1, 2**32 - 1]


@pytest.mark.parametrize("own", ["text", {"text": "a"}, None, 3, []])
def test_a_batch_entry_that_is_no_list_is_refused(own: Any) -> None:
    assert_refused({"contexts": [["a"], own]}, "contexts[1]")


def test_an_empty_first_batch_entry_is_refused() -> None:
    assert_refused({"contexts": [[], ["a"]]}, "contexts[0]")


def test_token_ids_given_as_bare_lists_are_refused() -> None:
    assert_refused({"contexts": [[1, 2], [3]]}, "contexts[0][0]")


BAD_NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.001, 10.001, 11, "1", True, False, [1], {}]


@pytest.mark.parametrize("value", [0, 0.0, -0.0, *BAD_NUMBERS])
def test_a_temperature_outside_the_range_is_refused(value: Any) -> None:
    assert_refused({"contexts": ["a"], "ape": {"temperature": value}}, "ape.temperature")


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_scale_outside_the_range_is_refused(value: Any) -> None:
    assert_refused({"contexts": ["a"], "ape": {"scale": value}}, "ape.scale")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, -0.1, "0", True])
def test_soft_that_is_no_number_from_zero_on_is_refused(value: Any) -> None:
    assert_refused({"contexts": ["a"], "ape": {"soft": value}}, "ape.soft")


@pytest.mark.parametrize("value", [-1, 0.5, "0", True, math.nan])
def test_refine_that_is_no_whole_number_from_zero_on_is_refused(value: Any) -> None:
    assert_refused({"contexts": ["a"], "ape": {"refine": value}}, "ape.refine")


def test_soft_and_refine_together_are_refused() -> None:
    assert_refused({"contexts": ["a"], "ape": {"soft": 0.1, "refine": 1}}, "ape.soft")
    parse({"contexts": ["a"], "ape": {"soft": 0.1, "refine": 0}})


def test_an_unknown_key_in_ape_is_named() -> None:
    assert_refused({"contexts": ["a"], "ape": {"temprature": 1}}, "ape.temprature")


def test_a_surrogate_in_a_key_of_ape_gives_an_answer_that_can_be_sent() -> None:
    error = refusal({"contexts": ["a"], "ape": {SURROGATE: 1}})
    str(error).encode()
    str(error.param).encode()


@pytest.mark.parametrize("value", ["0.9", 0.9, [], ["a"], True])
def test_ape_that_is_no_object_is_refused(value: Any) -> None:
    assert_refused({"contexts": ["a"], "ape": value}, "ape")


def test_a_deeply_nested_value_is_refused_like_any_other() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert_refused({"contexts": ["a"], "ape": {"temperature": deep}}, "ape.temperature")
    assert_refused({"contexts": [{"id": deep}]}, "contexts[0].id")


def test_the_offending_value_is_shown_cut_short() -> None:
    error = refusal({"contexts": ["a"], "ape": {"temperature": "x" * 10_000}})
    assert "xxx" in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("name", ["prefix", "prefix_ids", "ape"])
def test_a_field_without_contexts_is_refused(name: str) -> None:
    value = {"prefix": "P", "prefix_ids": [1], "ape": {"temperature": 0.9}}[name]
    assert_refused({name: value}, name)
    assert_refused({name: value, "contexts": None}, name)


def test_both_forms_of_the_prefix_are_refused() -> None:
    error = refusal({"contexts": ["a"], "prefix": "P", "prefix_ids": [1]})
    assert error.param in ("prefix", "prefix_ids")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prefix": 3}, "prefix"),
        ({"prefix": ["P"]}, "prefix"),
        ({"prefix": {"text": "P"}}, "prefix"),
        ({"prefix": True}, "prefix"),
        ({"prefix": SURROGATE}, "prefix"),
        ({"prefix_ids": "P"}, "prefix_ids"),
        ({"prefix_ids": 3}, "prefix_ids"),
        ({"prefix_ids": [1, "2"]}, "prefix_ids"),
        ({"prefix_ids": [1, True]}, "prefix_ids"),
        ({"prefix_ids": [1.0]}, "prefix_ids"),
        ({"prefix_ids": {"input_ids": [1]}}, "prefix_ids"),
    ],
)
def test_a_malformed_prefix_is_named(fields: dict[str, Any], param: str) -> None:
    assert_refused({"contexts": ["a"], **fields}, param)


@pytest.mark.parametrize("fields", [{"prefix": "P"}, {"prefix_ids": [1]}, {"prefix": ""}])
def test_a_chat_takes_its_prefix_from_the_messages(fields: dict[str, Any]) -> None:
    (name,) = fields
    assert_refused({"contexts": ["a"], **fields}, name, CHAT)


def test_a_batch_has_one_item_a_request() -> None:
    call = parse({"contexts": [["a"], ["b", {"input_ids": [1]}]]})
    assert call.batched
    assert [(item.contexts, item.at) for item in call.items] == [
        (["a"], "[0]"),
        (["b", ids(1)], "[1]"),
    ]


@pytest.mark.parametrize(
    ("fields", "door"),
    [
        ({"text": "q", "contexts": [["a"]]}, NATIVE),
        ({"text": "q", "contexts": [["a"], ["b"]]}, NATIVE),
        ({"text": ["q", "r"], "contexts": ["a"]}, NATIVE),
        ({"text": ["q", "r"], "contexts": [["a"]]}, NATIVE),
        ({"input_ids": [1, 2], "contexts": [["a"], ["b"]]}, NATIVE),
        ({"input_ids": [[1], [2]], "contexts": [["a"], ["b"], ["c"]]}, NATIVE),
        ({"prompt": [1, 2, 3], "contexts": [["a"]]}, COMPLETIONS),
        ({"prompt": ["q", "r"], "contexts": ["a", "b"]}, COMPLETIONS),
        ({"messages": [{"role": "user", "content": "q"}], "contexts": [["a"]]}, CHAT),
    ],
)
def test_queries_and_lists_of_contexts_are_as_many(fields: dict[str, Any], door: Door) -> None:
    assert_refused(fields, "contexts", door)


@pytest.mark.parametrize(
    ("fields", "door"),
    [
        ({"text": ["q", "r"], "contexts": [["a"], ["b"]]}, NATIVE),
        ({"text": ["q"], "contexts": ["a"]}, NATIVE),
        ({"input_ids": [1, 2], "contexts": ["a", "b", "c"]}, NATIVE),
        ({"prompt": [[1], [2, 3]], "contexts": [["a"], ["b"]]}, COMPLETIONS),
        ({"messages": ["q", "r"], "contexts": ["a"]}, CHAT),  # refused by its own name later
    ],
)
def test_as_many_lists_as_queries_are_taken(fields: dict[str, Any], door: Door) -> None:
    parse(fields, door)


def test_a_batch_of_the_wrong_length_is_refused_before_its_contexts_are_looked_at() -> None:
    error = refusal({"text": ["q", "r"], "contexts": [[7]] * 1_000_000})
    assert str(error) == "text needs 2 lists of contexts, got 1000000 lists"
    assert error.param == "contexts"


def test_one_prefix_and_one_ape_hold_for_the_whole_batch() -> None:
    fields = {"contexts": [["a"], ["b"]], "prefix": "P", "ape": {"scale": 0.5}}
    for item in parse(fields).items:
        assert (item.prefix, item.options.scale) == ("P", 0.5)
    shared_ids = parse({"contexts": [["a"], ["b"]], "prefix_ids": [7, 8]})
    assert [item.prefix for item in shared_ids.items] == [ids(7, 8), ids(7, 8)]


def test_a_list_of_prefixes_or_options_has_one_for_each_request() -> None:
    contexts = [["a"], ["b"]]
    call = parse({"contexts": contexts, "prefix": ["P", "R"], "ape": [{"scale": 0.1}, {}]})
    assert [item.prefix for item in call.items] == ["P", "R"]
    assert [item.options.scale for item in call.items] == [0.1, None]
    call = parse({"contexts": contexts, "prefix_ids": [[1], []]})
    assert [item.prefix for item in call.items] == [ids(1), ids()]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prefix": ["P"]}, "prefix"),
        ({"prefix_ids": [[1]]}, "prefix_ids"),
        ({"ape": [{}]}, "ape"),
        ({"prefix": ["P", "R", "S"]}, "prefix"),
        ({"prefix_ids": [[1], [2], [3]]}, "prefix_ids"),
        ({"ape": [{}, {}, {}]}, "ape"),
    ],
)
def test_a_batch_list_of_the_wrong_length_is_refused(fields: dict[str, Any], param: str) -> None:
    assert_refused({"contexts": [["a"], ["b"]], **fields}, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prefix": ["P", 3]}, "prefix[1]"),
        ({"prefix": ["P", SURROGATE]}, "prefix[1]"),
        ({"prefix_ids": [[1], ["2"]]}, "prefix_ids[1]"),
        ({"prefix_ids": [[1], 2]}, "prefix_ids[1]"),
        ({"prefix_ids": [[1], [70000, True]]}, "prefix_ids[1]"),
        ({"prefix_ids": [[1], [-1]]}, "prefix_ids[1]"),
        ({"ape": [{}, {"scale": -1}]}, "ape[1].scale"),
        ({"ape": [{}, {"bogus": 1}]}, "ape[1].bogus"),
        ({"ape": [{}, 5]}, "ape[1]"),
        ({"ape": [{}, {"soft": -1.0}]}, "ape[1].soft"),
        ({"ape": [{}, {"soft": 1.0, "refine": 1}]}, "ape[1].soft"),
    ],
)
def test_the_batch_entry_to_blame_is_named(fields: dict[str, Any], param: str) -> None:
    assert_refused({"contexts": [["a"], ["b"]], **fields}, param)
