"""The profile on its way to the file and back; refusals by the flag are in test_arguments.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_ape.calibrate.profile import Profile, ProfileError, model_name, read, write

text = st.text(st.characters(exclude_categories=["Cs"]))
profiles = st.builds(
    Profile,
    model=text.filter(bool),
    temperature=st.floats(0, 10, exclude_min=True),
    scale=st.floats(0, 10) | st.integers(0, 10),
    prefix=st.none() | text,
    soft=st.floats(0, 10),
    refine=st.integers(0, 10),
    warm=st.lists(text.filter(bool)),
    report=st.dictionaries(text, st.integers(0, 9) | text),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profile=profiles)
def test_what_is_written_is_read(tmp_path: Path, profile: Profile) -> None:
    write(profile, tmp_path / "profile.json")
    assert read(tmp_path / "profile.json") == profile


def test_a_profile_by_hand_needs_no_report(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"version": 1, "model": "m", "temperature": 1, "scale": 0.5}')
    assert read(path) == Profile(model="m", temperature=1.0, scale=0.5)
    assert (read(path).soft, read(path).refine, read(path).warm) == (0, 0, [])


def test_a_crash_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    old = Profile(model="m", temperature=1.0, scale=1.0)
    write(old, path)

    def crash(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write(Profile(model="m", temperature=0.5, scale=0.5), path)
    assert read(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/models/m", "m"), ("/models/m/", "m"), ("org/m", "m"), ("m", "m"), ("/", "/")],
)
def test_a_model_is_known_by_the_last_part_of_its_path(path: str, name: str) -> None:
    assert model_name(path) == name
    assert Profile(model=name, temperature=1.0, scale=1.0).is_for(path, None)


def test_reading_a_profile_imports_nothing_large() -> None:
    code = (
        "import sys, sglang_ape.calibrate.profile\n"
        "large = {'torch', 'sglang', 'numpy', 'matplotlib', 'transformers'}\n"
        "assert not large & set(sys.modules), large & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
