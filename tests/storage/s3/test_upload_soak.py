"""An uploader that is killed every two seconds, on a store that takes one part after the other."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ray_ckpt.storage.digests import describe_file, describe_object
from ray_ckpt.storage.s3.store import S3Store
from ray_ckpt.storage.s3.upload import PART_BYTES
from tests.servers.s3_proxy import S3Proxy
from tests.storage.s3.test_upload import upload
from tests.waiting import wait_for

pytestmark = [pytest.mark.s3, pytest.mark.slow]
SIZE_BYTES = 64 * PART_BYTES
LIFE_S = 2.0
TAKE_S = 0.1
"""For which each part occupies the store: 20 of them in a life."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES // PART_BYTES):
            file.write(os.urandom(1 << 10) * (PART_BYTES >> 10))
    return path


def test_an_upload_that_is_killed_every_two_seconds_ends_and_sends_little_twice(
    s3_root: str, proxy: S3Proxy, source: Path
) -> None:
    """Scenario 40: seconds are counted in parts that the store takes, whatever else runs here."""
    store = S3Store(s3_root)
    proxy.take_slowly(TAKE_S)
    kills = 0
    while store.stat("a/large") is None:
        dies_at_bytes = proxy.taken_bytes + LIFE_S / TAKE_S * PART_BYTES
        life = multiprocessing.get_context("spawn").Process(
            target=upload, args=(s3_root, str(source), "a/large")
        )
        life.start()
        wait_for(lambda d=dies_at_bytes, p=life: proxy.taken_bytes >= d or not p.is_alive())
        if life.is_alive():
            os.kill(life.pid or 0, signal.SIGKILL)
            kills += 1
        life.join()
    assert kills >= 3
    assert proxy.taken_bytes <= 1.1 * SIZE_BYTES
    found = describe_object(store, "a/large", name="large", algorithm="sha256")
    assert found == describe_file(source, "large", "sha256")
    assert store.list_unfinished("a") == []
