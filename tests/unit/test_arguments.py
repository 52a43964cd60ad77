"""The server's flags: defaults, and what is refused at start-up."""

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ape import compat
from sglang_ape.arguments import (
    FLAGS,
    apply_defaults,
    flag_name,
    refuse_combinations,
    refuse_model,
    warm_items,
    warn_of_profile,
)
from sglang_ape.limits import POOL_MARGIN, Limits, pin_cap

TORCH = "torch_native"

# A value that a user could give, for each field that cannot be combined with APE.
REFUSED = {
    "page_size": 16,
    "attention_backend": "flashmla",
    "radix_cache_backend": "another",
    "enable_hierarchical_cache": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "enable_hisparse": True,
    "enable_session_radix_cache": True,
    "enable_streaming_session": True,
    "speculative_algorithm": "EAGLE",
    "dllm_algorithm": "LowConfidence",
    "disaggregation_mode": "prefill",
    "enable_pdmux": True,
    "enable_two_batch_overlap": True,
    "encoder_only": True,
    "language_only": True,
    "is_embedding": True,
    "pp_size": 2,
    "dp_size": 2,
    "enable_dp_attention": True,
    "dcp_size": 2,
    "attn_cp_size": 2,
    "enable_prefill_cp": True,
    "tokenizer_worker_num": 2,
    "enable_tokenizer_batch_encode": True,
    "enable_http2": True,
    "enable_torch_compile": True,
    "kv_canary": "full",
    "grpc_port": 50051,
    "grpc_mode": True,
    "smg_grpc_mode": True,
    "use_ray": True,
}
# The same for each attention backend, beside the above.
REFUSED_BY_BACKEND = {
    "flashinfer": {
        "kv_cache_dtype": "fp4_e2m1",
        "enable_deterministic_inference": True,
        "cuda_graph_backend_prefill": "full",
        "prefill_attention_backend": "torch_native",
        "decode_attention_backend": "fa3",
    },
    "torch_native": {
        "kv_cache_dtype": "fp8_e5m2",
        "prefill_attention_backend": "flashinfer",
        "decode_attention_backend": "flashmla",
    },
}
ENVIRONMENT = (
    "SGLANG_RUST_SERVER",
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE",
)


def stock_defaults() -> dict[str, Any]:
    """What ``ServerArgs`` holds before SGLang resolves it, without making one."""
    from sglang.srt.server_args import ServerArgs

    values = {}
    for field in dataclasses.fields(ServerArgs):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return values


def server_args(**given: Any) -> SimpleNamespace:
    ours = {flag.name: flag.default for flag in FLAGS}
    return SimpleNamespace(**{**stock_defaults(), **ours, "enable_ape": True, **given})


def refusal(check: Any, *subject: Any) -> str:
    with pytest.raises(ValueError) as caught:
        check(*subject)
    return str(caught.value)


# ---------------------------------------------------------------- defaults and ranges


def test_the_flags_and_their_defaults_are_those_of_the_contract() -> None:
    assert {flag.name: flag.default for flag in FLAGS} == {
        "enable_ape": False,
        "ape_profile": None,
        "ape_temperature": None,
        "ape_scale": None,
        "ape_soft": None,
        "ape_refine": None,
        "ape_scorer": "likelihood",
        "ape_prefix": None,
        "ape_warm": None,
        "ape_max_context_tokens": None,
        "ape_max_contexts": 16_384,
        "ape_max_body_bytes": 67_108_864,
        "ape_max_pinned_tokens": None,
        "ape_store_max_tokens": 16_777_216,
        "ape_disable_shared_reads": False,
    }


def test_ape_sets_what_it_needs() -> None:
    args = server_args()
    apply_defaults(args)
    assert (args.page_size, args.radix_cache_backend) == (1, "ape")
    assert args.attention_backend is not None
    assert (args.ape_temperature, args.ape_scale) == (0.9, 0.9)


def test_applying_twice_changes_nothing_more() -> None:
    args = server_args()
    apply_defaults(args)
    once = dict(vars(args))
    apply_defaults(args)
    assert vars(args) == once


