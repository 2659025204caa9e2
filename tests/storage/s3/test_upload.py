"""A large file goes to S3 in parts; what a dead or failed upload has sent is not sent again."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ray_ckpt.core.errors import TransientError
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.s3.store import S3Store
from ray_ckpt.storage.s3.upload import PART_BYTES
from tests.servers.s3_proxy import S3Proxy
from tests.waiting import wait_for

pytestmark = pytest.mark.s3
NUM_PARTS = 12
AT_ONCE = 4


@pytest.fixture
def store(s3_root: str, proxy: S3Proxy) -> S3Store:
    return S3Store(s3_root)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of twelve parts, the last one short, no two alike."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        for _ in range(NUM_PARTS - 1):
            file.write(os.urandom(1 << 10) * (PART_BYTES >> 10))
        file.write(os.urandom(1000))
    return path


def parts_put(proxy: S3Proxy) -> list[int]:
    """Numbers of the parts that anybody has begun to send."""
    sent = [line.partition("partNumber=")[2] for line in proxy.requests if "partNumber=" in line]
    return [int(line.partition("&")[0]) for line in sent]


def arrived(store: S3Store) -> int:
    """Whole parts of an upload that has not ended."""
    return sum(write.size_bytes for write in store.list_unfinished("a")) // PART_BYTES


def upload(uri: str, source: str, key: str) -> None:
    S3Store(uri).upload(Path(source), key)


def test_a_large_file_is_sent_once_and_told_of(
    store: S3Store, proxy: S3Proxy, source: Path
) -> None:
    told = Progress()
    told.begin("sends", source.stat().st_size)
    store.upload(source, "a/large", progress=told)
    assert store.read("a/large") == source.read_bytes()
    assert sorted(parts_put(proxy)) == list(range(1, NUM_PARTS + 1))
    assert told.seen()[1] == source.stat().st_size
    assert store.list_unfinished("a") == []


def test_an_upload_that_is_killed_again_and_again_sends_little_twice(
    store: S3Store, proxy: S3Proxy, source: Path, s3_root: str
) -> None:
    """Scenario 40: SIGKILL with a third, two thirds and nearly all of the parts there."""
    kills = (4, 8, 11)
    for there in kills:
        later = "|".join(str(number) for number in range(there + 1, NUM_PARTS + 1))
        proxy.hang(match=rf"PUT .*partNumber=({later})(&|$)")
        process = multiprocessing.get_context("spawn").Process(
            target=upload, args=(s3_root, str(source), "a/large")
        )
        process.start()
        wait_for(lambda least=there: arrived(store) == least)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        proxy.recover()
    assert store.stat("a/large") is None
    store.upload(source, "a/large")
    assert store.read("a/large") == source.read_bytes()
    assert set(parts_put(proxy)) == set(range(1, NUM_PARTS + 1))
    assert len(parts_put(proxy)) <= NUM_PARTS + AT_ONCE * len(kills)
    assert store.list_unfinished("a") == []


def test_one_that_fails_at_its_last_part_sends_that_part_alone_again(
    store: S3Store, proxy: S3Proxy, source: Path
) -> None:
    proxy.fail(
        match=rf"PUT .*partNumber={NUM_PARTS}(&|$)", status=400, code="RequestTimeout", times=9
    )
    with pytest.raises(TransientError):
        store.upload(source, "a/large")
    sent = len(parts_put(proxy))
    proxy.recover()
    store.upload(source, "a/large")
    assert parts_put(proxy)[sent:] == [NUM_PARTS]
    assert store.read("a/large") == source.read_bytes()


def test_parts_of_another_content_are_sent_anew(
    store: S3Store, proxy: S3Proxy, source: Path
) -> None:
    proxy.fail(match="POST .*uploadId=", status=400, code="RequestTimeout")
    with pytest.raises(TransientError):
        store.upload(source, "a/large")
    proxy.recover()
    with source.open("r+b") as file:
        file.seek(5 * PART_BYTES)
        file.write(b"other")
    sent = len(parts_put(proxy))
    store.upload(source, "a/large")
    assert parts_put(proxy)[sent:] == [6]
    assert store.read("a/large") == source.read_bytes()


def test_without_the_right_to_list_uploads_everything_is_sent(
    store: S3Store, proxy: S3Proxy, source: Path
) -> None:
    proxy.fail(match=r"GET .*\?uploads", status=403, code="AccessDenied")
    store.upload(source, "a/large")
    assert store.read("a/large") == source.read_bytes()


def test_an_upload_that_somebody_else_has_ended_is_told_of_and_goes_through_the_next_time(
    store: S3Store, proxy: S3Proxy, source: Path
) -> None:
    proxy.meanwhile(
        match="PUT .*partNumber=7(&|$)", do=lambda: store.abandon(store.list_unfinished("a"))
    )
    with pytest.raises(TransientError, match="somebody has ended the upload"):
        store.upload(source, "a/large")
    store.upload(source, "a/large")
    assert store.read("a/large") == source.read_bytes()


def test_a_small_file_is_one_put(store: S3Store, proxy: S3Proxy, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(PART_BYTES))
    store.upload(tmp_path / "small", "a/small")
    assert [line.split("?")[0] for line in proxy.requests if line.startswith(("PUT", "POST"))] == [
        f"PUT /{store.uri.removeprefix('s3://')}/a/small"
    ]
