"""What a keeper holds: where each file's bytes lie in memory, and how both ends come by them.

    table      one descriptor: a byte that says whether the copies are good, where the bytes of each
               file lie, and the bytes that stand between tensors
    segments   all others: the memory that the trainer has copied its state to

A file is found by its content, digest and size: what has another content is another file. The
pieces need not cover it; what is not there is read from storage.
"""

import bisect
import contextlib
import errno
import json
import mmap
import os
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.disk.posix import fill
from ray_ckpt.storage.host_memory import keeper
from ray_ckpt.storage.host_memory.keeper import (
    GOOD,
    MESSAGE_BYTES,
    MOST_DESCRIPTORS,
    RELEASE,
    SPOILT,
)

_ANSWER_S = 5.0
"""A keeper that lives answers at once."""
_HEAD_BYTES = 9
"""Of a table: whether it is good, and the length of what says where the bytes lie."""
_TABLE = 0
"""The table's place among the descriptors."""


class Piece(NamedTuple):
    """Bytes of a file that lie together in memory."""

    begin: int
    """In the file."""
    descriptor: int
    """Its place among the keeper's descriptors."""
    offset: int
    """In the memory behind it."""
    num_bytes: int


class Around(NamedTuple):
    """Bytes of a file that are no tensor's, and are held beside them."""

    begin: int
    data: bytes


class InSegment(NamedTuple):
    """Bytes of a file in a segment of the trainer's memory."""

    begin: int
    segment: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInMemory:
    """A file that was written from memory which still holds its bytes."""

    entry: FileEntry
    bytes_of_it: tuple[Around | InSegment, ...]


def name_of(entry: FileEntry) -> str:
    """What a file's keeper is called."""
    return f"ray_ckpt/{os.getuid()}/{entry.digest}/{entry.size_bytes}"


