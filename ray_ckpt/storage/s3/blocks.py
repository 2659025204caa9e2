"""An object of an S3 store that is uploaded in parts, as its bytes come; a small one in one PUT."""

import threading
from collections.abc import Callable

from ray_ckpt.storage.s3.multipart import Multipart, S3Object
from ray_ckpt.storage.s3.unfinished import part_size

_PART_BYTES = 16 << 20
_SMALL_BYTES = 5 << 20
"""A part must have as much, unless it is the last one."""


class S3Blocks:
    """One part for each block; `write` puts a whole object."""

    puts_at_once = 4

    def __init__(
        self, target: S3Object, size_bytes: int, *, write: Callable[[bytes], None]
    ) -> None:
        self.block_bytes = part_size(size_bytes, at_least=_PART_BYTES)
        self._target = target
        self._write = write
        self._upload = Multipart.begun(target) if size_bytes > _SMALL_BYTES else None
        self._lock = threading.Lock()
        self._etags: dict[int, str] = {}
        self._whole: bytes | None = None
        """Of a small object: nobody sees it before it is finished."""

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """One PUT; none for a block that is all there is of a small object."""
        if number == 0 and num_bytes < self.block_bytes and self._upload is None:
            self._whole = bytes(block[:num_bytes])
            return
        with self._lock:  # larger than was said
            upload = self._upload = self._upload or Multipart.begun(self._target)
        self._etags[number + 1] = upload.put(number + 1, block[:num_bytes])

    def finish(self, size_bytes: int) -> None:
        """One POST, or the one PUT."""
        if self._upload is None:
            self._write(self._whole or b"")
        else:
            self._upload.complete(self._etags)

    def abandon(self) -> None:
        """One ABORT."""
        if self._upload is not None:
            self._upload.abandon()
