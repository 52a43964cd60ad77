"""What the benchmarks' client makes of a server's answers."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import NamedTuple

import pytest

from benchmarks.common.client import Client, Refused
from benchmarks.common.server import ServerError

LONG = b'{"error": {"message": "too long", "code": 400}}'
ABORTED = b'{"error": {"message": "aborted", "code": 503}}'
FIRST = b'{"text": "a", "meta_info": {"finish_reason": null}}'
LAST = b'{"text": "ab", "meta_info": {"finish_reason": {"type": "stop"}, "prompt_tokens": 3}}'


class Reply(NamedTuple):
    status: int
    chunks: tuple[bytes, ...]


class Fixed(HTTPServer):
    """Gives every request the same reply."""

    reply: Reply


class Handler(BaseHTTPRequestHandler):
    server: Fixed

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = self.server.reply
        self.send_response(reply.status)
        self.end_headers()
        if reply.status == 200:
            for chunk in (*reply.chunks, b"[DONE]"):
                self.wfile.write(b"data: " + chunk + b"\n\n")
        else:
            self.wfile.write(reply.chunks[0])

    def log_message(self, *_: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def server() -> Iterator[Fixed]:
    with Fixed(("127.0.0.1", 0), Handler) as fixed:
        thread = threading.Thread(target=fixed.serve_forever)
        thread.start()
        yield fixed
        fixed.shutdown()
        thread.join()


def stream(server: Fixed, status: int, *chunks: bytes) -> dict[str, object]:
    server.reply = Reply(status, chunks)
    return Client(f"http://127.0.0.1:{server.server_port}").stream([{}])[0].meta


def test_a_stream_ends_with_what_its_last_chunk_says(server: Fixed) -> None:
    assert stream(server, 200, FIRST, LAST)["prompt_tokens"] == 3


def test_a_request_is_refused_by_status_or_inside_the_stream(server: Fixed) -> None:
    for status in (400, 200):
        with pytest.raises(Refused, match="too long"):
            stream(server, status, LONG)


@pytest.mark.parametrize("chunks", [(FIRST,), (), (FIRST, ABORTED)])
def test_a_stream_without_its_end_is_an_error(server: Fixed, chunks: tuple[bytes, ...]) -> None:
    with pytest.raises(ServerError, match="did not come to an end"):
        stream(server, 200, *chunks)


def test_a_failing_server_is_an_error(server: Fixed) -> None:
    with pytest.raises(ServerError, match="HTTP 500"):
        stream(server, 500, b"broken")
