"""A folder's files read from this host's memory where they are there, and from the store else."""

import threading
from collections.abc import Sequence

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Ranges
from ray_ckpt.storage.host_memory.copies import held


class Nearby:
    """A store's reads of ranges. Threads may share it."""

    def __init__(self, reads: Ranges, folder: str, files: Sequence[FileEntry]) -> None:
        self._reads = reads
        found = {f"{folder}/{entry.path}": held(entry) for entry in files}
        self._files = {key: file for key, file in found.items() if file is not None}
        self._lock = threading.Lock()
        self.num_bytes = 0
        """So many bytes came from memory."""

    @property
    def uri(self) -> str:
        """The store's."""
        return self._reads.uri

    @property
    def reads_at_once(self) -> int:
        """The store's."""
        return self._reads.reads_at_once

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """As the store does it."""
        self.read_into_each(key, offset, [buffer])

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """As the store does it."""
        file = self._files.get(key)
        if file is None or not file.read_into_each(offset, buffers):
            self._reads.read_into_each(key, offset, buffers)
            return
        with self._lock:
            self.num_bytes += sum(buffer.nbytes for buffer in buffers)

    def close(self) -> None:
        """From now on all is read from the store; the copies wait for another reader."""
        for file in self._files.values():
            file.close()
        self._files = {}
        self.num_bytes = 0

    def release(self) -> None:
        """The same, and nobody will need the copies again."""
        for file in self._files.values():
            file.release()
        self._files = {}
