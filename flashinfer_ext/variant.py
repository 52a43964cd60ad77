"""FlashInfer's paged prefill kernels with a temperature for every group of rows, and with a bias
for every key.

Both variants are plain softmax attention whose logits are multiplied by ``sm_scale`` and by the
group's own ``inv_temperature``; at 1 this is what the stock kernel computes. It exists for both of
FlashInfer's templates: FA2 runs on every GPU, FA3 on Hopper. The second variant, for FA2 alone,
then adds a bias that is read from a tensor beside the page indices.

FlashInfer compiles each as a module of its own (``flashinfer/jit/attention/modules.py:
gen_customize_batch_prefill_module``, 0.6.15). A module is found in one of two places: among those
built ahead of time by ``python -m flashinfer_ext.prebuild``, or in FlashInfer's own cache, where it
is compiled on first use.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from flashinfer.jit import env as jit_env
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper, get_batch_prefill_jit_module

MODULE_DIR_VARIABLE = "FLASHINFER_EXT_MODULE_DIR"

_DTYPE_NAMES = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}

# FlashInfer calls the constructor with the index of the request in the plan; the members it reads
# are those of its own DefaultAttention (include/flashinfer/attention/variants.cuh).
_FA2_SOURCE = """
struct ApeTemperature : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ ApeTemperature(const Params& params, uint32_t batch_idx, uint8_t*) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale_log2 = params.sm_scale * params.inv_temperature[batch_idx] * math::log2e;
  }
};
"""

# Logits are in natural units once they are transformed, so that a bias never comes near the -5e4
# that FlashInfer masks with. The index of a key counts from the first of its request, also where
# the request is split, and may lie behind the last one, which is masked afterwards. Asking whether
# it does would cost registers that the largest tile has not got.
_FA2_BIAS_SOURCE = """
DEFINE_HAS_MEMBER(paged_kv)

struct ApeBias : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  static constexpr float sm_scale_log2 = math::log2e;
  uint32_t qo_len, kv_len, window_left;
  float scale;
  const float* bias;

  template <typename Params>
  __device__ __host__ ApeBias(const Params& params, uint32_t batch_idx, uint8_t*) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    scale = params.sm_scale * params.inv_temperature[batch_idx];
    if constexpr (has_paged_kv_v<Params>) {
      const uint32_t page_size = params.paged_kv.page_size;
      bias = params.bias + static_cast<size_t>(params.paged_kv.indptr[batch_idx]) * page_size;
    } else {
      bias = params.bias + params.kv_indptr[batch_idx];
    }
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return logits * scale + __ldg(bias + min(kv_idx, kv_len - 1));
  })
};
"""

# The counterpart of the first (include/flashinfer/attention/hopper/variants.cuh).
_FA3_SOURCE = """
struct ApeTemperature {
  float sm_scale_log2;

  template <typename MainloopParams, typename BlockCoord>
  __device__ ApeTemperature(const MainloopParams& params, const BlockCoord& block) {
    constexpr int batch_idx = 7;
    sm_scale_log2 = params.additional_params.sm_scale *
                    params.additional_params.inv_temperature[cute::get<batch_idx>(block)] *
                    math::log2e;
  }

  template <int NUM_ROWS_PER_THREAD>
  __device__ auto GetAttentionUpdater() {
    return OnlineSoftmax<NUM_ROWS_PER_THREAD, /*WITH_SCALE=*/true>(sm_scale_log2);
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx,
                            { return logits; })
};
"""


class ModuleKey(NamedTuple):
    """What a module is compiled for."""

    q_dtype: torch.dtype  # of queries and outputs: float16 or bfloat16
    kv_dtype: torch.dtype  # the same, or float8_e4m3fn, float8_e5m2
    head_dim: int
    template: Literal["fa2", "fa3"] = "fa2"
    with_bias: bool = False  # of the FA2 template alone

    @property
    def name(self) -> str:
        """Name of the module and of its file; the variant's own version is part of it."""
        q, kv = _DTYPE_NAMES[self.q_dtype], _DTYPE_NAMES[self.kv_dtype]
        variant = "ape_bias_v1" if self.with_bias else "ape_temperature_v1"
        suffix = "_sm90" if self.template == "fa3" else ""
        return f"{variant}_q_{q}_kv_{kv}_head_dim_{self.head_dim}{suffix}"

    @property
    def on_hopper(self) -> ModuleKey | None:
        """The same in Hopper's template, which has to find keys in the queries' dtype."""
        if self.with_bias or self.q_dtype != self.kv_dtype:
            return None
        return self._replace(template="fa3")

    @property
    def tensors(self) -> list[str]:
        """What ``run`` takes in fp32 before the scalar ``sm_scale``."""
        return ["inv_temperature", "bias"] if self.with_bias else ["inv_temperature"]


