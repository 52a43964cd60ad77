"""Triton kernels compiled for GPUs that are not here."""

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashinfer_ext import lse

# Bytes of shared memory that a program may use, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
TYPES = {"q": "fp16", "indices": "i32", "indptr": "i32", "out": "fp32", "log2_scale": "fp32"}
POINTERS = ("q", "k_cache", "indices", "indptr", "out")
DIVISIBLE = (*POINTERS, "stride_q", "stride_slot", "stride_kv_head")


class Recorder:
    """Stands in for a kernel and keeps the constants of a launch."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **constants: self.constants.update(constants)


@pytest.mark.parametrize(
    ("capability", "kv_dtype"),
    [(80, "fp16"), (89, "fp16"), (89, "fp8e4nv"), (90, "fp16"), (90, "fp8e4nv"), (90, "fp8e5")],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_log_sum_exps_of_contexts_fit_the_shared_memory_and_take_matrix_units(
    head_dim: int, capability: int, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, launch = lse._context_lse_kernel, Recorder()
    monkeypatch.setattr(lse, "_context_lse_kernel", launch)
    q, k_cache = torch.empty(3, 8, head_dim), torch.empty(9, 2, head_dim)
    slots, indptr = torch.arange(5), torch.tensor([0, 5])
    lse.launch_context_lse(q, k_cache, slots, indptr, 0.1, torch.empty(3, 8, 1))
    options = {name: launch.constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {name: "i32" for name in kernel.arg_names} | {**TYPES, "k_cache": kv_dtype}
    for name in POINTERS:
        signature[name] = "*" + signature[name]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in launch.constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in DIVISIBLE},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
