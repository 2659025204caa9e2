"""A keeper holds what its owner gave it, for whom it may concern, and no longer than it should."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.digests import digest_of
from ray_ckpt.storage.host_memory import keeper
from ray_ckpt.storage.host_memory.copies import (
    Around,
    FileInMemory,
    HeldFile,
    InSegment,
    Keeper,
    held,
    name_of,
)
from tests.waiting import wait_for

SEGMENT = bytes(range(256)) * 40
FILE = b"".join(
    [b"<front>", SEGMENT[512:1512], b"<end>", b"not held", b"<front>", SEGMENT[:9], b"<end>"]
)
LONG_S = 300.0


def _entry(data: bytes = FILE) -> FileEntry:
    return FileEntry(path="a", size_bytes=len(data), digest=digest_of(data, "crc64nvme"))


def _hold(owner: Keeper) -> None:
    """FILE, as far as its pieces say."""
    second = 7 + 1000 + 5 + 8
    pieces = (
        Around(0, b"<front>"),
        InSegment(7, 5, 512, 1000),
        Around(1007, b"<end>"),
        InSegment(second + 7, 5, 0, 9),
        Around(second + 16, b"<end>"),
        Around(second, b"<front>"),
    )
    descriptor = os.memfd_create("segment")
    os.write(descriptor, SEGMENT)
    owner.hold([FileInMemory(entry=_entry(), bytes_of_it=pieces)], {5: descriptor})
    os.close(descriptor)


@pytest.fixture
def owner() -> Iterator[Keeper]:
    """Who has given FILE to a keeper."""
    owner = Keeper(stays_s=LONG_S)
    _hold(owner)
    yield owner
    owner.close()


def _found() -> HeldFile:
    return wait_for(lambda: held(_entry()))


def _pid() -> int:
    """Of the process that holds FILE."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect("\0" + name_of(_entry()))
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[:4], "little")


def _is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_what_is_held_is_read_in_any_piece(owner: Keeper) -> None:
    file = _found()
    first, last = FILE.index(b"not held"), FILE.index(b"not held") + len(b"not held")
    for begin, end in [(0, first), (3, 900), (7, 1007), (1000, 1010), (last, len(FILE)), (8, 8)]:
        middle = (begin + end) // 2
        buffers = [memoryview(bytearray(middle - begin)), memoryview(bytearray(end - middle))]
        assert file.read_into_each(begin, buffers)
        assert b"".join(buffers) == FILE[begin:end]
    file.close()


@pytest.mark.parametrize("begin", [0, 1012, 1013, 1019, len(FILE) - 1, len(FILE)])
def test_what_is_not_held_whole_is_not_read(owner: Keeper, begin: int) -> None:
    file = _found()
    assert not file.read_into_each(begin, [memoryview(bytearray(len(FILE)))])
    file.close()


def test_another_content_is_another_file(owner: Keeper) -> None:
    _found().close()
    assert held(_entry(FILE + b"more")) is None


def test_what_is_being_overwritten_is_not_given(owner: Keeper) -> None:
    _found().close()
    owner.spoil()
    assert held(_entry()) is None
    _hold(owner)
    _found().close()


def test_a_keeper_ends_with_its_owners_word() -> None:
    owner = Keeper(stays_s=LONG_S)
    _hold(owner)
    _found().close()
    pid = _pid()
    owner.close()
    wait_for(lambda: _is_gone(pid))
    assert held(_entry()) is None


def test_who_holds_the_same_does_not_fail(owner: Keeper) -> None:
    _found().close()
    pid = _pid()
    another = Keeper(stays_s=LONG_S)
    _hold(another)
    another.close()
    assert _pid() == pid


def _own(stays_s: float, spoils: bool, ready: Connection) -> None:
    owner = Keeper(stays_s=stays_s)
    _hold(owner)
    _found().close()
    pid = _pid()
    if spoils:
        owner.spoil()
    ready.send(pid)
    signal.pause()


def _owner_that_dies(stays_s: float, *, spoils: bool = False) -> int:
    """The keeper of a process that was killed, and maybe about to overwrite its copies."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process: BaseProcess = context.Process(target=_own, args=(stays_s, spoils, there))
    process.start()
    pid = here.recv()
    process.kill()
    process.join()
    return pid


def test_memory_that_holds_nothing_good_is_free_at_once() -> None:
    pid = _owner_that_dies(LONG_S, spoils=True)
    wait_for(lambda: _is_gone(pid))


def test_a_keeper_outlives_its_owner_and_ends_with_a_readers_word() -> None:
    _owner_that_dies(LONG_S)
    file, pid = _found(), _pid()
    file.release()
    wait_for(lambda: _is_gone(pid))


def test_a_keeper_waits_while_it_is_read_from_and_then_so_long_for_the_next() -> None:
    _owner_that_dies(stays_s=2.0)
    file, pid = _found(), _pid()
    assert file.read_into_each(0, [memoryview(bytearray(100))])
    assert not _is_gone(pid)
    file.close()
    wait_for(lambda: _is_gone(pid))


def test_the_readers_word_ends_no_keeper_whose_owner_lives(owner: Keeper) -> None:
    _found().release()
    _found().close()


def test_an_owner_whose_keeper_was_killed_is_told(owner: Keeper) -> None:
    _found().close()
    pid = _pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: _is_gone(pid))
    with pytest.raises(OSError):
        _hold(owner)


def test_more_segments_than_a_message_carries_are_refused(owner: Keeper) -> None:
    with pytest.raises(OSError, match="300 pieces of memory"):
        owner.hold([], dict.fromkeys(range(300), 0))


@pytest.mark.parametrize(("cached", "is_short"), [(0, True), (500, False)])
def test_a_full_container_is_short_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: int, is_short: bool
) -> None:
    """Cached files are no reason: they are given back when somebody asks."""
    monkeypatch.setattr(keeper, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("950\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file 0\n")
    assert keeper.is_short_of_memory() is is_short


def test_a_container_without_a_limit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert not keeper.is_short_of_memory()
