"""An object of an S3 store becomes a local file, several ranges of it at once."""

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import BoundedSemaphore

from ray_ckpt.storage.disk.posix import translated
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.s3.wire import Got

_RANGE_BYTES = 8 << 20
_RANGES_AT_ONCE = 4
"""Of one object."""
_IN_HAND = BoundedSemaphore(16)
"""Ranges that come at once, of all objects: 16 connections."""


def download_in_ranges(
    start: Callable[[memoryview], Got],
    read_into: Callable[[int, memoryview], None],
    target: Path,
    *,
    progress: Progress,
) -> None:
    """`target` holds the whole object.

    `start` fills a buffer with the object's first bytes and says how many there are in all;
    `read_into` fills one from an offset on.
    """
    with translated(target), target.open("wb", buffering=0) as file:
        buffer = _new_buffer()
        got = start(buffer)
        _put(file.fileno(), 0, buffer[: got.num_bytes])
        progress.advance(got.num_bytes)
        offsets: SimpleQueue[int] = SimpleQueue()
        for offset in range(got.num_bytes, got.total_bytes, _RANGE_BYTES):
            offsets.put(offset)

        def bring(buffer: memoryview) -> None:
            while (offset := _next(offsets)) is not None:
                view = buffer[: got.total_bytes - offset]
                with _IN_HAND:
                    read_into(offset, view)
                _put(file.fileno(), offset, view)
                progress.advance(view.nbytes)

        num_threads = min(_RANGES_AT_ONCE, offsets.qsize())
        with ThreadPoolExecutor(max(1, num_threads), "ray_ckpt download") as threads:
            buffers = (_new_buffer() for _ in range(num_threads))
            brought = [threads.submit(bring, buffer) for buffer in buffers]
            try:
                for future in brought:
                    future.result()
            finally:
                while _next(offsets) is not None:
                    pass  # after an error: nobody begins another range


def _new_buffer() -> memoryview:
    """Its pages cost nothing until they are used."""
    return memoryview(mmap.mmap(-1, _RANGE_BYTES))


def _next(offsets: "SimpleQueue[int]") -> int | None:
    try:
        return offsets.get_nowait()
    except Empty:
        return None


def _put(descriptor: int, offset: int, data: memoryview) -> None:
    while data.nbytes:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