def test_without_ape_nothing_is_changed() -> None:
    args = server_args(enable_ape=False, page_size=64, attention_backend="fa3")
    before = dict(vars(args))
    apply_defaults(args)
    assert vars(args) == before


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("ape_profile", "profile.json", "--ape-profile"),
        ("ape_prefix", "", "--ape-prefix"),
        ("ape_temperature", 0.9, "--ape-temperature"),
        ("ape_scale", 1.0, "--ape-scale"),
        ("ape_soft", 0.0, "--ape-soft"),
        ("ape_refine", 2, "--ape-refine"),
        ("ape_scorer", "attention", "--ape-scorer"),
        ("ape_warm", "", "--ape-warm"),
        ("ape_max_context_tokens", 10, "--ape-max-context-tokens"),
        ("ape_max_pinned_tokens", 0, "--ape-max-pinned-tokens"),
        ("ape_store_max_tokens", 10, "--ape-store-max-tokens"),
    ],
)
def test_our_flags_have_no_effect_without_enable_ape_and_say_so(
    field: str, value: Any, flag: str
) -> None:
    message = refusal(apply_defaults, server_args(enable_ape=False, **{field: value}))
    assert flag in message
    assert "--enable-ape" in message


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 10.1, float("nan"), float("inf")])
def test_a_temperature_outside_the_range_is_refused(value: float) -> None:
    message = refusal(apply_defaults, server_args(ape_temperature=value))
    assert "--ape-temperature" in message
    assert str(value) in message


@pytest.mark.parametrize("value", [-0.1, 10.1, float("nan"), float("inf"), float("-inf")])
def test_a_scale_outside_the_range_is_refused(value: float) -> None:
    message = refusal(apply_defaults, server_args(ape_scale=value))
    assert "--ape-scale" in message
    assert str(value) in message


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), float("-inf")])
def test_a_soft_weight_that_is_negative_or_not_finite_is_refused(value: float) -> None:
    message = refusal(apply_defaults, server_args(ape_soft=value))
    assert "--ape-soft" in message
    assert str(value) in message


@pytest.mark.parametrize("value", [-1, 1.5, float("nan")])
def test_refine_other_than_a_count_is_refused(value: float) -> None:
    message = refusal(apply_defaults, server_args(ape_refine=value))
    assert "--ape-refine" in message
    assert str(value) in message


def test_soft_and_refine_are_off_unless_given() -> None:
    args = server_args()
    apply_defaults(args)
    assert (args.ape_soft, args.ape_refine) == (0, 0)
    for flags in ({"ape_soft": 0.3, "ape_refine": 0}, {"ape_soft": 0.0, "ape_refine": 2}):
        args = server_args(**flags)
        apply_defaults(args)
        assert flags.items() <= vars(args).items()


def test_an_unknown_scorer_is_refused() -> None:
    message = refusal(apply_defaults, server_args(ape_scorer="bm25"))
    assert "--ape-scorer must be likelihood or attention, got bm25" in message


def test_the_attention_scorer_is_refused_where_there_is_no_text_of_a_null_query() -> None:
    args = {"ape_scorer": "attention", "skip_tokenizer_init": True}
    message = refusal(apply_defaults, server_args(**args))
    assert "--ape-scorer attention cannot be combined with --skip-tokenizer-init: " in message
    apply_defaults(server_args(**{**args, "ape_scorer": "likelihood"}))


def test_soft_and_refine_together_are_refused_with_both_names() -> None:
    message = refusal(apply_defaults, server_args(ape_soft=0.3, ape_refine=2))
    assert "--ape-soft 0.3" in message
    assert "--ape-refine 2" in message


@pytest.mark.parametrize(
    "field",
    ["ape_max_context_tokens", "ape_store_max_tokens", "ape_max_contexts", "ape_max_body_bytes"],
)
@pytest.mark.parametrize("value", [0, -5])
def test_a_token_limit_that_is_not_positive_is_refused(field: str, value: int) -> None:
    message = refusal(apply_defaults, server_args(**{field: value}))
    assert flag_name(field) in message
    assert str(value) in message


