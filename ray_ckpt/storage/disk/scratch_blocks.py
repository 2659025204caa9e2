"""An object that is written to this host's disk first, for places that take whole files only."""

import os
from collections.abc import Callable
from pathlib import Path

from ray_ckpt.storage.disk.posix import translated
from ray_ckpt.storage.disk.scratch import make_scratch, remove_scratch


class ScratchBlocks:
    """A file that `send` takes once it is whole."""

    block_bytes = 8 << 20
    puts_at_once = 1

    def __init__(self, send: Callable[[Path], None]) -> None:
        self._send = send
        self._folder = make_scratch("export-blocks")
        self._path = self._folder / "object"
        self._path.touch()

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """One write."""
        with translated(self._path), self._path.open("r+b") as file:
            left, offset = block[:num_bytes], number * self.block_bytes
            while left.nbytes:
                done = os.pwrite(file.fileno(), left, offset)
                left, offset = left[done:], offset + done

    def finish(self, size_bytes: int) -> None:
        """Sent; the file is gone."""
        self._send(self._path)
        self.abandon()

    def abandon(self) -> None:
        """The file is gone."""
        remove_scratch(self._folder)
