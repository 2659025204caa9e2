"""An S3 server that fails, is silent, slow or full: what is raised, and what is tried again."""

import os
from collections.abc import Callable
from pathlib import Path

import fsspec.config
import pytest

from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    IntegrityError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.core.failures import BLOCKS, RETRIES, classify
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.publish import publish_export
from ray_ckpt.storage.digests import find_damage
from ray_ckpt.storage.disk.ordered_write import OrderedWrite
from ray_ckpt.storage.s3 import client as s3_client
from ray_ckpt.storage.s3.store import S3Store
from tests.servers.s3_proxy import PIECE_BYTES, S3Proxy
from tests.servers.seaweed import S3Endpoint
from tests.storage.copies.test_publish import make_export

pytestmark = pytest.mark.s3
SHORT = {"connect_timeout": 1, "read_timeout": 1}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person says in fsspec's configuration that nobody should wait for long."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": SHORT})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def store(s3_root: str, proxy: S3Proxy) -> S3Store:
    return S3Store(s3_root)


def uploaded(store: S3Store) -> None:
    store.upload(Path(__file__), "a")


def in_parts(store: S3Store) -> None:
    write = OrderedWrite(store.begin("parts", 40 << 20), name="parts", algorithm="sha256")
    write.write(memoryview(bytes(40 << 20)))
    write.close()


def streamed(store: S3Store) -> None:
    with store.open_read("a") as stream:
        stream.read()


