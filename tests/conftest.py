"""Fixtures shared by all tests: the tiny checkpoints."""

from pathlib import Path

import pytest

from tests.support import models


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_qwen2(tmp_path_factory.mktemp("tiny_qwen2"))
