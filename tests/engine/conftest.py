"""Every test below this folder starts, or shares, a real engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Server

API_KEY = "not-a-secret"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
    # Engine.shutdown ends every child of its process: the server that modules share starts after
    # the last engine.
    items.sort(key=lambda item: "store_server" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def store_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the tests of the context store: an API key, metrics, and room for few tokens.

    Its client sends the key. Tests share its store, so each has texts, or a tenant, of its own.
    """
    flags = (
        *("--enable-ape", "--enable-metrics", "--api-key", API_KEY),
        *("--served-model-name", "tiny", "--max-total-tokens", "6000"),
        *("--ape-max-pinned-tokens", "2000", "--ape-max-context-tokens", "5000"),
        *("--tool-call-parser", "pythonic", "--constrained-json-disable-any-whitespace"),
    )
    with Server(tiny_llama, flags, tmp_path_factory.mktemp("store_server") / "log") as server:
        server.client.headers["Authorization"] = f"Bearer {API_KEY}"
        yield server
