"""Compile the attention modules ahead of time, for a named architecture, without a GPU.

    python -m flashinfer_ext.prebuild --arch 9.0a --head-dim 64 128 --dtype bfloat16

Copy the output folder to the machine that will serve, and name it there in
``FLASHINFER_EXT_MODULE_DIR`` (or put it under ``~/.cache/flashinfer_ext``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

_DTYPES = ("bfloat16", "float16")
_KV_DTYPES = ("auto", "float8_e4m3fn", "float8_e5m2")
_TOOLKIT = Path("/usr/local/cuda")
_HEADERS = ("curand", "cublas", "cusparse", "cusolver")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    # FlashInfer reads these when it is imported.
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = args.arch
    if args.output:
        os.environ["FLASHINFER_EXT_MODULE_DIR"] = str(args.output.resolve())
    with tempfile.TemporaryDirectory() as folder:
        _complete_toolkit(Path(folder))
        build(args.dtype, args.kv_dtype, args.head_dim, hopper=args.arch in ("9.0", "9.0a"))


def build(
    dtypes: Sequence[str], kv_dtypes: Sequence[str], head_dims: Sequence[int], hopper: bool
) -> None:
    """Build every combination and put each where :func:`variant.prebuilt_path` looks for it."""
    import torch
    from tqdm import tqdm

    from flashinfer_ext.variant import ModuleKey, jit_spec, prebuilt_path

    keys = [
        ModuleKey(getattr(torch, q), getattr(torch, q if kv == "auto" else kv), head_dim)
        for q in dtypes
        for kv in kv_dtypes
        for head_dim in head_dims
    ]
    with_bias = [key._replace(with_bias=True) for key in keys]
    if hopper:
        keys += [key.on_hopper for key in keys if key.on_hopper is not None]
    keys += with_bias
    for key in (progress := tqdm(keys)):
        progress.set_description(key.name)
        spec = jit_spec(key)
        spec.build(verbose=False)
        path = prebuilt_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(spec.jit_library_path, path)
        tqdm.write(str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--arch", required=True, help="compute capability, such as 9.0a or 8.0")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--kv-dtype", nargs="+", choices=_KV_DTYPES, default=["auto"], help="auto: as --dtype"
    )
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(64, 128, 256), default=[128])
    parser.add_argument("--output", type=Path, help="default: ~/.cache/flashinfer_ext")
    return parser


def _complete_toolkit(folder: Path) -> None:
    """Make up for what a bare nvcc lacks: library headers, and a driver library to link against.

    The headers come from the wheels that PyTorch depends on; the driver, which only a machine with
    a GPU has, is stood in for by an empty library.
    """
    if (_TOOLKIT / "bin" / "nvcc").exists():
        os.environ.setdefault("CUDA_HOME", str(_TOOLKIT))
    site = Path(sysconfig.get_paths()["purelib"])
    for name in _HEADERS:
        for header in site.glob(f"nvidia/cu*/include/{name}*.h"):
            (folder / header.name).symlink_to(header)
    source = folder / "libcuda.c"
    source.touch()
    subprocess.run(
        [
            "cc",
            "-shared",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(folder / "libcuda.so"),
            str(source),
        ],
        check=True,
    )
    for variable in ("CPATH", "LIBRARY_PATH"):
        known = os.environ.get(variable)
        os.environ[variable] = f"{known}:{folder}" if known else str(folder)


if __name__ == "__main__":
    main()
