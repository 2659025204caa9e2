"""Bulk bytes on sockets of our own: what is sent arrives, what is unusual is left to s3fs."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import fsspec.config
import pytest

from ray_ckpt.core.errors import AuthorizationError
from ray_ckpt.storage.s3 import wire as s3_wire
from ray_ckpt.storage.s3.client import make_file_system
from ray_ckpt.storage.s3.store import S3Store
from ray_ckpt.storage.s3.upload import PART_BYTES
from ray_ckpt.storage.s3.wire import Got, S3Wire, open_wire
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint
from tests.servers.tls import tls_before

pytestmark = pytest.mark.s3
DATA = os.urandom(100_000)


def wire_to(root: str) -> S3Wire:
    wire = open_wire(make_file_system(), bucket_of(root))
    assert wire is not None
    return wire


def bucket_of(root: str) -> str:
    return root.removeprefix("s3://").partition("/")[0]


def key_at(root: str, name: str) -> str:
    return f"{root.removeprefix('s3://').partition('/')[2]}/{name}"


@pytest.mark.parametrize("name", ["a", "step 5/__0_0+1.distcp", "ü(1)~/%41&b=c?d#e"])
def test_what_is_put_is_there_under_its_own_name(s3_root: str, name: str) -> None:
    etag = wire_to(s3_root).put(key_at(s3_root, name), DATA)
    store = S3Store(s3_root)
    assert store.read(name) == DATA
    info = store.stat(name)
    assert info is not None
    assert info.version == etag


def test_a_range_comes_as_far_as_the_object_goes(s3_root: str) -> None:
    S3Store(s3_root).write("a", DATA)
    room = memoryview(bytearray(1000))
    got = wire_to(s3_root).get(key_at(s3_root, "a"), len(DATA) - 10, room)
    assert got == Got(num_bytes=10, total_bytes=len(DATA))
    assert room[:10] == DATA[-10:]


@pytest.mark.parametrize("offset", [100_000, 200_000])
def test_a_range_behind_the_end_is_left_to_s3fs(s3_root: str, offset: int) -> None:
    S3Store(s3_root).write("a", DATA)
    assert wire_to(s3_root).get(key_at(s3_root, "a"), offset, memoryview(bytearray(9))) is None


def test_what_is_not_there_is_left_to_s3fs(s3_root: str) -> None:
    assert wire_to(s3_root).get(key_at(s3_root, "a"), 0, memoryview(bytearray(9))) is None


def test_a_large_object_comes_back_in_ranges(s3_root: str, proxy: S3Proxy, tmp_path: Path) -> None:
    data = os.urandom(1000) * (3 * PART_BYTES // 1000 + 5)
    (tmp_path / "there").write_bytes(data)
    store = S3Store(s3_root)
    store.upload(tmp_path / "there", "a")
    proxy.requests.clear()
    store.download("a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert [line.partition(" ")[0] for line in proxy.requests] == ["GET"] * 4


def test_an_empty_object_comes_back(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    store = S3Store(s3_root)
    store.upload(tmp_path / "there", "a")
    (tmp_path / "back").write_bytes(b"old")
    store.download("a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


def test_after_three_failures_nothing_is_tried_for_a_while(s3_root: str, proxy: S3Proxy) -> None:
    wire, key = wire_to(s3_root), key_at(s3_root, "a")
    proxy.fail(match="PUT", status=503, code="SlowDown")
    assert [wire.put(key, DATA) for _ in range(5)] == [None] * 5
    assert len(proxy.requests) == 3
    proxy.recover()
    assert wire.put(key, DATA) is None
    assert len(proxy.requests) == 3


def test_after_the_rest_it_is_tried_again(
    s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_wire, "_REST_S", 0.0)
    wire, key = wire_to(s3_root), key_at(s3_root, "a")
    proxy.fail(match="PUT", status=503, code="SlowDown", times=3)
    assert [wire.put(key, DATA) is None for _ in range(4)] == [True, True, True, False]


def test_one_failure_is_made_good_by_s3fs(s3_root: str, proxy: S3Proxy, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    proxy.fail(match="PUT", status=500, code="InternalError", times=1)
    S3Store(s3_root).upload(tmp_path / "a", "a")
    assert S3Store(s3_root).read("a") == DATA
    assert [line.partition(" ")[0] for line in proxy.requests] == ["PUT", "PUT", "GET"]


def test_keys_that_were_replaced_are_found_again(
    s3_root: str,
    proxy: S3Proxy,
    s3_server: S3Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    store = S3Store(s3_root)
    (tmp_path / "a").write_bytes(DATA)
    store.upload(tmp_path / "a", "a")
    for name, value in s3_server.rotated().environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.url)
    proxy.revoke(s3_server.access_key)
    store.upload(tmp_path / "a", "b")
    proxy.requests.clear()
    store.upload(tmp_path / "a", "c")
    assert len(proxy.requests) == 1  # by the newer keys, at once
    assert store.read("c") == DATA


def test_a_reader_may_not_put(
    s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.read_only().environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a").write_bytes(DATA)
    assert wire_to(s3_root).put(key_at(s3_root, "a"), DATA) is None
    with pytest.raises(AuthorizationError):
        S3Store(s3_root).upload(tmp_path / "a", "a")


def test_the_same_over_tls(
    s3_root: str,
    s3_server: S3Endpoint,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = os.urandom(1000) * 3000
    with tls_before(urlsplit(s3_server.url).port or 0, *certificate) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
        wire, key = wire_to(s3_root), key_at(s3_root, "a")
        assert wire.put(key, data) is not None
        room = memoryview(bytearray(len(data)))
        assert wire.get(key, 0, room) == Got(num_bytes=len(data), total_bytes=len(data))
        assert room == data
        monkeypatch.delenv("AWS_CA_BUNDLE")
        assert wire_to(s3_root).put(key, data) is None  # nobody vouches for the server


@pytest.mark.parametrize(
    "asked",
    [
        {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms"}},
        {"requester_pays": True},
        {"anon": True},
        {"config_kwargs": {"signature_version": "s3"}},
        {"config_kwargs": {"proxies": {"http": "http://127.0.0.1:1"}}},
        {"client_kwargs": {"verify": False}},
    ],
)
def test_whoever_asks_for_more_is_served_by_s3fs(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", asked)
    assert open_wire(make_file_system(), bucket_of(s3_root)) is None


def test_a_proxy_of_the_environment_is_not_passed_by(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert open_wire(make_file_system(), bucket_of(s3_root)) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert open_wire(make_file_system(), bucket_of(s3_root)) is not None


@pytest.mark.parametrize("bucket", ["name--x-s3", "arn:aws:s3:eu-west-3:1:accesspoint/a"])
@pytest.mark.usefixtures("s3_root")
def test_buckets_with_ways_of_their_own_are_left_to_s3fs(bucket: str) -> None:
    assert open_wire(make_file_system(), bucket) is None


class _Simple(BaseHTTPRequestHandler):
    """A store that knows no checksums: its ETags are all the same."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]]
    etag = ""

    def do_PUT(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response_only(200)
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.mark.parametrize(
    ("etag", "is_proven"), [("5d41402abc4b2a76b9719d911017c592", True), ("0" * 32, False)]
)
def test_without_a_checksum_in_the_answer_the_etag_is_the_proof(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, etag: str, is_proven: bool
) -> None:
    handler = type("Handler", (_Simple,), {"seen": [], "etag": etag})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        sent = wire_to(s3_root).put("a", b"hello")
        server.shutdown()
    assert (sent is not None) == is_proven
    assert s3_wire.CHECKSUM_HEADER not in handler.seen[0]
