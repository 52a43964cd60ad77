"""Everything of SGLang that this package touches, in one list.

Entry point ``sglang.srt.plugins``. SGLang runs :func:`register` in the main process and in every
scheduler process and only logs what goes wrong there; therefore an APE server checks for itself
that all of it took (:func:`verify`) before it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_ape import arguments, compat


class Hook(NamedTuple):
    """One hooked function of SGLang."""

    target: str
    kind: str  # a member of sglang.srt.plugins.hook_registry.HookType
    function: Callable[..., Any]


_CHANGES_OF_WEIGHTS = (
    "flush_cache",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
)


def hooks() -> tuple[Hook, ...]:
    """The hooked functions, in the order in which a request meets them."""
    from sglang_ape.attention.batch import after_init_new
    from sglang_ape.entry import engine, tokenizer_manager
    from sglang_ape.limits import (
        around_get_new_batch_prefill_raw,
        around_init_req_max_new_tokens,
        around_validate_input_length,
        around_validate_one_request,
        extra_row_tokens,
    )

    srt = "sglang.srt"
    manager = f"{srt}.managers.tokenizer_manager.TokenizerManager"
    return (
        # start-up: flags, refusals, width of the page table
        Hook(f"{srt}.server_args.ServerArgs.__post_init__", "BEFORE", before_post_init),
        Hook(f"{srt}.server_args.ServerArgs.check_server_args", "AFTER", after_check_server_args),
        Hook(
            f"{srt}.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
            "AFTER",
            extra_row_tokens,
        ),
        # the way in: texts to token ids
        Hook(f"{srt}.entrypoints.engine.Engine.generate", "AROUND", engine.around_generate),
        Hook(
            f"{srt}.entrypoints.engine.Engine.async_generate",
            "AROUND",
            engine.around_async_generate,
        ),
        Hook(f"{manager}.generate_request", "AROUND", tokenizer_manager.around_generate_request),
        # scores of contexts: aborted with their request, forgotten with the weights
        Hook(f"{manager}.abort_request", "AROUND", tokenizer_manager.around_abort_request),
        *(
            Hook(f"{manager}.{name}", "AROUND", tokenizer_manager.around_change_of_weights)
            for name in _CHANGES_OF_WEIGHTS
        ),
        # lengths: count positions, not tokens, against the model's window
        Hook(f"{manager}._validate_one_request", "AROUND", around_validate_one_request),
        Hook(
            f"{srt}.managers.scheduler.Scheduler.init_req_max_new_tokens",
            "AROUND",
            around_init_req_max_new_tokens,
        ),
        Hook(f"{srt}.managers.utils.validate_input_length", "AROUND", around_validate_input_length),
        # pins that came after a request: they take hold when there is room, and a request that they
        # keep out must not keep the others waiting
        Hook(
            f"{srt}.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
            "AROUND",
            around_get_new_batch_prefill_raw,
        ),
        # scores by likelihood: right ones beside a retracted request
        Hook(
            f"{srt}.managers.scheduler_components.batch_result_processor."
            "SchedulerBatchResultProcessor.process_batch_result_prefill",
            "BEFORE",
            compat.load().before_process_batch_result_prefill,
        ),
        # the context store: questions to the scheduler, and what pins have to leave
        Hook(
            f"{srt}.managers.scheduler.Scheduler.init_request_dispatcher",
            "AFTER",
            _after_init_request_dispatcher,
        ),
        # every forward pass: positions
        Hook(
            f"{srt}.model_executor.forward_batch_info.ForwardBatch.init_new",
            "AFTER",
            after_init_new,
        ),
    )


HTTP_MODULE = "sglang.srt.entrypoints.http_server"


def http_hook() -> Hook:
    """The hook of the HTTP server, whose module only the server's main process imports."""
    from sglang_ape.entry.http import before_run_http_server

    return Hook(f"{HTTP_MODULE}._setup_and_run_http_server", "BEFORE", before_run_http_server)


def graph_hooks() -> tuple[Hook, ...]:
    """The hooks of decode CUDA graphs, whose module only a scheduler with a GPU imports."""
    from sglang_ape.attention import flashinfer

    runner = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
    return (
        Hook(f"{runner}._resolve_lora_variant", "AROUND", flashinfer.around_resolve_lora_variant),
        Hook(f"{runner}.capture_one_shape", "AROUND", flashinfer.around_capture_one_shape),
    )


