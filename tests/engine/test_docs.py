"""What the documentation shows runs as it stands, on the tiny checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang as sgl

from tests.support.docs import Block, run_blocks, run_script, scripts_of
from tests.support.server import Server


@pytest.mark.parametrize("block", scripts_of("docs/api.md", "docs/programs.md"), ids=str)
def test_a_script_of_the_documentation_runs(block: Block, tiny_llama: Path, tmp_path: Path) -> None:
    assert run_script(block, tiny_llama, tmp_path).strip()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the README starts it."""
    flags = ("--enable-ape", "--enable-cache-report", "--max-total-tokens", "16384")
    with Server(tiny_llama, flags, tmp_path_factory.mktemp("docs_server") / "log") as server:
        yield server


def test_the_examples_of_the_reference_run(server: Server, tmp_path: Path) -> None:
    run_blocks("docs/api.md", server.url, tmp_path)
    server.assert_alive()


def test_the_programs_of_the_documentation_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        run_blocks("docs/programs.md", server.url, tmp_path)
    finally:
        sgl.set_default_backend(None)
    assert "documents must not be empty" in capsys.readouterr().out
    server.assert_alive()
