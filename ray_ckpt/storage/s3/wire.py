"""Bulk bytes to and from an S3 server, on sockets of our own.

    s3fs and botocore    which server, whose keys, what kind of address; every other request; every
                         repetition, and every error
    here                 PUT of bytes that lie in memory; GET of a range, and of small objects

s3fs makes some 5 ms of work of a request, and copies its body several times. Here the bytes are
handed to the socket as they lie, with a CRC64NVME that the server compares. Whatever is out of the
ordinary is not done here but left to s3fs, which does it, or says why not: a proxy, encryption keys
or owners in fsspec's configuration, another kind of signature, an answer that is no success. After
three of those in a row nothing is tried here for a minute.
"""

import base64
import hashlib
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from awscrt.checksums import crc64nvme  # pyright: ignore[reportMissingTypeStubs]

from ray_ckpt.storage.s3.http_lines import HttpAnswer, HttpLines
from ray_ckpt.storage.s3.sign import Keys, Request, signed

CHECKSUM_HEADER = "x-amz-checksum-crc64nvme"
_KEYS_LAST_S = 10.0
"""So long what the client signs with is not asked for again; it renews it minutes ahead."""
_EXAMPLE = "k"
"""A key, of which botocore says the address."""
_SMALL_BYTES = 128 << 10
"""So much of an object is read without knowing how large it is."""
_MAX_FAILURES = 3
_REST_S = 60.0


def checksum_of(body: bytes | memoryview) -> str:
    """CRC64NVME as S3 writes it: 8 bytes in base64."""
    value: int = cast(Any, crc64nvme)(body)
    return base64.b64encode(value.to_bytes(8, "big")).decode()


def open_wire(file_system: Any, bucket: str) -> "S3Wire | None":
    """The way to the objects of `bucket`, with the keys of an s3fs file system.

    None where only s3fs knows how to ask.
    """
    _sync(file_system, file_system.set_session)
    client = _sync(file_system, file_system.get_s3, bucket)
    config = client.meta.config
    if not _is_ordinary(file_system, config, bucket):
        return None
    example = {"Bucket": bucket, "Key": _EXAMPLE}
    address = _sync(file_system, client.generate_presigned_url, "get_object", example)
    server = urlsplit(str(address))
    verify = _verify(file_system)
    if verify is False or _is_behind_a_proxy(server):
        return None
    lines = HttpLines(
        server,
        connect_s=config.connect_timeout,
        silence_s=config.read_timeout,
        context=_tls(verify) if server.scheme == "https" else None,
    )
    sends_checksums = config.request_checksum_calculation != "when_required"
    return S3Wire(lines, _Keys(file_system, client), server, sends_checksums=sends_checksums)


def _is_ordinary(file_system: Any, config: Any, bucket: str) -> bool:
    """Whether nothing is asked for that is not written here."""
    asks_for_more = file_system.anon or file_system.s3_additional_kwargs or file_system.req_kw
    is_signed_so = config.signature_version in (None, "s3v4")
    is_bucket = not bucket.endswith("--x-s3") and ":" not in bucket  # no directory, no access point
    has_own_way = config.proxies or config.client_cert
    return is_signed_so and is_bucket and not asks_for_more and not has_own_way


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """An answer to a GET of a range."""

    num_bytes: int
    """Of the range: fewer than were asked for if the object ends before."""
    total_bytes: int
    """Of the whole object."""