VERBS: dict[str, Callable[[S3Store], object]] = {
    "read": lambda store: store.read("a"),
    "read_into": lambda store: store.read_into("a", 0, memoryview(bytearray(1))),
    "open_read": streamed,
    "write": lambda store: store.write("a", b"x"),
    "create": lambda store: store.create("new", b"x"),
    "upload": uploaded,
    "parts": in_parts,
    "copy": lambda store: store.copy("a", "b"),
    "stat": lambda store: store.stat("a"),
    "list_objects": lambda store: list(store.list_objects("")),
    "delete": lambda store: store.delete(["a"]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_is_worth_another_try(
    store: S3Store, proxy: S3Proxy, verb: str
) -> None:
    """Nor takes a byte: of "parts" it is sent more than its kernel has room for."""
    proxy.hang(match="partNumber=" if verb == "parts" else "")
    with pytest.raises(TransientError) as caught:
        VERBS[verb](store)
    assert caught.value.do


def test_a_silent_server_is_known_as_one_within_two_minutes(store: S3Store, proxy: S3Proxy) -> None:
    """By what each request may take at most, and how many there are: nobody here waits for it."""
    proxy.fail(match="GET .*/a", status=500, code="InternalError")
    with pytest.raises(TransientError):
        store.read("a")
    assert len(proxy.requests) == 1 + s3_client.ATTEMPTS  # first on a socket of our own
    longest_waits_s = sum(2**number for number in range(s3_client.ATTEMPTS - 1))
    assert (1 + s3_client.ATTEMPTS) * s3_client.SILENCE_S + longest_waits_s < 105


def test_who_asks_for_more_attempts_gets_them(
    s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    proxy.fail(match="GET .*/a", status=500, code="InternalError")
    with pytest.raises(TransientError):
        S3Store(s3_root).read("a")
    assert len(proxy.requests) == 1 + 4


@pytest.mark.usefixtures("impatient")
def test_a_slow_server_is_waited_for(store: S3Store, proxy: S3Proxy, tmp_path: Path) -> None:
    """Scenario 41: each pause is shorter than our patience, all of them together are longer."""
    data, pause_s = os.urandom(400_000), 0.3
    store.write("a", data)
    assert pause_s < SHORT["read_timeout"] < pause_s * len(data) / PIECE_BYTES
    proxy.be_slow(pause_s)
    assert store.read("a") == data
    store.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("verb", ["read", "read_into", "open_read"])
def test_bytes_that_break_off_are_asked_for_again(
    store: S3Store, proxy: S3Proxy, verb: str
) -> None:
    """Scenario 41: the connection is reset in the middle of an object."""
    data = os.urandom(300_000)
    store.write("a", data)
    proxy.drop(match="GET .*/a", after_bytes=100_000, times=2)
    buffer = bytearray(300_000)
    if verb == "read":
        buffer[:] = store.read("a")
    elif verb == "read_into":
        store.read_into("a", 0, memoryview(buffer))
    else:
        with store.open_read("a") as stream:
            buffer[:] = stream.read()
    assert buffer == data


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_what_fails_twice_and_then_works_has_worked(
    store: S3Store, proxy: S3Proxy, code: str
) -> None:
    """Scenario 41: SlowDown, and an error of the server's own."""
    status = 503 if code == "SlowDown" else 500
    proxy.fail(match="PUT .*/a", status=status, code=code, times=2)
    uploaded(store)
    assert store.read("a") == Path(__file__).read_bytes()


@pytest.mark.usefixtures("impatient")
def test_a_copy_to_a_place_that_fails_in_every_way_arrives_whole(
    root: str, s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 41: throttled, silent, broken off and wrong once each, in the middle of a copy."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    source = open_catalog(root)
    export = make_export(source)
    proxy.fail(match="PUT .*safetensors", status=503, code="SlowDown", times=1)
    proxy.fail(match="PUT .*safetensors", status=500, code="InternalError", times=1)
    proxy.hang(match="PUT .*config.json", times=1)
    proxy.drop(match="GET ", after_bytes=10, times=1)
    proxy.fail(match="PUT .*manifest.json", status=500, code="InternalError", times=1, after=True)
    publish_export(source, export, s3_root)
    copy = open_catalog(s3_root)
    assert copy.export("hf", 5).manifest == export.manifest
    assert find_damage(copy.store, "exports/hf/step-5", export.manifest) == []


CLASSES: tuple[tuple[int, str, type[RayCkptError]], ...] = (
    (503, "SlowDown", ThrottledError),
    (503, "ServiceUnavailable", ThrottledError),
    (429, "TooManyRequestsException", ThrottledError),
    (500, "InternalError", TransientError),
    (502, "", TransientError),
    (400, "RequestTimeout", TransientError),
    (400, "BadDigest", TransientError),
    (404, "NoSuchUpload", TransientError),
    (409, "OperationAborted", ConflictError),
    (412, "PreconditionFailed", ConflictError),
    (403, "AccessDenied", AuthorizationError),
    (403, "InvalidAccessKeyId", AuthorizationError),
    (403, "SignatureDoesNotMatch", AuthorizationError),
    (400, "ExpiredToken", AuthorizationError),
    (401, "Unauthorized", AuthorizationError),
    (507, "XMinioStorageFull", StorageFullError),
    (403, "QuotaExceeded", StorageFullError),
    (400, "XMinioAdminBucketQuotaExceeded", StorageFullError),
    (404, "NoSuchBucket", ObjectNotFoundError),
    (400, "EntityTooLarge", StorageError),
)
AT_ONCE = (AuthorizationError, StorageFullError)


@pytest.mark.parametrize(("status", "code", "kind"), CLASSES)
def test_every_refusal_has_its_class(
    store: S3Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind
) -> None:
    """Scenario 38: what a person must mend is dead or blocked, with the way out."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fail(match="", status=status, code=code)
    with pytest.raises(RayCkptError) as caught:
        S3Store(store.uri).write("a", b"x")
    assert type(caught.value) is kind
    assert caught.value.where == f"{store.uri}/a"
    if kind in AT_ONCE:
        assert caught.value.do
        assert classify(caught.value) in BLOCKS or classify(caught.value) not in RETRIES


@pytest.mark.parametrize(
    ("status", "kind"),
    [(503, ThrottledError), (403, AuthorizationError), (400, AuthorizationError)],
)
def test_a_head_that_has_no_words_has_its_class(
    s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, status: int, kind
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fail(match="HEAD ", status=status, code="")
    with pytest.raises(kind):
        S3Store(s3_root).stat("a")


def test_the_store_says_how_long_to_wait(
    s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.fail(match="PUT ", status=503, code="SlowDown", headers={"Retry-After": "77"})
    with pytest.raises(ThrottledError) as caught:
        S3Store(s3_root).write("a", b"x")
    assert caught.value.retry_after_s == 77.0


def test_what_was_read_is_compared_with_what_the_store_has_noted(
    store: S3Store, proxy: S3Proxy
) -> None:
    """The checksum of the upload comes back with the bytes; here these are others."""
    store.write("a", b"what was stored")
    proxy.spoil(match="GET .*/a")
    with pytest.raises(IntegrityError):
        store.read("a")


def test_keys_that_are_rotated_in_the_middle_of_an_upload_are_taken(
    s3_root: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scenario 41: who rotates them writes the new ones to where the old ones came from."""
    keys, old = tmp_path / "credentials", proxy.endpoint
    write_keys(keys, old)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store, data = S3Store(s3_root), os.urandom(1 << 20) * 33
    write = OrderedWrite(store.begin("a", len(data)), name="a", algorithm="sha256")
    write.write(memoryview(data)[: 16 << 20])
    proxy.revoke(old.access_key)
    write_keys(keys, old.rotated())
    write.write(memoryview(data)[16 << 20 :])
    write.close()
    assert store.read("a") == data


def test_keys_that_nobody_replaces_are_refused(store: S3Store, proxy: S3Proxy) -> None:
    proxy.revoke(proxy.endpoint.access_key)
    with pytest.raises(AuthorizationError, match="ExpiredToken") as caught:
        store.write("a", b"x")
    assert "AWS_SESSION_TOKEN" in caught.value.do


def test_a_profile_that_nobody_has_made_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AuthorizationError, match="nobody"):
        S3Store("s3://bucket/run")


def write_keys(path: Path, pair: S3Endpoint) -> None:
    key, secret = pair.access_key, pair.secret_key
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
