"""Objects that are sent as their bytes come."""

import random

import pytest

from ray_ckpt.storage.disk.ordered_write import OrderedWrite
from ray_ckpt.storage.s3.store import S3Store

pytestmark = pytest.mark.s3
DATA = random.Random(0).randbytes(33 << 20)


def test_a_small_object_is_one_put_once_it_is_whole(s3_root: str) -> None:
    store = S3Store(s3_root)
    blocks = store.begin("a", 100)
    blocks.put(0, memoryview(DATA), 100)
    assert store.stat("a") is None
    assert not list(store.list_unfinished(""))
    blocks.finish(100)
    assert store.read("a") == DATA[:100]


def test_an_object_of_no_bytes_is_there(s3_root: str) -> None:
    store = S3Store(s3_root)
    entry = OrderedWrite(store.begin("a", 100), name="a", algorithm="crc64nvme").close()
    assert (store.read("a"), entry.size_bytes) == (b"", 0)


@pytest.mark.parametrize("said_bytes", [100, len(DATA)])
def test_an_object_is_whole_whatever_size_was_said(s3_root: str, said_bytes: int) -> None:
    store = S3Store(s3_root)
    write = OrderedWrite(store.begin("a", said_bytes), name="a", algorithm="crc64nvme")
    write.write(memoryview(DATA))
    assert store.stat("a") is None
    assert write.close().size_bytes == len(DATA)
    with store.open_read("a") as stream:
        assert stream.read() == DATA
    assert not list(store.list_unfinished(""))


@pytest.mark.parametrize("said_bytes", [100, len(DATA)])
def test_nothing_is_left_of_one_that_is_given_up(s3_root: str, said_bytes: int) -> None:
    store = S3Store(s3_root)
    write = OrderedWrite(store.begin("a", said_bytes), name="a", algorithm="crc64nvme")
    write.write(memoryview(DATA)[: 20 << 20])
    write.discard()
    assert store.stat("a") is None
    assert not list(store.list_unfinished(""))
