"""A file that is written block by block; where the file system allows it, past the page cache.

The blocks would only push out of the cache what somebody needs, and cost another copy.
"""

import contextlib
import errno
import fcntl
import os
import uuid
from pathlib import Path

from ray_ckpt.storage.disk.posix import made_in, sync_folder, translated

TEMPORARY = ".tmp-"
"""How the names of files begin that are not whole; nobody counts them."""
_ALIGNMENT = 4096
"""Of addresses, offsets and lengths in a write that passes by the page cache."""


def new_file(path: Path) -> "FileBlocks":
    """A file that is there, under this name, once it is finished."""
    return FileBlocks(path, beside=path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}"))


class FileBlocks:
    """A file that is written beside `path` and linked to it once it is whole and synced."""

    block_bytes = 8 << 20
    puts_at_once = 2
    """The disk has the next block already when it is done with one."""

    def __init__(self, path: Path, *, beside: Path) -> None:
        self._path = path
        self._beside = beside
        with translated(path):
            self._descriptor, self._is_direct = made_in(path.parent, lambda: _open(beside))

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """Whole pages past the page cache; what is too much is cut off in the end."""
        if self._is_direct:
            num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        left, offset = block[:num_bytes], number * self.block_bytes
        with translated(self._path):
            while left.nbytes:
                done = self._write(left, offset)
                offset += done
                left = left[done:]

    def _write(self, data: memoryview, offset: int) -> int:
        """So many bytes are written.

        A write past the page cache that ends early, at a limit, leaves a rest that only a plain one
        can take, and say what is wrong; some file systems refuse all of them.
        """
        try:
            return os.pwrite(self._descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._is_direct:
                raise
        self._is_direct = False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.pwrite(self._descriptor, data, offset)

    def finish(self, size_bytes: int) -> None:
        """Synced, then linked: unlike a rename, a link never replaces."""
        with translated(self._path):
            os.ftruncate(self._descriptor, size_bytes)
            os.fsync(self._descriptor)
            self._path.hardlink_to(self._beside)
            sync_folder(self._path.parent)
        self.abandon()

    def abandon(self) -> None:
        """Closed; nothing lies beside any more."""
        self._beside.unlink(missing_ok=True)
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1


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