def test_pins_may_be_forbidden_but_not_be_negative() -> None:
    apply_defaults(server_args(ape_max_pinned_tokens=0))
    message = refusal(apply_defaults, server_args(ape_max_pinned_tokens=-1))
    assert "--ape-max-pinned-tokens" in message
    assert "-1" in message


@pytest.mark.parametrize(("temperature", "scale"), [(10, 10), (0.01, 0), (1, 1.0)])
def test_the_ends_of_the_ranges_are_taken(temperature: float, scale: float) -> None:
    apply_defaults(server_args(ape_temperature=temperature, ape_scale=scale))


# ---------------------------------------------------------------- the profile

FIELDS = ("temperature", "scale", "prefix")


def profile_file(folder: Path, **given: Any) -> str:
    path = folder / "profile.json"
    fields = {"version": 1, "model": "m", "temperature": 0.4, "scale": 0.7, "prefix": "Notes:\n"}
    path.write_text(json.dumps({**fields, **given}))
    return str(path)


def resolved(args: SimpleNamespace) -> list[Any]:
    return [getattr(args, f"ape_{name}") for name in FIELDS]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [0.4, 0.7, "Notes:\n"]),
        ({"ape_temperature": 0.9}, [0.9, 0.7, "Notes:\n"]),
        ({"ape_scale": 0.0}, [0.4, 0.0, "Notes:\n"]),
        ({"ape_prefix": ""}, [0.4, 0.7, ""]),
        ({"ape_temperature": 1, "ape_scale": 1, "ape_prefix": "P"}, [1, 1, "P"]),
    ],
)
def test_a_flag_goes_before_the_profile_and_the_profile_before_the_default(
    tmp_path: Path, flags: dict[str, Any], expected: list[Any]
) -> None:
    args = server_args(ape_profile=profile_file(tmp_path), **flags)
    for _ in range(2):
        apply_defaults(args)
        assert resolved(args) == expected


@pytest.mark.parametrize(
    ("profile", "flags", "expected"),
    [
        ({}, {}, [0, 0]),
        ({"soft": 0.3}, {}, [0.3, 0]),
        ({"refine": 2}, {}, [0, 2]),
        ({"soft": 0.3}, {"ape_soft": 0.0}, [0, 0]),
        ({"soft": 0.3}, {"ape_soft": 0.1}, [0.1, 0]),
        ({"soft": 0.3}, {"ape_soft": 0.0, "ape_refine": 1}, [0, 1]),
    ],
)
def test_soft_and_refine_come_from_the_flag_or_else_the_profile(
    tmp_path: Path, profile: dict[str, Any], flags: dict[str, Any], expected: list[float]
) -> None:
    args = server_args(ape_profile=profile_file(tmp_path, **profile), **flags)
    for _ in range(2):
        apply_defaults(args)
        assert [args.ape_soft, args.ape_refine] == expected


def test_refine_of_a_flag_beside_soft_of_the_profile_is_refused(tmp_path: Path) -> None:
    args = server_args(ape_profile=profile_file(tmp_path, soft=0.3), ape_refine=2)
    message = refusal(apply_defaults, args)
    assert "--ape-soft" in message and "--ape-refine" in message


