"""Connections that are kept open, against servers that close, cut off, stay silent or lie."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ray_ckpt.storage.s3.http_lines import HttpLines

HEAD = b"PUT /a HTTP/1.1\r\nhost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 5\r\n\r\nhello"

Answers = list[bytes]


class Server:
    """Answers each request of `size_bytes` with the next of `answers`; counts its connections."""

    def __init__(self, answers: Answers, size_bytes: int, context: ssl.SSLContext | None) -> None:
        self.num_connections = 0
        self.taken = b""
        self._answers = answers
        self._size_bytes = size_bytes
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connection = self._listener
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for each in (self._listener, self._connection):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.num_connections += 1
                with suppress(OSError):
                    if self._context is not None:
                        connection = self._context.wrap_socket(connection, server_side=True)
                    self._answer(connection)
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        self._connection = connection
        while True:
            taken = b""
            while len(taken) < self._size_bytes:
                piece = connection.recv(1 << 20)
                if not piece:
                    return
                taken += piece
            self.taken = taken
            answer = self._answers.pop(0)
            connection.sendall(answer)
            if b"lose" in answer or b"HTTP" not in answer:
                return


@contextmanager
def serving(
    answers: Answers, *, body_bytes: int = 0, context: ssl.SSLContext | None = None
) -> Iterator[Server]:
    server = Server(answers, len(HEAD) + body_bytes, context)
    try:
        yield server
    finally:
        server.close()


def lines_to(server: Server, context: ssl.SSLContext | None = None) -> HttpLines:
    scheme = "http" if context is None else "https"
    address = urlsplit(f"{scheme}://127.0.0.1:{server.port}")
    return HttpLines(address, connect_s=2, silence_s=0.5, context=context)


def test_requests_one_after_the_other_use_one_connection() -> None:
    with serving([OK, OK, OK]) as server:
        lines = lines_to(server)
        answers = [lines.ask(HEAD) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert answers[0].headers["etag"] == "x"
    assert server.num_connections == 1


def test_a_large_body_arrives_whole() -> None:
    body = bytes(range(256)) * 4096 * 3
    with serving([OK], body_bytes=len(body)) as server:
        assert lines_to(server).ask(HEAD, memoryview(body)).status == 200
    assert server.taken == HEAD + body


def test_a_body_comes_into_the_callers_memory_if_there_is_room() -> None:
    room, little = bytearray(8), bytearray(4)
    with serving([OK, OK]) as server:
        lines = lines_to(server)
        assert lines.ask(HEAD, into=memoryview(room)).num_bytes == 5
        assert lines.ask(HEAD, into=memoryview(little)).num_bytes == 0
    assert bytes(room) == b"hello\0\0\0"
    assert bytes(little) == bytes(4)
    assert server.num_connections == 1


def test_an_errors_body_is_not_taken_for_the_object() -> None:
    room = bytearray(8)
    with serving([OK.replace(b"200 OK", b"503 Slow Down")]) as server:
        answer = lines_to(server).ask(HEAD, into=memoryview(room))
    assert (answer.status, answer.num_bytes, bytes(room)) == (503, 0, bytes(8))


def test_a_line_that_was_closed_while_nobody_used_it_is_replaced() -> None:
    closed = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: lose\r\n\r\n"
    with serving([closed, OK]) as server:
        lines = lines_to(server)
        assert lines.ask(HEAD).status == 200
        assert lines.ask(HEAD).status == 200
    assert server.num_connections == 2


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 900000\r\n\r\n",
    ],
)
def test_a_line_is_given_up_when_it_ends_or_nobody_knows_where_the_answer_does(
    head: bytes,
) -> None:
    with serving([head, OK]) as server:
        lines = lines_to(server)
        assert lines.ask(HEAD).status == int(head[9:12])
        server_answers = lines.ask(HEAD)
    assert server_answers.status == 200
    assert server.num_connections == 2


def test_words_that_the_server_is_at_work_are_passed_over() -> None:
    with serving([b"HTTP/1.1 100 Continue\r\n\r\n" + OK]) as server:
        assert lines_to(server).ask(HEAD).status == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX: lose\r\n\r\nhel",  # less than it says
        b"HTTP/1.1 200 OK\r\nX: lose\r\nContent-Le",
        b"\x16\x03\x01 is no answer\r\n",
        b"",
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer: bytes) -> None:
    with serving([answer]) as server, pytest.raises(OSError):
        lines_to(server).ask(HEAD, into=memoryview(bytearray(9)))


def test_a_server_that_says_nothing_is_an_error() -> None:
    with serving([b"HTTP/1.1 200 OK\r\n"]) as server, pytest.raises(TimeoutError):
        lines_to(server).ask(HEAD)


def test_the_same_over_tls(certificate: tuple[Path, Path]) -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*certificate)
    body, room = bytes(range(256)) * 8192, bytearray(5)
    with serving([OK, OK], body_bytes=len(body), context=theirs) as server:
        lines = lines_to(server, ssl.create_default_context(cafile=certificate[0]))
        for _ in range(2):
            assert lines.ask(HEAD, body, memoryview(room)).num_bytes == 5
    assert server.taken == HEAD + body
    assert server.num_connections == 1


def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    certificate: tuple[Path, Path],
) -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*certificate)
    with serving([OK], context=theirs) as server, pytest.raises(ssl.SSLCertVerificationError):
        lines_to(server, ssl.create_default_context()).ask(HEAD)
    assert server.taken == b""
