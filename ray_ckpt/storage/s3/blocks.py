"""An object of an S3 store that is uploaded in parts, as its bytes come."""

from ray_ckpt.storage.s3.multipart import Multipart, S3Object
from ray_ckpt.storage.s3.unfinished import part_size

_PART_BYTES = 16 << 20


class S3Blocks:
    """One part for each block."""

    puts_at_once = 4

    def __init__(self, target: S3Object, size_bytes: int) -> None:
        self.block_bytes = part_size(size_bytes, at_least=_PART_BYTES)
        self._upload = Multipart.begun(target)
        self._etags: dict[int, str] = {}

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """One PUT."""
        self._etags[number + 1] = self._upload.put(number + 1, block[:num_bytes])

    def finish(self, size_bytes: int) -> None:
        """One POST."""
        self._upload.complete(self._etags)

    def abandon(self) -> None:
        """One ABORT."""
        self._upload.abandon()
