"""A file written in order: its bytes, its digest, and what is left when something goes wrong."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from ray_ckpt.core.errors import ObjectExistsError, StorageFullError, UsageError
from ray_ckpt.storage.disk import file_blocks
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.storage.disk.ordered_write import OrderedWrite

SIZES = [0, 1, 4095, 4096, 4097, (8 << 20) - 1, 8 << 20, (24 << 20) + 5]


def _begun(path: Path, algorithm: str) -> OrderedWrite:
    return OrderedWrite(new_file(path), name=path.name, algorithm=algorithm)


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("is_direct", [True, False])
def test_it_holds_what_was_written_and_knows_its_digest(
    tmp_path: Path, size_bytes: int, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    data = random.Random(size_bytes).randbytes(size_bytes)
    file = _begun(tmp_path / "a.bin", "sha256")
    left = memoryview(data)
    for piece in (1000, 1 << 20, size_bytes):
        file.write(left[:piece])
        left = left[piece:]
    entry = file.close()
    assert (tmp_path / "a.bin").read_bytes() == data
    assert (entry.path, entry.size_bytes) == ("a.bin", size_bytes)
    assert entry.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_bytes_may_be_put_straight_into_its_block(tmp_path: Path) -> None:
    file = _begun(tmp_path / "a", "crc64nvme")
    for number in range(40):
        room = file.room()
        count = min(len(room), 1 << 20)
        room[:count] = bytes([number]) * count
        file.filled(count)
    assert file.size_bytes == 40 << 20
    file.close()
    data = (tmp_path / "a").read_bytes()
    assert [data[at] for at in range(0, len(data), 1 << 20)] == list(range(40))


def test_what_is_there_already_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    file = _begun(tmp_path / "a", "sha256")
    file.write(memoryview(b"theirs"))
    with pytest.raises(ObjectExistsError):
        file.close()
    file.discard()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert (tmp_path / "a").read_text() == "mine"


def test_a_place_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file")
    with pytest.raises(UsageError):
        _begun(tmp_path / "b" / "a", "sha256")


def test_nothing_is_there_before_it_is_whole(tmp_path: Path) -> None:
    file = _begun(tmp_path / "b" / "a", "sha256")
    file.write(memoryview(bytes(20 << 20)))
    assert not (tmp_path / "b/a").exists()
    file.close()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["a"]


def test_what_is_discarded_is_gone(tmp_path: Path) -> None:
    file = _begun(tmp_path / "a", "sha256")
    file.write(memoryview(bytes(20 << 20)))
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_at_the_latest_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _begun(tmp_path / "a", "sha256")

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(file_blocks.os, "pwrite", full)
    with pytest.raises(StorageFullError):
        for _ in range(10):
            file.write(memoryview(bytes(8 << 20)))
    file.discard()
    assert list(tmp_path.iterdir()) == []