class S3Wire:
    """PUTs and GETs of one bucket; None is the answer where s3fs must be asked."""

    def __init__(
        self, lines: HttpLines, keys: "_Keys", server: SplitResult, *, sends_checksums: bool
    ) -> None:
        self.sends_checksums = sends_checksums
        """Whether a CRC64NVME goes with what is put; people can say that their server has none."""
        self._lines = lines
        self._keys = keys
        self._host = server.netloc
        self._prefix = server.path.removesuffix(_EXAMPLE)
        self._failures = 0
        self._rests_until = 0.0

    def put(
        self, key: str, body: bytes | memoryview, *, has_checksum: bool = True, **query: str
    ) -> str | None:
        """The ETag of the object, or of the part of an upload that `query` names.

        What arrived is what left: the server has said the checksum, or its ETag is the MD5.
        """
        headers = {"content-length": str(memoryview(body).nbytes)}
        if self.sends_checksums and has_checksum:
            headers[CHECKSUM_HEADER] = checksum_of(body)
        answer = self._ask(self._request("PUT", key, headers, **query), body)
        if answer is None:
            return None
        is_proven = answer.status == 200 and _is_proven(answer, headers, body)
        self._count(is_good=is_proven)
        return answer.headers.get("etag") if is_proven else None

    def read(self, key: str) -> bytes | None:
        """A whole object, if it is a small one.

        Raises:
            FileNotFoundError: the server says that it is not there.
        """
        room = memoryview(bytearray(_SMALL_BYTES))
        answer = self._ask(self._request("GET", key, {"x-amz-checksum-mode": "ENABLED"}), into=room)
        if answer is None:
            return None
        self._count(is_good=answer.status in (200, 404))
        if answer.status == 404:
            raise FileNotFoundError(key)
        is_whole = answer.headers.get("content-length") == str(answer.num_bytes)
        body = room[: answer.num_bytes]
        return (
            bytes(body) if answer.status == 200 and is_whole and _is_sound(answer, body) else None
        )

    def get(self, key: str, offset: int, into: memoryview) -> Got | None:
        """The bytes from `offset` on are in `into`, as many as there are and there is room for."""
        headers = {"range": f"bytes={offset}-{offset + into.nbytes - 1}"}
        answer = self._ask(self._request("GET", key, headers), into=into)
        if answer is None:
            return None
        got = _got(answer, offset)
        self._count(is_good=got is not None)
        return got

    def _ask(
        self, request: Request, body: bytes | memoryview = b"", into: memoryview | None = None
    ) -> HttpAnswer | None:
        if time.monotonic() < self._rests_until:
            return None
        told = signed(request, self._keys.now(), datetime.now(UTC))
        target = f"{request.path}?{request.query}" if request.query else request.path
        first = f"{request.method} {target} HTTP/1.1"
        head = "\r\n".join((first, *(f"{name}: {value}" for name, value in told.items()), "", ""))
        try:
            return self._lines.ask(head.encode(), body, into)
        except OSError:
            self._count(is_good=False)
            return None

    def _request(self, method: str, key: str, headers: dict[str, str], **query: str) -> Request:
        return Request(
            method=method,
            path=self._prefix + quote(key, safe="/~"),
            query=urlencode(sorted(query.items())),
            headers={"host": self._host, **headers},
        )

    def _count(self, *, is_good: bool) -> None:
        self._failures = 0 if is_good else self._failures + 1
        if self._failures >= _MAX_FAILURES:
            self._failures, self._rests_until = 0, time.monotonic() + _REST_S


def _is_sound(answer: HttpAnswer, body: memoryview) -> bool:
    """Whether the body is what was stored once, as far as the server has noted a checksum of it."""
    said = answer.headers.get(CHECKSUM_HEADER)
    if said is not None:
        return said == checksum_of(body)
    said = answer.headers.get("x-amz-checksum-crc32")
    own = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    return said is None or said == own


def _is_proven(answer: HttpAnswer, headers: Mapping[str, str], body: bytes | memoryview) -> bool:
    said = answer.headers.get(CHECKSUM_HEADER)
    if said is not None and CHECKSUM_HEADER in headers:
        return said == headers[CHECKSUM_HEADER]
    own = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return answer.headers.get("etag", "").strip('"') == own


def _got(answer: HttpAnswer, offset: int) -> Got | None:
    if answer.status == 200 and offset == 0 and answer.num_bytes:  # it takes no ranges
        return Got(num_bytes=answer.num_bytes, total_bytes=answer.num_bytes)
    total = answer.headers.get("content-range", "").rpartition("/")[2]
    if answer.status != 206 or not answer.num_bytes or not total.isdecimal():
        return None
    return Got(num_bytes=answer.num_bytes, total_bytes=int(total))


class _Keys:
    """What an s3fs client signs with, as it is now."""

    def __init__(self, file_system: Any, client: Any) -> None:
        self._file_system = file_system
        self._client = client
        self._held: tuple[Keys, float] | None = None

    def now(self) -> Keys:
        """Asked of the client again every few seconds, because it renews them."""
        held = self._held
        if held is None or time.monotonic() >= held[1]:
            credentials = self._client._get_credentials()  # there is no other way to them
            frozen = _sync(self._file_system, credentials.get_frozen_credentials)
            keys = Keys(
                access_key=frozen.access_key,
                secret_key=frozen.secret_key,
                token=frozen.token,
                region=self._client.meta.region_name or "us-east-1",
            )
            held = self._held = (keys, time.monotonic() + _KEYS_LAST_S)
        return held[0]


def _verify(file_system: Any) -> bool | str:
    """Whether the server must prove who it is, or the certificates of who may say so."""
    verify = file_system.client_kwargs.get("verify")
    if verify is None:
        verify = file_system.session.get_config_variable("ca_bundle") or True
    return verify


def _tls(verify: bool | str) -> ssl.SSLContext:
    from botocore import httpsession  # pyright: ignore[reportMissingTypeStubs]

    path = str(cast(Any, httpsession).get_cert_path(verify))
    if Path(path).is_dir():
        return ssl.create_default_context(capath=path)
    return ssl.create_default_context(cafile=path)


def _is_behind_a_proxy(server: SplitResult) -> bool:
    proxies = urllib.request.getproxies()
    return server.scheme in proxies and not urllib.request.proxy_bypass(server.hostname or "")


def _sync(file_system: Any, ask: Callable[..., Any], *args: Any) -> Any:
    """What a coroutine of s3fs's loop gives."""
    from fsspec import asyn  # pyright: ignore[reportMissingTypeStubs]

    return cast(Any, asyn).sync(file_system.loop, ask, *args)
