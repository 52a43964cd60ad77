"""SGLang's own fields beside contexts: what would fail in the engine is refused by name before."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ape.entry.beside import (
    MAX_CHOICES,
    MAX_ITEMS,
    check_fields,
    check_lists,
    check_response_format,
    check_sampling,
    check_template_kwargs,
    to_json,
)
from sglang_ape.entry.call import CHAT, COMPLETIONS, NATIVE, Door
from sglang_ape.errors import ApeRequestError

VOCAB = 100


def param_of(check: Any, *given: Any) -> str | None:
    with pytest.raises(ApeRequestError) as caught:
        check(*given)
    assert caught.value.status_code == 400
    return caught.value.param


def test_a_good_body_goes_on_as_it_is() -> None:
    body = {"text": "é\n", "sampling_params": {"temperature": 0.5, "stop": ["a"]}, "rid": None}
    assert json.loads(to_json(body)) == body


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**70, "\ud800", [[2**70]], {"a": float("nan")}], ids=str
)
def test_what_not_every_parser_reads_is_refused_with_the_field(value: Any) -> None:
    assert param_of(to_json, {"text": "a", "other": value}) == "other"


def test_deep_nesting_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert param_of(to_json, {"other": deep}) == "other"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_new_tokens": None, "temperature": 0, "top_p": 1.0, "n": MAX_CHOICES},
        {"stop": "a", "stop_regex": ["a+", "b"], "logit_bias": {"5": -100.0}},
        {"stop": ["a", "b"], "sampling_seed": 2**62, "json_schema": "{}"},
    ],
    ids=str,
)
def test_sampling_parameters_of_the_declared_types_pass(params: dict[str, Any]) -> None:
    check_sampling(params, NATIVE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heat", 1),
        ("is_normalized", True),
        ("max_new_tokens", "5"),
        ("max_new_tokens", 2**40),
        ("temperature", "warm"),
        ("temperature", 1e300),
        ("stop", 7),
        ("stop_regex", "("),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", {"five": 1.0}),
    ],
)
def test_other_sampling_parameters_are_refused_by_name(name: str, value: Any) -> None:
    assert param_of(check_sampling, {name: value}, NATIVE) == f"sampling_params.{name}"


@pytest.mark.parametrize("door", [CHAT, COMPLETIONS])
def test_on_the_openai_routes_the_name_is_the_callers(door: Door) -> None:
    assert param_of(check_sampling, {"max_new_tokens": -(2**40)}, door) == "max_tokens"


@pytest.mark.parametrize("name", ["extra_key", "lora_path", "rid", "return_logprob"])
def test_a_list_needs_a_batch_of_its_length(name: str) -> None:
    call = SimpleNamespace(**{name: ["a", "b"]})
    check_fields(call, 2, True, VOCAB, NATIVE)
    assert param_of(check_fields, call, 3, True, VOCAB, NATIVE) == name
    assert param_of(check_fields, call, 1, False, VOCAB, NATIVE) == name


@pytest.mark.parametrize(
    ("door", "name"),
    [(NATIVE, "top_logprobs_num"), (COMPLETIONS, "logprobs"), (CHAT, "top_logprobs")],
)
def test_no_more_top_log_probabilities_than_tokens(door: Door, name: str) -> None:
    check_fields(SimpleNamespace(top_logprobs_num=VOCAB), 1, False, VOCAB, door)
    for number in (VOCAB + 1, -1):
        call = SimpleNamespace(top_logprobs_num=number)
        assert param_of(check_fields, call, 1, False, VOCAB, door) == name


@pytest.mark.parametrize("value", [{}, [], 0, "", False, {"positions": [0]}], ids=str)
def test_no_embeddings_are_overridden_not_even_none_of_them(value: Any) -> None:
    """SGLang's scheduler ends at any value that is not of its own type."""
    call = SimpleNamespace(positional_embed_overrides=value)
    name = "positional_embed_overrides"
    assert param_of(check_fields, call, 1, False, VOCAB, NATIVE) == name


@pytest.mark.parametrize(
    ("door", "name", "value"),
    [
        (NATIVE, "text", ["a", 5]),
        (NATIVE, "text", [5]),
        (NATIVE, "input_ids", ["a"]),
        (NATIVE, "input_ids", [5, True]),
        (NATIVE, "input_ids", [5, [6]]),
        (NATIVE, "input_ids", [[5], ["a"]]),
        (NATIVE, "input_ids", [[[5]]]),
        (COMPLETIONS, "prompt", ["a", [5]]),
        (COMPLETIONS, "prompt", [{"id": ""}] * 1_000_000),
        (COMPLETIONS, "stop", [{}] * 1_000_000),
        (CHAT, "messages", [{}] * (MAX_ITEMS + 1)),
        (NATIVE, "\ud800", [0] * (MAX_ITEMS + 1)),
    ],
)
def test_lists_that_would_have_an_error_for_each_item_are_refused(
    door: Door, name: str, value: Any
) -> None:
    shown = name.encode(errors="replace").decode()
    assert param_of(check_lists, {"rid": None, name: value}, 1, door) == shown


def test_lists_of_queries_and_what_comes_with_each_may_be_long() -> None:
    count = MAX_ITEMS + 1
    check_lists({"text": ["a"] * count, "rid": ["r"] * count}, count, NATIVE)
    check_lists({"input_ids": [[5]] * count, "stop": ["a"]}, count, NATIVE)
    check_lists({"input_ids": [5] * count}, 1, NATIVE)
    for prompt in ("a", ["a"] * count, [5] * count, [[5, 6], []]):
        check_lists({"prompt": prompt}, count, COMPLETIONS)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", "response_format"),
        ([], "response_format"),
        (True, "response_format"),
        ({"type": "json_schema", "schema": "a"}, "response_format.schema"),
        ({"type": "json_schema", "schema": {"properties": 1}}, "response_format.schema.properties"),
        (
            {"type": "json_schema", "schema": {"properties": {"strict": 1}}},
            "response_format.schema.properties.strict",
        ),
    ],
)
def test_what_sglang_reads_of_a_response_format_is_an_object(value: Any, param: str) -> None:
    assert param_of(check_response_format, value) == param


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        {"type": "json_schema", "schema": {"properties": {"strict": {"default": True}}}},
    ],
)
def test_other_response_formats_pass(value: Any) -> None:
    check_response_format(value)


def test_arguments_of_the_renderer_are_no_template_arguments() -> None:
    check_template_kwargs({"enable_thinking": False})
    check_template_kwargs(None)
    assert param_of(check_template_kwargs, {"tokenize": True}) == "chat_template_kwargs"
