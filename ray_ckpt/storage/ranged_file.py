"""Ranges of what can only be fetched range by range: as a file that can seek, or in pieces."""

import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast


def read_into_each(
    read_into: Callable[[int, memoryview], None], offset: int, buffers: Sequence[memoryview]
) -> None:
    """What is there from `offset` on is in one buffer after the other; fetched as one range."""
    if len(buffers) == 1:
        read_into(offset, buffers[0])
        return
    whole = memoryview(bytearray(sum(buffer.nbytes for buffer in buffers)))
    read_into(offset, whole)
    at = 0
    for buffer in buffers:
        buffer.cast("B")[:] = whole[at : at + buffer.nbytes]
        at += buffer.nbytes


def open_ranged(
    read_into: Callable[[int, memoryview], None], size_bytes: int, *, block_bytes: int
) -> BinaryIO:
    """A `RangedFile`, read ahead in blocks."""
    return cast(BinaryIO, io.BufferedReader(RangedFile(read_into, size_bytes), block_bytes))


class RangedFile(io.RawIOBase):
    """A seekable file of `size_bytes`, of which `read_into(offset, buffer)` gets ranges."""

    def __init__(self, read_into: Callable[[int, memoryview], None], size_bytes: int) -> None:
        super().__init__()
        self._read_into = read_into
        self._size_bytes = size_bytes
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """The new place, counted from the start."""
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}
        self._at = max(0, starts[whence] + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """So many bytes came; fewer than there is room for only at the end."""
        view = memoryview(buffer).cast("B")
        num_bytes = max(0, min(view.nbytes, self._size_bytes - self._at))
        self._read_into(self._at, view[:num_bytes])
        self._at += num_bytes
        return num_bytes