def test_a_profile_without_a_prefix_leaves_the_default_one(tmp_path: Path) -> None:
    args = server_args(ape_profile=profile_file(tmp_path, prefix=None))
    apply_defaults(args)
    assert resolved(args) == [0.4, 0.7, None]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "version: Field required"),
        ('{"version": 2, "model": "m", "temperature": 1, "scale": 1}', "version"),
        ('{"version": 1, "model": "m", "temperature": 0, "scale": 1}', "temperature"),
        ('{"version": 1, "model": "m", "temperature": "1", "scale": 1}', "temperature"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 11}', "scale"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 1, "softer": 1}', "softer"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 1, "soft": -1}', "soft"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 1, "refine": 1.5}', "refine"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 1, "warm": "a"}', "warm"),
        ('{"version": 1, "model": "m", "temperature": 1, "scale": 1, "warm": [""]}', "warm.0"),
        ('{"version": 1, "temperature": 1, "scale": 1}', "model: Field required"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_flag_and_reason(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    message = refusal(apply_defaults, server_args(ape_profile=str(path)))
    assert message.startswith("--ape-profile: ")
    assert str(path) in message and reason in message


@pytest.mark.parametrize(
    ("model", "served", "warned"),
    [
        ("/models/m", None, False),
        ("/models/m/", None, False),
        ("org/m", "tiny", False),
        ("/models/other", "m", False),
        ("/models/other", None, True),
        ("/models/m/weights", "tiny", True),
    ],
)
def test_a_profile_of_another_model_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model: str,
    served: str | None,
    warned: bool,
) -> None:
    path = profile_file(tmp_path)
    warn_of_profile(server_args(ape_profile=path, model_path=model, served_model_name=served))
    assert bool(caplog.records) == warned
    assert all(path in one.message and model in one.message for one in caplog.records)


# ---------------------------------------------------------------- warm items


@pytest.mark.parametrize(
    ("content", "items"),
    [
        ('"one"\n{"text": "two"}\n', ("one", "two")),
        ('"one\\n"\r\n\n  \n"two\\u2028"', ("one\n", "two\u2028")),
    ],
)
def test_warm_items_are_strings_or_objects_with_a_text(
    tmp_path: Path, content: str, items: tuple[str, ...]
) -> None:
    path = tmp_path / "warm.jsonl"
    path.write_text(content)
    args = server_args(ape_warm=str(path))
    apply_defaults(args)
    assert warm_items(args) == items
    assert args.ape_warm == str(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("\n\n", "holds no item"),
        ('"one"\n{', "line 2: not JSON"),
        ('"one"\n\n""', "line 3: is empty"),
        ('{"text": ""}', "line 1: is empty"),
        ("7", "line 1: must be a string"),
        ('{"text": 7}', "line 1: must be a string"),
        ('{"text": "one", "id": 1}', "line 1: an object must have the key 'text' and no other"),
        ('{"input_ids": [1]}', "line 1: an object must have the key 'text' and no other"),
        ('"\\ud800"', "line 1: not JSON"),
    ],
)
def test_a_file_without_warm_items_is_refused_with_flag_file_and_line(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "warm.jsonl"
    if content is not None:
        path.write_text(content)
    message = refusal(apply_defaults, server_args(ape_warm=str(path)))
    assert message.startswith(f"--ape-warm: {path}")
    assert reason in message


def test_warm_items_of_the_profile_hold_unless_a_flag_is_given(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, warm=["one\n", "two\n"])
    own = tmp_path / "warm.jsonl"
    own.write_text('"mine"')
    assert warm_items(server_args(ape_profile=profile)) == ("one\n", "two\n")
    assert warm_items(server_args(ape_profile=profile, ape_warm=str(own))) == ("mine",)
    assert warm_items(server_args(ape_profile=profile, ape_warm="")) == ()
    assert warm_items(server_args()) == ()


# ---------------------------------------------------------------- how much may be pinned


def limits_of(pool_tokens: int, window: int) -> Limits:
    return Limits(window, context_tokens=window, pool_tokens=pool_tokens, vocab_size=100)


@given(pool=st.integers(1, 5000), window=st.integers(1, 5000), data=st.data())
def test_beside_the_default_of_pins_every_plain_request_still_fits(
    pool: int, window: int, data: st.DataObject
) -> None:
    limits = limits_of(pool, window)
    cap = pin_cap(None, pool, window)
    assert 0 <= cap <= pool // 2
    if window > limits.usable_pool_tokens:
        assert cap == 0, "not even without pins would there be room"
        return
    tokens = data.draw(st.integers(1, window))
    new = data.draw(st.none() | st.integers(0, 2 * window))
    assert tokens + limits.new_tokens(tokens, new) <= limits.room_beside(cap)


def test_the_default_of_pins_is_half_of_a_large_pool() -> None:
    assert pin_cap(None, 1000, 100) == 500
    assert pin_cap(None, 1000, 600) == 1000 - 600 - POOL_MARGIN


def test_a_given_number_of_pins_is_taken_as_it_is() -> None:
    most = 1000 - POOL_MARGIN - 1
    assert [pin_cap(given, 1000, 900) for given in (0, 1, 500, most)] == [0, 1, 500, most]


@pytest.mark.parametrize("given", [1000 - POOL_MARGIN, 2000])
def test_pins_that_leave_nothing_of_the_pool_are_refused_with_the_numbers(given: int) -> None:
    message = refusal(pin_cap, given, 1000, 100)
    assert f"--ape-max-pinned-tokens {given}" in message
    assert "1000" in message


def test_an_answer_ends_at_the_window() -> None:
    limits = limits_of(1000, 100)
    assert [limits.new_tokens(90, wanted) for wanted in (None, 4, 40)] == [10, 4, 10]
    assert limits.new_tokens(120, None) == 0


# ---------------------------------------------------------------- combinations


def test_stock_defaults_can_be_combined_with_ape() -> None:
    refuse_combinations(server_args())


def test_every_restricted_field_has_a_case_here() -> None:
    from sglang_ape.arguments import _RESTRICTED, _RESTRICTED_BY_BACKEND

    assert {restricted.field for restricted in _RESTRICTED} == set(REFUSED)
    for backend, fields in REFUSED_BY_BACKEND.items():
        of_backend = {restricted.field for restricted in _RESTRICTED_BY_BACKEND[backend]}
        assert of_backend == {name for name in fields if "attention_backend" not in name}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("check", [refuse_combinations, apply_defaults])
def test_a_combination_that_cannot_work_is_refused_by_its_flag(check: Any, field: str) -> None:
    assert_refused(check, field, REFUSED[field])


@pytest.mark.parametrize(
    ("backend", "field"),
    [(backend, field) for backend, fields in REFUSED_BY_BACKEND.items() for field in fields],
)
@pytest.mark.parametrize("check", [refuse_combinations, apply_defaults])
def test_what_one_backend_cannot_do_is_refused_by_its_flag(
    check: Any, backend: str, field: str
) -> None:
    value = REFUSED_BY_BACKEND[backend][field]
    assert_refused(check, field, value, attention_backend=backend)


def assert_refused(check: Any, field: str, value: Any, **others: Any) -> None:
    message = refusal(check, server_args(**{field: value}, **others))
    words = message.replace(":", " ").split()
    assert "--enable-ape" in words
    assert flag_name(field) in words
    assert value is True or str(value) in words
    assert "True" not in message


def test_every_flag_named_in_a_refusal_exists() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    fields = {*REFUSED, *(name for some in REFUSED_BY_BACKEND.values() for name in some)}
    assert [flag_name(field) for field in fields if flag_name(field) not in known] == []


@pytest.mark.parametrize("field", ["kv_cache_dtype"])
@pytest.mark.parametrize("value", ["auto", "bf16", "bfloat16"])
def test_unquantised_kv_is_taken(field: str, value: str) -> None:
    refuse_combinations(server_args(**{field: value}))


@pytest.mark.parametrize("value", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_kv_is_taken_by_flashinfer(value: str) -> None:
    refuse_combinations(server_args(attention_backend="flashinfer", kv_cache_dtype=value))


@pytest.mark.parametrize(
    ("device", "on_gpu", "backend"),
    [
        (None, True, "flashinfer"),
        ("cuda", True, "flashinfer"),
        ("cpu", True, "torch_native"),
        (None, False, "torch_native"),
    ],
)
def test_the_attention_backend_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str | None, on_gpu: bool, backend: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    args = server_args(device=device)
    apply_defaults(args)
    assert args.attention_backend == backend


def test_what_ape_sets_itself_is_taken() -> None:
    refuse_combinations(server_args(page_size=1, radix_cache_backend="ape"))


@pytest.mark.parametrize("name", ENVIRONMENT)
@pytest.mark.parametrize("value", ["1", "true", "True", "YES"])
def test_environment_switches_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    message = refusal(refuse_combinations, server_args())
    assert name in message
    assert "--enable-ape" in message


@pytest.mark.parametrize("name", ENVIRONMENT)
@pytest.mark.parametrize("value", ["", "0", "false"])
def test_environment_switches_that_are_off_are_taken(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    refuse_combinations(server_args())


# ---------------------------------------------------------------- models


def model_config(text: dict[str, Any] | None = None, **given: Any) -> SimpleNamespace:
    """A plain Llama, with ``given`` on top."""
    from sglang.srt.configs.model_config import AttentionArch

    plain = {
        "hf_text_config": SimpleNamespace(rope_scaling=None, **(text or {})),
        "hf_config": SimpleNamespace(architectures=["SomeForCausalLM"]),
        "attention_arch": AttentionArch.MHA,
        "is_hybrid_swa": False,
        "sliding_window_size": None,
        "has_attention_sinks": False,
        "model_is_mrope": False,
        "is_encoder_decoder": False,
        "is_multimodal": False,
        "is_generation": True,
        "head_dim": 128,
    }
    return SimpleNamespace(**{**plain, **given})


def test_a_plain_model_is_served() -> None:
    refuse_model(model_config(), TORCH)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"sliding_window_size": 4096}, "sliding-window"),
        ({"has_attention_sinks": True}, "sinks"),
        ({"model_is_mrope": True}, "M-RoPE"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"is_multimodal": True}, "multimodal"),
        ({"is_generation": False}, "generation"),
    ],
)
def test_a_model_beyond_plain_attention_is_refused_with_the_reason(
    given: dict[str, Any], word: str
) -> None:
    message = refusal(refuse_model, model_config(**given), TORCH)
    assert "--enable-ape" in message
    assert "SomeForCausalLM" in message
    assert word in message


