"""An S3 server that misbehaves on request: a proxy in front of a real one.

    with S3Proxy(seaweedfs_endpoint) as s3:
        s3.fail(match=r"PUT /bucket/key", status=503, code="SlowDown", times=2)
        S3Store(...)    # with s3.endpoint.environment()

Requests are passed on as they came, signature and all, and answers as they are.
"""

import http.client
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from tests.servers.faults import FOR_EVER, Fault, Faults, Wrong
from tests.servers.old_listing import OldListing
from tests.servers.seaweed import S3Endpoint

STOP_POLL_SECONDS = 0.02
PIECE_BYTES = 64 * 1024
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect", "content-length"})
_KEY_OF = re.compile(r"Credential=([^/]+)/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    length_bytes: int
    """As the header says: of an answer to HEAD nothing of it comes."""


class S3Proxy:
    """Answers inside its `with` block, at `endpoint`.

    `requests` holds "METHOD path?query" of all requests so far, in order, the failed ones too, with
    " from <bucket/key>" behind those that ask the server to copy;
    `passed_bytes` counts what their bodies and those of their answers had.
    """

    def __init__(self, behind: S3Endpoint) -> None:
        self.requests: list[str] = []
        self.passed_bytes = 0
        self._behind = behind
        self._faults = Faults()
        self._revoked: set[str] = set()
        self._old: OldListing | None = None
        self._slow, self._pause_s = re.compile(""), 0.0
        self._take_s = 0.0
        self._queue, self._counting = threading.Lock(), threading.Lock()
        self.taken_bytes = 0
        """Of bodies, of whatever came of them."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), daemon=True
        )
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.endpoint = replace(behind, url=url)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._faults.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(
        self,
        *,
        match: str,
        status: int,
        code: str,
        times: int = FOR_EVER,
        headers: Mapping[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """So many requests are answered with this error; `after`: what they ask for is done."""
        wrong = Wrong.LATE_ANSWER if after else Wrong.ANSWER
        fault = Fault(
            match=re.compile(match), wrong=wrong, status=status, code=code, headers=headers or {}
        )
        self._faults.add(fault, times=times)

    def hang(self, *, match: str, times: int = FOR_EVER) -> None:
        """So many requests are never answered, and not a byte of their bodies is taken."""
        self._faults.add(Fault(match=re.compile(match), wrong=Wrong.SILENCE), times=times)

    def drop(self, *, match: str, after_bytes: int, times: int = FOR_EVER) -> None:
        """The connection of so many requests is reset after so many bytes of the answer's body."""
        fault = Fault(match=re.compile(match), wrong=Wrong.BROKEN_BODY, after_bytes=after_bytes)
        self._faults.add(fault, times=times)

    def spoil(self, *, match: str, times: int = FOR_EVER) -> None:
        """Every byte of the body of so many answers is another one."""
        self._faults.add(Fault(match=re.compile(match), wrong=Wrong.OTHER_BODY), times=times)

    def meanwhile(self, *, match: str, do: Callable[[], object]) -> None:
        """Right before the next request that matches is looked at, `do` is called, once."""
        self._faults.meanwhile(match=match, do=do)

    def revoke(self, access_key: str) -> None:
        """Whatever is signed with this key is answered as when its token has expired."""
        self._revoked.add(access_key)

    def lists_lag(self, bucket: str) -> None:
        """Whoever asks for a LIST of the bucket is told what is there now, from now on."""
        self._old = OldListing(self._behind, bucket)

    def be_slow(self, pause_s: float, *, match: str = "") -> None:
        """Such answers' bodies come a piece at a time, with such a pause before each."""
        self._slow, self._pause_s = re.compile(match), pause_s

    def take_slowly(self, take_s: float) -> None:
        """Bodies are taken one after the other, and each keeps the others waiting for so long."""
        self._take_s = take_s

    def recover(self) -> None:
        """All is well again."""
        self._faults.forget()
        self._revoked.clear()
        self._old, self._pause_s, self._take_s = None, 0.0, 0.0

    def wrong_with(self, line: str, headers: Mapping[str, str]) -> Fault | None:
        """What is to go wrong with this request."""
        self.requests.append(line)
        key = _KEY_OF.search(headers.get("Authorization", ""))
        if key and key[1] in self._revoked:
            match = re.compile("")
            return Fault(match=match, wrong=Wrong.ANSWER, status=400, code="ExpiredToken")
        return self._faults.take(line)

    def stay_silent(self) -> None:
        self._faults.stay_silent()

    def pause_s(self, line: str) -> float:
        """Before each piece of the answer to this request."""
        return self._pause_s if self._slow.search(line) else 0.0

    def take(self, stream: BufferedIOBase, size_bytes: int) -> bytes:
        """The body of a request; shorter if its sender has gone."""
        with self._queue if self._take_s and size_bytes else nullcontext():
            threading.Event().wait(self._take_s if size_bytes else 0.0)
            body = bytearray()
            with suppress(ConnectionError):
                while piece := stream.read(min(PIECE_BYTES, size_bytes - len(body))):
                    body += piece
        with self._counting:
            self.taken_bytes += len(body)
        return bytes(body)

    def pass_on(self, request: "Handler", body: bytes) -> Answer:
        """The real server's answer, or an older one to a LIST."""
        answer = self._answer(request, body)
        self.passed_bytes += len(body) + len(answer.body)
        return answer

    def _answer(self, request: "Handler", body: bytes) -> Answer:
        asked = urlsplit(request.path)
        query = dict(parse_qsl(asked.query, keep_blank_values=True))
        is_list = request.command == "GET" and query.get("list-type") == "2"
        if self._old is not None and is_list:
            return _xml(200, self._old.answer(query))
        return self._ask(request, body)

    def headers_of(self, request: "Handler", body: bytes) -> Mapping[str, str]:
        """What goes on to the real server, signature included."""
        return dict(request.headers.items())

    def _ask(self, request: "Handler", body: bytes) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self._behind.url).netloc, timeout=300)
        try:
            connection.putrequest(
                request.command, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers_of(request, body).items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            if "Content-Length" in request.headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            headers = {n: v for n, v in response.getheaders() if n.lower() not in _HOP}
            length_bytes = int(response.headers.get("Content-Length", len(content)))
        finally:
            connection.close()
        return Answer(
            status=response.status, headers=headers, body=content, length_bytes=length_bytes
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: S3Proxy, *arguments: Any) -> None:
        self._proxy = proxy
        super().__init__(*arguments)

    def _serve(self) -> None:
        source = self.headers.get("x-amz-copy-source")
        line = f"{self.command} {self.path}" + (f" from {source}" if source else "")
        fault = self._proxy.wrong_with(line, {n.title(): v for n, v in self.headers.items()})
        self.close_connection = True
        if fault is not None and fault.wrong is Wrong.SILENCE:
            self._proxy.stay_silent()
            return
        size_bytes = int(self.headers.get("Content-Length", 0))
        body = self._proxy.take(self.rfile, size_bytes)
        if len(body) < size_bytes:
            return  # nobody is left to be answered
        if fault is None:
            self._send(self._proxy.pass_on(self, body))
        elif fault.wrong is Wrong.BROKEN_BODY:
            self._send(self._proxy.pass_on(self, body), only_bytes=fault.after_bytes)
            self._reset()
        elif fault.wrong is Wrong.OTHER_BODY:
            answer = self._proxy.pass_on(self, body)
            self._send(replace(answer, body=bytes(byte ^ 1 for byte in answer.body)))
        else:
            if fault.wrong is Wrong.LATE_ANSWER:
                self._proxy.pass_on(self, body)
            self._send(_refusal(fault))

    # BaseHTTPRequestHandler fixes these names.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _send(self, answer: Answer, *, only_bytes: int | None = None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.length_bytes))
        self.send_header("Connection", "close")
        self.end_headers()
        content = b"" if self.command == "HEAD" else answer.body[:only_bytes]
        pause_s = self._proxy.pause_s(f"{self.command} {self.path}")
        for start in range(0, len(content), PIECE_BYTES):
            if pause_s:
                threading.Event().wait(pause_s)
            with suppress(ConnectionError):  # who has gone hears no answer
                self.wfile.write(content[start : start + PIECE_BYTES])

    def _reset(self) -> None:
        """Whoever reads on hears that the connection is gone, not that the body has ended."""
        linger_for_no_time = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed: `S3Proxy.requests` is the log."""


def _refusal(fault: Fault) -> Answer:
    """The answer by which S3's clients recognise the error."""
    text = f"<Error><Code>{fault.code}</Code><Message>{fault.text}</Message></Error>"
    return _xml(fault.status, text, fault.headers)


def _xml(status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    body = text.encode()
    headers = {"Content-Type": "application/xml", **(headers or {})}
    return Answer(status=status, headers=headers, body=body, length_bytes=len(body))
