"""A new file that is written once, from its first byte to its last, and digested on the way.

    who writes      fills a block                     OrderedFile.room, OrderedFile.filled
    one thread      digests the blocks, in order
    another one     hands them to the disk

No byte is read again to be digested. Where the file system allows it the blocks pass by the page
cache: they would only push out what somebody needs, and cost another copy.
"""

import contextlib
import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.digests import new_digest
from ray_ckpt.storage.local import translated

ALIGNMENT = 4096
"""Of addresses, offsets and lengths in a write that passes by the page cache."""
_BLOCK_BYTES = 8 << 20
_NUM_BLOCKS = 3


class OrderedFile:
    """A file that is not there yet; `close` makes it durable, `discard` removes it.

    Raises:
        StorageError: something is there already, or it cannot be made.
    """

    def __init__(self, path: Path, *, algorithm: str) -> None:
        self._path = path
        self._digest = new_digest(algorithm)
        self._size_bytes = 0
        self._filled_bytes = 0
        with translated(path):
            self._descriptor, self._is_direct = _open(path)
        self._free = [mmap.mmap(-1, _BLOCK_BYTES) for _ in range(_NUM_BLOCKS)]
        self._block = self._free.pop()
        self._under_way: list[tuple[mmap.mmap, Future[None], Future[None]]] = []
        self._digesting = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")

    @property
    def size_bytes(self) -> int:
        """So many bytes have been given."""
        return self._size_bytes + self._filled_bytes

    def room(self) -> memoryview:
        """Where the next bytes are to be put; never empty. Ask anew after each `filled`."""
        return memoryview(self._block)[self._filled_bytes :]

    def filled(self, num_bytes: int) -> None:
        """The first `num_bytes` of the room are the next bytes of the file."""
        self._filled_bytes += num_bytes
        if self._filled_bytes == _BLOCK_BYTES:
            self._send()

    def write(self, data: memoryview) -> None:
        """The next bytes of the file, copied."""
        while data.nbytes:
            room = self.room()
            count = min(len(room), data.nbytes)
            room[:count] = data[:count]
            self.filled(count)
            data = data[count:]

    def close(self) -> FileEntry:
        """The whole file is on the disk; returns its entry, under its own name."""
        try:
            if self._filled_bytes:
                self._send()
            while self._under_way:
                self._take_back()
            with translated(self._path):
                os.ftruncate(self._descriptor, self._size_bytes)
                os.fsync(self._descriptor)
        finally:
            self._release()
        return FileEntry(
            path=self._path.name, size_bytes=self._size_bytes, digest=self._digest.text()
        )

    def discard(self) -> None:
        """The file is not there."""
        self._release()
        self._path.unlink(missing_ok=True)

    def _send(self) -> None:
        """The block goes to both threads; another one is at hand when this returns."""
        block, count, offset = self._block, self._filled_bytes, self._size_bytes
        digested = self._digesting.submit(self._digest.update, memoryview(block)[:count])
        written = self._writing.submit(self._put, block, count, offset)
        self._under_way.append((block, digested, written))
        self._size_bytes += count
        self._filled_bytes = 0
        if not self._free:
            self._take_back()
        self._block = self._free.pop()

    def _take_back(self) -> None:
        """The oldest block, once it was digested and written; raises what went wrong."""
        block, digested, written = self._under_way.pop(0)
        digested.result()
        with translated(self._path):
            written.result()
        self._free.append(block)

    def _put(self, block: mmap.mmap, count: int, offset: int) -> None:
        """Whole pages where the page cache is passed by; what is too much is cut off in the end."""
        if self._is_direct:
            count = -(-count // ALIGNMENT) * ALIGNMENT
        left = memoryview(block)[:count]
        while left.nbytes:
            done = os.pwrite(self._descriptor, left, offset)
            offset += done
            left = left[done:]

    def _release(self) -> None:
        self._digesting.shutdown()
        self._writing.shutdown()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether writes to it pass by the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, flags | direct, 0o666), bool(direct)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some file systems make the file and then refuse the flag
    return os.open(path, flags, 0o666), False