def register() -> None:
    """Entry point: add the flags, the hooks, the radix tree and the attention backends."""
    compat.load().extend_server_args(arguments.FLAGS)
    for hook in hooks():
        _register_hook(hook)
    _register_tree()
    _register_attention()


def verify(*further: Hook) -> None:
    """Refuse to run half-patched.

    Args:
        further: hooks that this process needs beside those of every process.

    Raises:
        RuntimeError: a hook or registration is missing in this process.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import get_radix_cache_factory
    from sglang.srt.plugins.hook_registry import HookRegistry

    wanted = (*hooks(), *further)
    if HTTP_MODULE in sys.modules:
        wanted += (http_hook(),)
    missing = [hook.target for hook in wanted if hook.target not in HookRegistry._patched]
    if get_radix_cache_factory(arguments.TREE_BACKEND) is None:
        missing.append(f"radix cache backend {arguments.TREE_BACKEND!r}")
    for name in arguments.ATTENTION_BACKENDS:
        if not getattr(ATTENTION_BACKENDS.get(name), "serves_ape", False):
            missing.append(f"attention backend {name!r}")
    if missing:
        raise RuntimeError(
            "--enable-ape: the plugin did not take; missing in this process: "
            f"{', '.join(missing)}. SGLang logs the cause at start-up ('Failed to ...'); a "
            "SGLANG_PLUGINS whitelist must name 'ape'"
        )


def before_post_init(args: Any) -> None:
    """BEFORE hook on ``ServerArgs.__post_init__``."""
    arguments.apply_defaults(args)


def after_check_server_args(_result: None, args: Any) -> None:
    """AFTER hook on ``ServerArgs.check_server_args``: the last step before processes start."""
    if not args.enable_ape:
        return
    if HTTP_MODULE in sys.modules:
        _apply_late(http_hook())
    verify()
    arguments.refuse_combinations(args)
    config = args.get_model_config()
    arguments.refuse_model(config, args.attention_backend)
    arguments.warn_of_profile(args)
    if args.ape_max_context_tokens is None:
        args.override("ape", ape_max_context_tokens=config.context_len)


def _after_init_request_dispatcher(_result: None, scheduler: Any) -> None:
    """AFTER hook on ``Scheduler.init_request_dispatcher``."""
    if scheduler.server_args.enable_ape:
        from sglang_ape.cache.room import keep_room
        from sglang_ape.scoring import channel as scores_channel
        from sglang_ape.store import channel

        keep_room(scheduler)
        channel.answer_messages(scheduler)
        scores_channel.answer_messages(scheduler)


def _register_hook(hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hook.target not in HookRegistry._patched:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])


def _apply_late(*late: Hook) -> None:
    """Hook modules that only some processes import."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in late:
        _register_hook(hook)
    HookRegistry.apply_hooks()


def _register_tree() -> None:
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    def factory(ctx: Any) -> Any:
        from sglang_ape.cache.tree import build_tree_cache

        verify()
        return build_tree_cache(ctx)

    register_radix_cache_backend(arguments.TREE_BACKEND, factory)


def _register_attention() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    builders = {"flashinfer": _build_flashinfer, "torch_native": _build_torch_native}
    for name in arguments.ATTENTION_BACKENDS:
        ATTENTION_BACKENDS[name] = _ape_or_stock(builders[name], ATTENTION_BACKENDS[name])


def _ape_or_stock(build: Callable[[Any], Any], stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def factory(runner: Any) -> Any:
        return build(runner) if runner.server_args.enable_ape else stock(runner)

    factory.serves_ape = True  # type: ignore[attr-defined]  # read by verify()
    return factory


def _build_torch_native(runner: Any) -> Any:
    from sglang_ape.attention.torch_native import ApeTorchNativeBackend

    return ApeTorchNativeBackend(runner)


def _build_flashinfer(runner: Any) -> Any:
    from sglang_ape.attention.flashinfer import ApeFlashInferBackend

    _apply_late(*graph_hooks())
    verify(*graph_hooks())
    return ApeFlashInferBackend(runner, init_new_workspace=runner.init_new_workspace)