class Keeper:
    """The owner's end: one keeper process, started at once."""

    def __init__(self, *, stays_s: float) -> None:
        """It outlives this process by `stays_s` seconds, unless somebody asks for the copies."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-S", keeper.__file__]
            self._start = subprocess.Popen(
                [*command, str(theirs.fileno()), str(stays_s)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
        self._table: mmap.mmap | None = None

    def spoil(self) -> None:
        """The copies are about to be overwritten: from now on nobody takes them for good."""
        if self._table is not None:
            self._table[:1] = SPOILT

    def hold(self, files: Sequence[FileInMemory], segments: Mapping[int, int]) -> None:
        """These files and no others are held; `segments` are descriptors by number.

        Raises:
            OSError: they are not: the keeper is gone, or there are more segments than it can take.
        """
        if len(segments) >= MOST_DESCRIPTORS:
            raise OSError(errno.E2BIG, f"the copy lies in {len(segments)} pieces of memory")
        self._start.wait()
        descriptor = os.memfd_create("ray_ckpt copies")
        try:
            data = _table(files, list(segments))
            os.truncate(descriptor, len(data))
            table = mmap.mmap(descriptor, len(data))
            table[:] = data
            names = json.dumps({"names": [name_of(file.entry) for file in files]})
            descriptors = [descriptor, *segments.values()]
            socket.send_fds(self._socket, [names.encode()], descriptors)
        finally:
            os.close(descriptor)
        self._table = table
        table[:1] = GOOD

    def close(self) -> None:
        """The keeper has ended, and what it held is free."""
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps({"ends": True}).encode())
        self._socket.close()
        self._start.wait()


def _table(files: Sequence[FileInMemory], segments: Sequence[int]) -> bytes:
    """Not good yet."""
    places = {number: place for place, number in enumerate(segments, start=_TABLE + 1)}
    offsets: dict[bytes, int] = {}
    around = bytearray()

    def piece(one: Around | InSegment) -> Piece:
        if isinstance(one, InSegment):
            return Piece(one.begin, places[one.segment], one.offset, one.num_bytes)
        if one.data not in offsets:  # the same for all tensors of one dtype and shape
            offsets[one.data] = len(around)
            around.extend(one.data)
        return Piece(one.begin, _TABLE, offsets[one.data], len(one.data))

    of_each = {name_of(f.entry): [piece(one) for one in f.bytes_of_it] for f in files}
    head = json.dumps(of_each).encode()
    return SPOILT + len(head).to_bytes(_HEAD_BYTES - 1, "little") + head + around


class HeldFile:
    """A reader's end: one file in memory, as long as `close` was not called."""

    def __init__(self, connection: socket.socket, descriptors: Sequence[int], name: str) -> None:
        self._connection = connection
        self._descriptors = descriptors
        self._end = weakref.finalize(self, _close, connection, descriptors)
        table = descriptors[_TABLE]
        flag, *length = os.pread(table, _HEAD_BYTES, 0)
        self.is_good = bytes([flag]) == GOOD
        """False while its owner copies a newer state over it."""
        num_bytes = int.from_bytes(bytes(length), "little")
        head = os.pread(table, num_bytes, _HEAD_BYTES)
        of_each: dict[str, list[tuple[int, int, int, int]]] = json.loads(head)
        pieces = sorted(Piece(*piece) for piece in of_each.get(name, ()))
        self._begins = [piece.begin for piece in pieces]
        base = _HEAD_BYTES + num_bytes
        self._pieces = [
            piece._replace(offset=piece.offset + base) if piece.descriptor == _TABLE else piece
            for piece in pieces
        ]

    def read_into_each(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Whether these bytes of the file are here; then they are in the buffers."""
        left = deque(buffer.cast("B") for buffer in buffers if buffer.nbytes)
        pieces = self._within(offset, offset + sum(view.nbytes for view in left))
        return pieces is not None and all(
            fill(self._descriptors[piece.descriptor], piece.offset, _taken(left, piece.num_bytes))
            for piece in pieces
        )

    def _within(self, begin: int, end: int) -> list[Piece] | None:
        """Memory that is the file's bytes from `begin` to `end`; None if some are not here."""
        found: list[Piece] = []
        number = bisect.bisect_right(self._begins, begin) - 1
        while begin < end:
            piece = self._pieces[number] if 0 <= number < len(self._pieces) else None
            if piece is None or not piece.begin <= begin < piece.begin + piece.num_bytes:
                return None
            skipped = begin - piece.begin
            length = min(piece.num_bytes - skipped, end - begin)
            found.append(Piece(begin, piece.descriptor, piece.offset + skipped, length))
            begin, number = begin + length, number + 1
        return found

    def release(self) -> None:
        """Nobody will need the file again: a keeper whose owner is dead ends."""
        with contextlib.suppress(OSError):
            self._connection.send(RELEASE)
        self.close()

    def close(self) -> None:
        """The file is not read any more; a keeper whose owner is dead waits for the next reader."""
        self._end()


def _close(connection: socket.socket, descriptors: Sequence[int]) -> None:
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


def _taken(views: deque[memoryview], num_bytes: int) -> list[memoryview]:
    """So many bytes from the front of the views, which have that many."""
    taken: list[memoryview] = []
    while num_bytes:
        view = views.popleft()
        if view.nbytes > num_bytes:
            views.appendleft(view[num_bytes:])
            view = view[:num_bytes]
        taken.append(view)
        num_bytes -= view.nbytes
    return taken


def held(entry: FileEntry) -> HeldFile | None:
    """The file in this host's memory; None if nobody of this user holds it."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None  # Linux only
    name = name_of(entry)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_S)
    descriptors: list[int] = []
    try:
        connection.connect("\0" + name)
        if keeper.uid_of_peer(connection) == os.getuid():
            _, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, MOST_DESCRIPTORS)
    except OSError:
        descriptors = []
    if not descriptors:
        connection.close()
        return None
    found = HeldFile(connection, descriptors, name)
    if not found.is_good:
        found.close()
        return None
    return found
