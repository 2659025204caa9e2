"""Connections to one HTTP/1.1 server that are kept open, over which bytes go as they lie in memory.

A line is used by one thread at a time. One that the server has closed meanwhile is replaced once;
whatever else goes wrong is for the caller to see. Knows answers of a stated length alone, which is
what object stores give: of any other the status is told, and the line is closed.
"""

import contextlib
import io
import socket
import ssl
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult

_PIECE_BYTES = 256 << 10
"""Of a body, for each of which the server has the whole patience again."""
_READ_BYTES = 64 << 10
_MAX_LINE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """What came back, less a body that was read into the caller's memory."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    num_bytes: int
    """So many bytes of the body are in the caller's memory."""


class HttpLines:
    """As many connections to `server` as there are threads that ask at once."""

    def __init__(
        self,
        server: SplitResult,
        *,
        connect_s: float,
        silence_s: float,
        context: ssl.SSLContext | None,
    ) -> None:
        self._host = server.hostname or ""
        self._port = server.port or (80 if context is None else 443)
        self._connect_s = connect_s
        self._silence_s = silence_s
        self._context = context
        self._idle: list[_Line] = []
        weakref.finalize(self, _close_all, self._idle)

    def ask(
        self, head: bytes, body: memoryview | bytes = b"", into: memoryview | None = None
    ) -> HttpAnswer:
        """The answer to a request whose head ends with an empty line.

        The body of a success goes `into` the caller's memory, if there is room for it.

        Raises:
            OSError: no answer came, or not all of it, or it is no HTTP.
        """
        try:
            line = self._idle.pop()
        except IndexError:
            return self._ask_on(self._new(), head, body, into)
        try:
            return self._ask_on(line, head, body, into)
        except ConnectionError:  # closed while nobody used it
            return self._ask_on(self._new(), head, body, into)

    def _new(self) -> "_Line":
        made = socket.create_connection((self._host, self._port), self._connect_s)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                made = self._context.wrap_socket(made, server_hostname=self._host)
            made.settimeout(self._silence_s)
            return _Line(made)
        except BaseException:
            made.close()
            raise

    def _ask_on(
        self, line: "_Line", head: bytes, body: memoryview | bytes, into: memoryview | None
    ) -> HttpAnswer:
        try:
            line.send(head, memoryview(body).cast("B"))
            answer, is_over = line.receive(into)
        except BaseException:
            line.close()
            raise
        if is_over:
            self._idle.append(line)
        else:
            line.close()
        return answer


class _Line:
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._stream = cast(io.BufferedReader, connected.makefile("rb", _READ_BYTES))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
            self._socket.close()

    def send(self, head: bytes, body: memoryview) -> None:
        first = min(body.nbytes, _PIECE_BYTES)
        self._socket.sendall(b"".join((head, body[:first])))
        for begin in range(first, body.nbytes, _PIECE_BYTES):
            self._socket.sendall(body[begin : begin + _PIECE_BYTES])

    def receive(self, into: memoryview | None) -> tuple[HttpAnswer, bool]:
        """The answer, and whether the line can be used again."""
        status, headers = self._head()
        length = headers.get("content-length", "")
        num_bytes = int(length) if length.isdecimal() else -1
        is_open = headers.get("connection", "").lower() != "close"
        come = 0
        if into is not None and status < 300 and 0 <= num_bytes <= into.nbytes:
            self._fill(into[:num_bytes])
            come = num_bytes
        elif 0 <= num_bytes <= _READ_BYTES:
            self._fill(memoryview(bytearray(num_bytes)))
        else:
            is_open = status == 204
        return HttpAnswer(status=status, headers=headers, num_bytes=come), is_open

    def _head(self) -> tuple[int, dict[str, str]]:
        """Of the answer itself: what only says that the server is at work is passed over."""
        while True:
            first, *lines = self._lines()
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
                raise OSError(f"no HTTP: {first[:80]!r}")
            if int(rest[:3]) >= 200:
                pairs = (line.partition(":") for line in lines)
                return int(rest[:3]), {name.lower(): value.strip() for name, _, value in pairs}

    def _lines(self) -> Iterable[str]:
        """As far as the empty one. Most heads come in one piece, which is taken apart at once."""
        come = self._stream.peek()
        end = come.find(b"\r\n\r\n")
        if end < 0:
            return self._lines_as_they_come()
        self._stream.read(end + 4)
        return come[:end].decode("latin-1").split("\r\n")

    def _lines_as_they_come(self) -> Iterator[str]:
        while True:
            line = self._stream.readline(_MAX_LINE_BYTES)
            if not line.endswith(b"\n"):
                raise ConnectionResetError("the answer ends within its head")
            if line in (b"\r\n", b"\n"):
                return
            yield line.decode("latin-1").rstrip("\r\n")

    def _fill(self, view: memoryview) -> None:
        while view.nbytes:
            count = self._stream.readinto(view)
            if not count:
                raise OSError("the answer ends before its length")
            view = view[count:]


def _close_all(lines: "list[_Line]") -> None:
    while lines:
        lines.pop().close()
