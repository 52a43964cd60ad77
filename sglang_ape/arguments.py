"""The server's flags: what they are, what they imply, and what they cannot be combined with."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

if TYPE_CHECKING:
    from sglang_ape.calibrate.profile import Profile

MAX_TEMPERATURE = 10.0
MAX_SCALE = 10.0
MAX_CONTEXTS = 16_384
MAX_BODY_BYTES = 64 << 20
DEFAULT_TEMPERATURE = 0.9
DEFAULT_SCALE = 0.9
# What a profile may hold for requests that give none, and what holds without one.
_OF_PROFILE = {
    "temperature": DEFAULT_TEMPERATURE,
    "scale": DEFAULT_SCALE,
    "soft": 0.0,
    "refine": 0,
    "prefix": None,
}
LIKELIHOOD, ATTENTION = "likelihood", "attention"  # values of --ape-scorer
TREE_BACKEND = "ape"
ATTENTION_BACKENDS = ("flashinfer", "torch_native")

logger = logging.getLogger(__name__)


class Flag(NamedTuple):
    """One field of ``ServerArgs`` and so one flag of the command line."""

    name: str
    type: Any
    default: Any
    help: str


FLAGS = (
    Flag(
        "enable_ape",
        bool,
        False,
        "Serve requests with parallel contexts (Adaptive Parallel Encoding).",
    ),
    Flag(
        "ape_profile",
        Optional[str],  # noqa: UP045  SGLang's argument parser knows this spelling only
        None,
        "File of python -m sglang_ape.calibrate, with T, S, the shared prefix and what else it "
        "chose for requests that give none.",
    ),
    Flag(
        "ape_temperature",
        Optional[float],  # noqa: UP045
        None,
        "Attention temperature T of the contexts, 0 < T <= 10; a request may override it. "
        f"Default: the profile's, else {DEFAULT_TEMPERATURE}.",
    ),
    Flag(
        "ape_scale",
        Optional[float],  # noqa: UP045
        None,
        "Scaling factor S of the contexts' log-sum-exp, 0 <= S <= 10; a request may override it. "
        f"Default: the profile's, else {DEFAULT_SCALE}.",
    ),
    Flag(
        "ape_soft",
        Optional[float],  # noqa: UP045
        None,
        "Weight of the query's log-likelihood after each context, 0 (off) or more; a request may "
        "override it. Default: the profile's, else 0.",
    ),
    Flag(
        "ape_refine",
        Optional[int],  # noqa: UP045
        None,
        "Contexts of highest likelihood of the query that are encoded as one sequence, the others "
        "being left out; 0: off. A request may override it. Default: the profile's, else 0.",
    ),
    Flag(
        "ape_scorer",
        str,
        LIKELIHOOD,
        f"How soft and refine score contexts: {LIKELIHOOD}, by how likely they make the query, or "
        f"{ATTENTION}, by how much the query attends to them, which is cheaper and less exact "
        "(--attention-backend torch_native only).",
    ),
    Flag(
        "ape_prefix",
        Optional[str],  # noqa: UP045
        None,
        "Text of the prefix, to which special tokens are added, for requests that give none; chats "
        "have their template's. Default: the profile's, else the BOS token and two newlines.",
    ),
    Flag(
        "ape_warm",
        Optional[str],  # noqa: UP045
        None,
        "File of JSON lines with invented items in the format of the contexts, which stand at the "
        "end of the server's own prefix and of chats' templates; an empty name: none. Default: the "
        "profile's.",
    ),
    Flag(
        "ape_max_context_tokens",
        Optional[int],  # noqa: UP045
        None,
        "Tokens that the contexts of one request may hold in all; may exceed the model's window, "
        "which is the default. Every request slot reserves 4 bytes for each.",
    ),
    Flag(
        "ape_max_contexts",
        int,
        MAX_CONTEXTS,
        "Contexts that one request, or one registration, may have.",
    ),
    Flag(
        "ape_max_body_bytes",
        int,
        MAX_BODY_BYTES,
        "Bytes that the body of a request may have on the routes that take contexts.",
    ),
    Flag(
        "ape_max_pinned_tokens",
        Optional[int],  # noqa: UP045
        None,
        "KV tokens that pinned contexts may hold in all. Default: half of the KV pool, or less so "
        "that a request of the model's whole window still fits beside them.",
    ),
    Flag(
        "ape_store_max_tokens",
        int,
        1 << 24,
        "Tokens of contexts that the server knows by id, at 4 bytes each; every context counts "
        "256 more. Beyond it the least recently used are forgotten.",
    ),
    Flag(
        "ape_disable_shared_reads",
        bool,
        False,
        "Decode on a GPU without the rectangles that read a context once for all requests of the "
        "batch that have it; saves the CUDA graphs for them.",
    ),
)


class _Allowed(NamedTuple):
    """A field of ``ServerArgs`` that APE restricts."""

    field: str
    values: tuple[Any, ...]
    reason: str  # why every other value is refused


_BACKEND = f"APE runs on {' or '.join(ATTENTION_BACKENDS)} attention"
_ONE_BACKEND = "prefill and decoding share one plan; use --attention-backend"
_RESTRICTED = (
    _Allowed("page_size", (None, 1), "contexts end anywhere in a page"),
    _Allowed("attention_backend", (None, *ATTENTION_BACKENDS), _BACKEND),
    _Allowed("radix_cache_backend", (None, TREE_BACKEND), "APE brings its own radix tree"),
    _Allowed("enable_hierarchical_cache", (False,), "HiCache stores single paths only"),
    _Allowed("enable_lmcache", (False,), "LMCache stores single paths only"),
    _Allowed("enable_flexkv", (False,), "FlexKV stores single paths only"),
    _Allowed("enable_hisparse", (False,), "sparse attention has no contexts pass"),
    _Allowed("enable_session_radix_cache", (False,), "sessions need another tree"),
    _Allowed("enable_streaming_session", (False,), "sessions need another tree"),
    _Allowed("speculative_algorithm", (None,), "drafts do not see the contexts"),
    _Allowed("dllm_algorithm", (None,), "diffusion models do not decode causally"),
    _Allowed("disaggregation_mode", ("null",), "KV is transferred as one path, not by segments"),
    _Allowed("enable_pdmux", (False,), "two batches would share one plan"),
    _Allowed("enable_two_batch_overlap", (False,), "two batches would share one plan"),
    _Allowed("grpc_mode", (False,), "contexts are read from HTTP bodies"),
    _Allowed("smg_grpc_mode", (False,), "contexts are read from HTTP bodies"),
    _Allowed("grpc_port", (None,), "contexts are read from HTTP bodies"),
    _Allowed("use_ray", (False,), "Ray workers load no plugins"),
    _Allowed("encoder_only", (False,), "it serves no generation"),
    _Allowed("language_only", (False,), "multimodal models are not supported"),
    _Allowed("is_embedding", (False,), "embedding models have no query to decode"),
    _Allowed("pp_size", (1,), "use tensor parallelism"),
    _Allowed("dp_size", (1,), "run one server a replica"),
    _Allowed("enable_dp_attention", (False,), "use tensor parallelism"),
    _Allowed("dcp_size", (1,), "use tensor parallelism"),
    _Allowed("attn_cp_size", (1,), "use tensor parallelism"),
    _Allowed("enable_prefill_cp", (False,), "use tensor parallelism"),
    _Allowed("tokenizer_worker_num", (1,), "further tokenizer workers load no plugins"),
    _Allowed("enable_tokenizer_batch_encode", (False,), "it refuses prompts given as token ids"),
    _Allowed("enable_http2", (False,), "contexts are read by middleware made for uvicorn"),
    _Allowed("enable_torch_compile", (False,), "the two-pass attention is not compiled"),
    _Allowed("kv_canary", ("none",), "it takes reused positions for corruption"),
)
_PLAIN_KV = ("auto", "bf16", "bfloat16")
_RESTRICTED_BY_BACKEND = {
    "flashinfer": (
        _Allowed("kv_cache_dtype", (*_PLAIN_KV, "fp8_e4m3", "fp8_e5m2"), "no 4-bit attention"),
        _Allowed("enable_deterministic_inference", (False,), "splits of the KV are not fixed"),
        _Allowed(
            "cuda_graph_backend_prefill",
            (None, "breakable", "disabled"),
            "the two-pass attention is planned anew for each batch",
        ),
    ),
    "torch_native": (_Allowed("kv_cache_dtype", _PLAIN_KV, "quantized KV needs flashinfer"),),
}
_FLASHINFER_HEAD_DIMS = (64, 128, 256)
_REFUSED_ENVIRONMENT = {
    "SGLANG_RUST_SERVER": "it serves requests outside the Python process",
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE": "APE brings its own radix tree",
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE": "APE brings its own radix tree",
}
# Rotary scalings whose angles depend on the position alone. Others (dynamic NTK, longrope) change
# with the length of the row, which for an APE request is not the length its positions span.
_ROPE_TYPES = (None, "default", "linear", "llama3", "yarn")


def apply_defaults(args: Any) -> None:
    """Before SGLang resolves its arguments: check ours, set what APE needs.

    A second call on the same arguments changes nothing.

    Raises:
        ValueError: a flag is out of range or cannot be combined with ``--enable-ape``, or there is
            no profile where one should be.
    """
    if not args.enable_ape:
        _refuse_orphans(args)
        return
    _resolve_profile(args)
    if not 0 < args.ape_temperature <= MAX_TEMPERATURE:
        raise ValueError(f"--ape-temperature must be in (0, 10], got {args.ape_temperature}")
    if not 0 <= args.ape_scale <= MAX_SCALE:
        raise ValueError(f"--ape-scale must be in [0, 10], got {args.ape_scale}")
    _check_ladder(args)
    if args.ape_scorer not in (LIKELIHOOD, ATTENTION):
        raise ValueError(f"--ape-scorer must be {LIKELIHOOD} or {ATTENTION}, got {args.ape_scorer}")
    warm_items(args)  # a bad file is found before the model is loaded
    if args.ape_max_context_tokens is not None and args.ape_max_context_tokens < 1:
        given = args.ape_max_context_tokens
        raise ValueError(f"--ape-max-context-tokens must be positive, got {given}")
    if args.ape_max_pinned_tokens is not None and args.ape_max_pinned_tokens < 0:
        given = args.ape_max_pinned_tokens
        raise ValueError(f"--ape-max-pinned-tokens must not be negative, got {given}")
    for field in ("ape_max_contexts", "ape_max_body_bytes"):
        if getattr(args, field) < 1:
            raise ValueError(f"{flag_name(field)} must be at least 1, got {getattr(args, field)}")
    if args.ape_store_max_tokens < 1:
        given = args.ape_store_max_tokens
        raise ValueError(f"--ape-store-max-tokens must be positive, got {given}")
    refuse_combinations(args)
    args.page_size = 1
    args.radix_cache_backend = TREE_BACKEND
    args.attention_backend = _attention_backend(args)


def _resolve_profile(args: Any) -> None:
    """Fill in defaults of requests: a flag goes before the profile, and that before a default."""
    profile = _profile(args)
    for name, default in _OF_PROFILE.items():
        if getattr(args, f"ape_{name}") is None:
            setattr(args, f"ape_{name}", default if profile is None else getattr(profile, name))


def _profile(args: Any) -> Profile | None:
    if args.ape_profile is None:
        return None
    from sglang_ape.calibrate.profile import ProfileError, read

    try:
        return read(args.ape_profile)
    except ProfileError as error:
        raise ValueError(f"--ape-profile: {error}") from None


def _check_ladder(args: Any) -> None:
    """Raises ValueError where soft or refine is out of range, or both are on."""
    soft, refine = args.ape_soft, args.ape_refine
    if not 0 <= soft < math.inf:
        raise ValueError(f"--ape-soft must be 0 or more and finite, got {soft}")
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"--ape-refine must be a whole number, 0 or more, got {refine}")
    if soft > 0 and refine > 0:
        raise ValueError(
            f"--ape-soft {soft:g} and --ape-refine {refine} cannot be combined: refined contexts "
            "are one sequence and have nothing to weigh; give one of them as 0"
        )


def warm_items(args: Any) -> tuple[str, ...]:
    """Texts that end the server's own prefix: those of ``--ape-warm``, else of the profile.

    Raises:
        ValueError: the file cannot be read, or a line of it is no item.
    """
    if args.ape_warm == "":
        return ()
    if args.ape_warm is None:
        profile = _profile(args)
        return () if profile is None else tuple(profile.warm)
    from sglang_ape.warm.items import WarmError, read

    try:
        return read(args.ape_warm)
    except WarmError as error:
        raise ValueError(f"--ape-warm: {error}") from None


def warn_of_profile(args: Any) -> None:
    """Say so in the log where the profile was made for another model."""
    if args.ape_profile is None:
        return
    from sglang_ape.calibrate.profile import read

    profile = read(args.ape_profile)
    if not profile.is_for(args.model_path, args.served_model_name):
        logger.warning(
            "--ape-profile %s was made for the model %s, not for %s; T and S depend on the model",
            args.ape_profile,
            profile.model,
            args.model_path,
        )


def refuse_combinations(args: Any) -> None:
    """Raise ValueError, naming the flag, for what cannot be combined with ``--enable-ape``."""
    backend = _attention_backend(args)
    one_backend = tuple(
        _Allowed(f"{phase}_attention_backend", (None, backend), _ONE_BACKEND)
        for phase in ("prefill", "decode")
    )
    restricted = (*_RESTRICTED, *one_backend, *_RESTRICTED_BY_BACKEND.get(backend, ()))
    _refuse_with_attention_scorer(args)
    for field, allowed, reason in restricted:
        value = getattr(args, field)
        if value not in allowed:
            shown = flag_name(field) if value is True else f"{flag_name(field)} {value}"
            raise ValueError(f"--enable-ape cannot be combined with {shown}: {reason}")
    for name, reason in _REFUSED_ENVIRONMENT.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ValueError(f"--enable-ape cannot be combined with {name}=1: {reason}")


def _refuse_with_attention_scorer(args: Any) -> None:
    if args.ape_scorer == ATTENTION and args.skip_tokenizer_init:
        raise ValueError(
            f"--ape-scorer {ATTENTION} cannot be combined with --skip-tokenizer-init: a null query "
            "is made of text"
        )


def refuse_model(config: Any, attention_backend: str) -> None:
    """Raise ValueError for a model whose attention APE does not cover.

    Args:
        config: ``configs/model_config.py: ModelConfig`` of SGLang.
        attention_backend: one of ``ATTENTION_BACKENDS``.
    """
    from sglang.srt.configs.model_config import AttentionArch

    text = config.hf_text_config
    rope = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    problems = {
        "multi-head latent attention": config.attention_arch != AttentionArch.MHA,
        "sliding-window attention": config.is_hybrid_swa or bool(config.sliding_window_size),
        "chunked attention": bool(getattr(text, "attention_chunk_size", None)),
        "soft-capped attention logits": bool(getattr(text, "attn_logit_softcapping", None)),
        "attention sinks": config.has_attention_sinks,
        "multimodal rotary positions (M-RoPE)": config.model_is_mrope,
        f"length-dependent rotary scaling ({rope_type})": rope_type not in _ROPE_TYPES,
        "an encoder and a decoder": config.is_encoder_decoder,
        "multimodal input": config.is_multimodal,
        "no generation head": not config.is_generation,
        f"heads of {config.head_dim}, which FlashInfer does not serve (torch_native does)": (
            attention_backend == "flashinfer" and config.head_dim not in _FLASHINFER_HEAD_DIMS
        ),
    }
    found = [what for what, present in problems.items() if present]
    if found:
        name = ", ".join(config.hf_config.architectures or ["this model"])
        raise ValueError(f"--enable-ape cannot serve {name}: it has {' and '.join(found)}")


def _attention_backend(args: Any) -> str:
    """The backend asked for, else FlashInfer on a CUDA GPU and torch_native elsewhere."""
    if args.attention_backend is not None:
        return args.attention_backend
    import torch

    on_cuda = (args.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    return "flashinfer" if on_cuda else "torch_native"


def _refuse_orphans(args: Any) -> None:
    for flag in FLAGS[1:]:
        if getattr(args, flag.name) != flag.default:
            raise ValueError(f"{flag_name(flag.name)} has no effect without --enable-ape")


def flag_name(field: str) -> str:
    """The command-line flag of a ``ServerArgs`` field."""
    return "--" + field.replace("_", "-")