def test_heads_that_flashinfer_does_not_serve_are_refused_there_alone() -> None:
    for head_dim in (64, 128, 256):
        refuse_model(model_config(head_dim=head_dim), "flashinfer")
    assert "heads of 16" in refusal(refuse_model, model_config(head_dim=16), "flashinfer")
    refuse_model(model_config(head_dim=16), TORCH)


def test_latent_attention_is_refused() -> None:
    from sglang.srt.configs.model_config import AttentionArch

    assert "latent" in refusal(refuse_model, model_config(attention_arch=AttentionArch.MLA), TORCH)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("attn_logit_softcapping", 50.0, "soft-capped"),
        ("attention_chunk_size", 8192, "chunked"),
    ],
)
def test_attention_variants_of_the_text_config_are_refused(
    field: str, value: float, word: str
) -> None:
    assert word in refusal(refuse_model, model_config({field: value}), TORCH)
    refuse_model(model_config({field: None}), TORCH)


def rope_config(scaling: dict[str, Any], name: str, key: str) -> SimpleNamespace:
    renamed = {key if k == "rope_type" else k: v for k, v in scaling.items()}
    text = SimpleNamespace(**{name: renamed})
    return model_config(hf_text_config=text)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_rotary_scaling_by_length_is_refused(name: str, key: str, kind: str) -> None:
    message = refusal(refuse_model, rope_config({"rope_type": kind}, name, key), TORCH)
    assert kind in message


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotary_scaling_by_position_is_taken(name: str, key: str, kind: str) -> None:
    refuse_model(rope_config({"rope_type": kind, "factor": 2.0}, name, key), TORCH)


def test_several_reasons_are_given_at_once() -> None:
    message = refusal(
        refuse_model, model_config(is_multimodal=True, has_attention_sinks=True), TORCH
    )
    assert "sinks" in message
    assert "multimodal input" in message


def test_a_model_without_a_name_is_refused_all_the_same() -> None:
    nameless = SimpleNamespace(architectures=None)
    assert "this model" in refusal(
        refuse_model, model_config(hf_config=nameless, is_generation=False), TORCH
    )


# ---------------------------------------------------------------- version gate


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.170", "0.5.17rc1", "0.6.0", "1.0"])
def test_another_version_of_sglang_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(compat, "version", lambda name: version)
    with pytest.raises(RuntimeError) as caught:
        compat.load()
    assert version in str(caught.value)
    assert "0.5.17" in str(caught.value)


@pytest.mark.parametrize("version", ["0.5.17", "0.5.17.post1", "0.5.17+cu128", "0.5.17.post2+cpu"])
def test_builds_of_the_supported_version_are_taken(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(compat, "version", lambda name: version)
    assert compat.load().__name__ == "sglang_ape.compat.v0_5_17"