def jit_spec(key: ModuleKey) -> Any:
    """FlashInfer's build recipe (``flashinfer.jit.core.JitSpec``) for a module."""
    from flashinfer.jit import gen_customize_batch_prefill_module

    if key.with_bias:
        name, source = "ApeBias", _FA2_BIAS_SOURCE
    else:
        name, source = "ApeTemperature", _FA2_SOURCE if key.template == "fa2" else _FA3_SOURCE
    return gen_customize_batch_prefill_module(
        key.template,
        key.name,
        key.q_dtype,
        key.kv_dtype,
        key.q_dtype,  # outputs
        torch.int32,  # page indices
        key.head_dim,
        key.head_dim,
        key.tensors,
        ["float"] * len(key.tensors),
        ["sm_scale"],
        ["double"],
        name,
        source,
    )


def prebuilt_path(key: ModuleKey) -> Path:
    """Where a module built ahead of time lies, for the architecture FlashInfer builds for.

    ``$FLASHINFER_EXT_MODULE_DIR`` or ``~/.cache/flashinfer_ext``, then FlashInfer's version and the
    architecture: a module of another version or GPU is never taken.
    """
    base = os.environ.get(MODULE_DIR_VARIABLE)
    root = Path(base) if base else Path.home() / ".cache" / "flashinfer_ext"
    version_and_arch = jit_env.FLASHINFER_WORKSPACE_DIR.relative_to(jit_env.FLASHINFER_CACHE_DIR)
    return root / version_and_arch / f"{key.name}.so"


def is_available(key: ModuleKey) -> bool:
    """Whether the module is prebuilt or can be compiled here."""
    return prebuilt_path(key).exists() or jit_spec(key).is_aot or _has_compiler()


@functools.cache
def load_module(key: ModuleKey) -> Any:
    """Load a module, compiling it first (minutes) if it is not there yet.

    Returns:
        What ``get_batch_prefill_jit_module`` makes of it: ``plan`` and ``paged_run`` functions.
    """
    spec = jit_spec(key)
    path = prebuilt_path(key)
    module = spec.load(path) if path.exists() else spec.build_and_load()
    return get_batch_prefill_jit_module(key.name, module)


class VariantAttentionWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """``BatchPrefillWithPagedKVCacheWrapper`` on a module of one of the variants.

    ``run(q, kv, inv_temperature, sm_scale, ...)``, or ``run(q, kv, inv_temperature, bias, sm_scale,
    ...)`` where the module has a bias, takes the fp32 tensors and the scalar by position;
    ``inv_temperature`` is (batch,), ``bias`` has an entry for each token of each page index.
    FlashInfer ignores ``sm_scale`` and ``k_scale`` given to a custom module by keyword.
    """

    def __init__(self, key: ModuleKey, module: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, backend="fa2", **kwargs)
        self._jit_module = module
        self._jit_additional_tensor_names = key.tensors


def _has_compiler() -> bool:
    """Whether FlashInfer's JIT finds nvcc, where it looks for it, and ninja."""
    if shutil.which("ninja") is None:
        return False
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and shutil.which("nvcc") is not None:
        return True
    return os.access(f"{home or '/usr/local/cuda'}/bin/nvcc", os.X_OK)
