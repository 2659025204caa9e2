"""A new object that is written once, from its first byte to its last, and digested on the way.

    who writes      fills a block                     OrderedWrite.room, OrderedWrite.filled
    one thread      digests the blocks, in order
    others          hand them to the disk or to S3    Blocks

No byte is read again to be digested, and none is held longer than it takes to send it.
"""

import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Blocks
from ray_ckpt.storage.digests import new_digest

_IN_HAND = 2
"""Blocks beside those that are sent: one is filled, one is digested."""
_SPARE: deque[mmap.mmap] = deque(maxlen=4)
"""Blocks of objects that are done: memory that was used before costs a tenth of fresh pages."""


class OrderedWrite:
    """An object that is not there yet; `close` makes it visible, `discard` gives it up."""

    def __init__(self, blocks: Blocks, *, name: str, algorithm: str) -> None:
        self._blocks = blocks
        self._name = name
        self._digest = new_digest(algorithm)
        self._num_sent = 0
        self._filled_bytes = 0
        self._cuts: list[int] = []
        """Where in the block something ends whose digest is asked for."""
        self.digests: list[str] = []
        """Of everything before each mark, in order; all of them once the object is closed."""
        num_blocks = blocks.puts_at_once + _IN_HAND
        self._all = [_block(blocks.block_bytes) for _ in range(num_blocks)]
        self._free = self._all[1:]
        self._block = self._all[0]
        self._under_way: list[tuple[mmap.mmap, Future[None], Future[None]]] = []
        self._digesting = ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt digest")
        self._sending = ThreadPoolExecutor(blocks.puts_at_once, thread_name_prefix="ray_ckpt write")

    @property
    def size_bytes(self) -> int:
        """So many bytes have been given."""
        return self._num_sent * self._blocks.block_bytes + self._filled_bytes

    def room(self) -> memoryview:
        """Where the next bytes are to be put; never empty. Ask anew after each `filled`."""
        return memoryview(self._block)[self._filled_bytes :]

    def filled(self, num_bytes: int) -> None:
        """The first `num_bytes` of the room are the next bytes of the object."""
        self._filled_bytes += num_bytes
        if self._filled_bytes == self._blocks.block_bytes:
            self._send()

    def write(self, data: memoryview) -> None:
        """The next bytes of the object, copied."""
        while data.nbytes:
            room = self.room()
            count = min(len(room), data.nbytes)
            room[:count] = data[:count]
            self.filled(count)
            data = data[count:]

    def mark(self) -> None:
        """Something ends here: `digests` will have the digest of everything so far."""
        self._cuts.append(self._filled_bytes)

    def close(self) -> FileEntry:
        """The whole object is there; returns its entry in a manifest."""
        size_bytes = self.size_bytes
        try:
            if self._filled_bytes:
                self._send()
            while self._under_way:
                self._take_back()
            self.digests += [self._digest.text()] * len(self._cuts)  # right behind the last block
        finally:
            self._end_threads()
        self._blocks.finish(size_bytes)
        return FileEntry(path=self._name, size_bytes=size_bytes, digest=self._digest.text())

    def discard(self) -> None:
        """The object is not there."""
        self._end_threads()
        self._blocks.abandon()

    def _send(self) -> None:
        """The block goes to both kinds of threads; another is at hand when this returns."""
        block, count = self._block, self._filled_bytes
        view = memoryview(block)
        digested = self._digesting.submit(self._eat, view[:count], self._cuts)
        sent = self._sending.submit(self._blocks.put, self._num_sent, view, count)
        self._under_way.append((block, digested, sent))
        self._num_sent += count == self._blocks.block_bytes
        self._filled_bytes, self._cuts = 0, []
        if not self._free:
            self._take_back()
        self._block = self._free.pop()

    def _eat(self, data: memoryview, cuts: list[int]) -> None:
        """The data is digested; up to each of the cuts, too."""
        begin = 0
        for cut in cuts:
            self._digest.update(data[begin:cut])
            self.digests.append(self._digest.text())
            begin = cut
        self._digest.update(data[begin:])

    def _take_back(self) -> None:
        """The oldest block, once it was digested and sent; raises what went wrong."""
        block, digested, sent = self._under_way.pop(0)
        digested.result()
        sent.result()
        self._free.append(block)

    def _end_threads(self) -> None:
        self._digesting.shutdown(cancel_futures=True)
        self._sending.shutdown(cancel_futures=True)
        _SPARE.extend(self._all)
        self._all = []


def _block(num_bytes: int) -> mmap.mmap:
    """One of that size, with whatever was in it."""
    try:
        block = _SPARE.pop()
    except IndexError:
        block = None
    if block is not None and len(block) == num_bytes:
        return block
    # must be private: a process that is forked would share a spare block with this one
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
