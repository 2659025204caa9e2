"""What a load plan asks for: tensors from their chunks straight into the memory they are for.

Several pieces at a time, none larger than a block. What is wanted of a chunk is all of it, a run of
its elements, or a column: rows that are wide are read one by one, narrow ones with what lies
between them. What cannot be read in place (another device, another dtype, gaps) goes through memory
of its own, of which little is held.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ray_ckpt.storage.base import Ranges
from ray_ckpt.tensors.chunks import BLOCK_BYTES, Chunk, Chunks, Rows, rows_of, split_dimension

_WIDE_BYTES = 64 << 10
"""Of a row that is worth a read of its own."""
_IN_FLIGHT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    item: ReadItem
    target: Tensor
    into: Tensor
    """The target itself, where it can be read into."""
    pieces: list[Future[None]]

    def end(self, planner: LoadPlanner) -> None:
        for piece in self.pieces:
            piece.result()
        if self.into is not self.target:
            self.target.copy_(self.into)
        planner.commit_tensor(self.item, self.target)


def read_items(
    chunks: Chunks,
    items: Iterable[tuple[ReadItem, Chunk]],
    planner: LoadPlanner,
    *,
    num_threads: int,
) -> None:
    """Each item's elements are in the tensor that the planner has for it.

    Raises:
        IntegrityError: a chunk cannot be read.
    """
    begun: deque[_Begun] = deque()
    in_flight_bytes = 0
    threads = ThreadPoolExecutor(num_threads, "ray_ckpt load")
    try:
        for item, chunk in items:
            begun.append(_begin(chunks, item, chunk, planner, threads))
            in_flight_bytes += begun[-1].into.nbytes
            while in_flight_bytes > _IN_FLIGHT_BYTES:
                oldest = begun.popleft()
                oldest.end(planner)
                in_flight_bytes -= oldest.into.nbytes
        for each in begun:
            each.end(planner)
    finally:
        threads.shutdown(cancel_futures=True)


def _begin(
    chunks: Chunks,
    item: ReadItem,
    chunk: Chunk,
    planner: LoadPlanner,
    threads: ThreadPoolExecutor,
) -> _Begun:
    target = planner.resolve_tensor(item).detach()
    is_in_place = target.is_cpu and target.is_contiguous() and target.dtype == chunk.dtype
    into = target if is_in_place else torch.empty(target.shape, dtype=chunk.dtype)
    flat = into.view(-1)
    pieces = [
        threads.submit(_read, chunks, chunk, piece, flat)
        for rows in _wanted(item, chunk)
        for piece in _pieces(rows, chunk.dtype.itemsize)
    ]
    return _Begun(item=item, target=target, into=into, pieces=pieces)


def _wanted(item: ReadItem, chunk: Chunk) -> Iterator[Rows]:
    part = ChunkStorageMetadata(offsets=item.storage_offsets, sizes=item.lengths)
    return rows_of(chunk.shape, part, split_dimension(chunk.shape, [part]))


def _pieces(rows: Rows, element_bytes: int) -> Iterator[Rows]:
    """The same, in as many parts as it is to be read in."""
    if rows.count == 1:
        length = BLOCK_BYTES // element_bytes
        for at in range(0, rows.width, length):
            yield replace(
                rows,
                begin=rows.begin + at,
                begin_in_part=rows.begin_in_part + at,
                width=min(length, rows.width - at),
            )
    elif rows.width * element_bytes >= _WIDE_BYTES:
        for number in range(rows.count):
            yield from _pieces(rows.rows(number, 1), element_bytes)
    else:
        together = max(1, BLOCK_BYTES // (rows.apart * element_bytes))
        for first in range(0, rows.count, together):
            yield rows.rows(first, min(together, rows.count - first))


def _read(chunks: Chunks, chunk: Chunk, rows: Rows, flat: Tensor) -> None:
    part = flat[rows.begin_in_part : rows.begin_in_part + rows.count * rows.width]
    if rows.count == 1:
        chunks.read(chunk, rows.begin, part)
        return
    span = torch.empty(rows.end - rows.begin, dtype=flat.dtype)
    chunks.read(chunk, rows.begin, span)
    shape = rows.count, rows.width
    part.view(shape).copy_(span.as_strided(shape, (rows.apart, 1)))


def read_values(
    store: Ranges,
    folder: str,
    places: Sequence[tuple[ReadItem, _StorageInfo]],
    planner: LoadPlanner,
) -> None:
    """Each value that is no tensor, handed to the planner; neighbours come in one read."""
    for run in _runs(sorted(places, key=lambda p: (p[1].relative_path, p[1].offset))):
        first, last = run[0][1], run[-1][1]
        data = memoryview(bytearray(last.offset + last.length - first.offset))
        store.read_into(f"{folder}/{first.relative_path}", first.offset, data)
        for item, at in run:
            begin = at.offset - first.offset
            planner.load_bytes(item, io.BytesIO(data[begin : begin + at.length]))


def _runs(
    places: Iterable[tuple[ReadItem, _StorageInfo]],
) -> Iterator[list[tuple[ReadItem, _StorageInfo]]]:
    """Those that lie one behind the other, together."""
    run: list[tuple[ReadItem, _StorageInfo]] = []
    for item, at in places:
        before = run[-1][1] if run else at
        is_next = at.relative_path == before.relative_path
        is_next &= at.offset in (before.offset, before.offset + before.length)
        if run and (not is_next or at.offset - run[0][1].offset >= BLOCK_BYTES):
            yield run
            run = []
        run.append((item, at))
    if run:
        yield run
