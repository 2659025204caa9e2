"""Sockets of the Hub double: HTTP requests to `Request`s, `Response`s to bytes.

Knows no endpoint, and nothing of the Hub.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

from tests.servers.hub_wire import Request, Response

BODY_IN_MEMORY_BYTES = 1024 * 1024
STOP_POLL_SECONDS = 0.02

Stream = IO[bytes] | BufferedIOBase


class Server:
    """Answers on a free port of this machine, from `start` to `close`."""

    def __init__(self, answer: Callable[[Request], Response]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, answer))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Bytes on a socket to a Request, a Response to bytes; one request on each connection.

    A connection that stayed open would be served even after the server is closed.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, answer: Callable[[Request], Response], *arguments: Any) -> None:
        self._answer = answer
        super().__init__(*arguments)

    def _serve(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
            return
        with self._body() as body:
            response = self._answer(self._request(body))
        with response.body, suppress(ConnectionError):  # who has gone hears no answer
            self._send(response)

    # BaseHTTPRequestHandler fixes these names.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _request(self, body: IO[bytes]) -> Request:
        parts = urlsplit(self.path)
        return Request(
            method=self.command,
            path=parts.path,
            query=dict(parse_qsl(parts.query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=body,
        )

    @contextmanager
    def _body(self) -> Iterator[IO[bytes]]:
        """The whole body, read before any answer: a client cut off while sending sees no status."""
        left_bytes = int(self.headers.get("Content-Length", 0))
        with tempfile.SpooledTemporaryFile(max_size=BODY_IN_MEMORY_BYTES) as body:
            _copy(self.rfile, body, length_bytes=left_bytes)
            body.seek(0)
            yield body

    def _send(self, response: Response) -> None:
        self.close_connection = True
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(response.length_bytes))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            sent = response.length_bytes if response.sent_bytes is None else response.sent_bytes
            _copy(response.body, self.wfile, length_bytes=sent)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed: `HubDouble.requests` is the log."""


def _copy(source: Stream, target: Stream, *, length_bytes: int) -> None:
    """`length_bytes` bytes are copied, fewer if the source ends before."""
    while length_bytes > 0 and (piece := source.read(min(length_bytes, BODY_IN_MEMORY_BYTES))):
        target.write(piece)
        length_bytes -= len(piece)
