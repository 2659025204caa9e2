"""What a load plan asks for: tensors from their pieces straight into the memory they are for.

Several reads at a time, none larger than a block; small pieces that lie one behind the other come
in one. What is wanted of a piece is all of it, a run of its elements, or a column: rows that are
wide are read one by one, narrow ones with what lies between them. What cannot be read in place
(another device, another dtype, gaps) goes through memory of its own, of which little is held.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from ray_ckpt.storage.base import Ranges
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.chunks import BLOCK_BYTES, Chunk, Chunks, Rows, rows_of, split_dimension
from ray_ckpt.tensors.load_plan import Read
from ray_ckpt.tensors.step_index import StepIndex

T = TypeVar("T")
_WIDE_BYTES = 64 << 10
"""Of a row that is worth a read of its own."""
_IN_FLIGHT_BYTES = 256 << 20
_MAX_RUN = 256
"""Pieces: a system call takes 1,024 places in memory, and each needs up to three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """One read, its chunk, and what is read into: the target itself where that can be."""

    read: Read
    chunk: Chunk
    into: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether all of a chunk is wanted whose frame is known."""
        return self.chunk.frame is not None and self.read.sizes == self.chunk.shape

    def end(self) -> int:
        """It is in the target; bytes."""
        if self.into is not self.read.target:
            self.read.target.copy_(self.into, non_blocking=True)  # torch keeps it until it is read
        return self.read.target.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    run: Sequence[_Wanted]
    reads: Sequence[Future[None]]

    @property
    def num_bytes(self) -> int:
        return sum(wanted.into.nbytes for wanted in self.run)

    def end(self, progress: Progress) -> None:
        for read in self.reads:
            read.result()
        progress.advance(sum(wanted.end() for wanted in self.run))


def read_pieces(
    chunks: Chunks,
    reads: Iterable[tuple[Read, Chunk]],
    *,
    num_threads: int,
    progress: Progress,
) -> None:
    """Each target holds its elements. Reads come in the order in which they lie.

    Raises:
        IntegrityError: a chunk cannot be read.
    """
    begun: deque[_Begun] = deque()
    in_flight_bytes = 0
    threads = ThreadPoolExecutor(num_threads, "ray_ckpt load")
    try:
        for run in _runs((_wanted(read, chunk) for read, chunk in reads), _make_a_block):
            begun.append(_begin(chunks, run, threads))
            in_flight_bytes += begun[-1].num_bytes
            while in_flight_bytes > _IN_FLIGHT_BYTES:
                oldest = begun.popleft()
                oldest.end(progress)
                in_flight_bytes -= oldest.num_bytes
        for each in begun:
            each.end(progress)
    finally:
        threads.shutdown(cancel_futures=True)


def _wanted(read: Read, chunk: Chunk) -> _Wanted:
    target = read.target
    is_in_place = target.is_cpu and target.dtype == chunk.dtype and target.is_contiguous()
    into = target if is_in_place else _empty(target, chunk.dtype)
    return _Wanted(read=read, chunk=chunk, into=into)


def _empty(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of this host for what goes to the target: a GPU takes it from pinned memory.

    That is allocated slowly, and kept by torch for the next tensor once the GPU has read it.
    """
    return torch.empty(target.shape, dtype=dtype, pin_memory=target.is_cuda)


def _runs(items: Iterable[T], go_on: Callable[[Sequence[T], T], bool]) -> Iterator[list[T]]:
    """As many of them together as `go_on` says, run by run."""
    run: list[T] = []
    for each in items:
        if run and not go_on(run, each):
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _make_a_block(run: Sequence[_Wanted], wanted: _Wanted) -> bool:
    """Whole chunks that lie one behind the other, as many as make a block; all else is alone."""
    first, last, chunk = run[0].chunk, run[-1].chunk, wanted.chunk
    return (
        chunk.begin == last.begin + last.length
        and chunk.key == last.key
        and chunk.begin + chunk.length - first.begin <= BLOCK_BYTES
        and len(run) < _MAX_RUN
        and run[0].is_whole
        and wanted.is_whole
    )


def _begin(chunks: Chunks, run: Sequence[_Wanted], threads: ThreadPoolExecutor) -> _Begun:
    if len(run) > 1:
        together = [(wanted.chunk, wanted.into.view(-1)) for wanted in run]
        return _Begun(run=run, reads=[threads.submit(chunks.read_run, together)])
    [wanted] = run
    flat = wanted.into.view(-1)
    reads = [
        threads.submit(_read, chunks, wanted.chunk, piece, flat)
        for rows in _rows(wanted)
        for piece in _blocks(rows, wanted.chunk.dtype.itemsize)
    ]
    return _Begun(run=run, reads=reads)


def _rows(wanted: _Wanted) -> Iterator[Rows]:
    shape, read = wanted.chunk.shape, wanted.read
    part = ChunkStorageMetadata(offsets=torch.Size(read.offsets), sizes=torch.Size(read.sizes))
    return rows_of(shape, part, split_dimension(shape, [part]))


def _blocks(rows: Rows, element_bytes: int) -> Iterator[Rows]:
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
            yield from _blocks(rows.rows(number, 1), element_bytes)
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


class _Place(NamedTuple):
    """Of a value."""

    file: str
    begin: int
    length: int
    name: str


def read_values(
    store: Ranges,
    folder: str,
    index: StepIndex,
    names: Iterable[str],
    arrived: Callable[[str, bytes], None],
) -> None:
    """Each value that is no tensor, handed over; neighbours come in one read."""
    places = sorted(_Place(*index.place(index.pieces(index.numbers[n])[0]), n) for n in names)
    for run in _runs(places, _are_neighbours):
        first, last = run[0], run[-1]
        data = memoryview(bytearray(last.begin + last.length - first.begin))
        store.read_into(f"{folder}/{first.file}", first.begin, data)
        for at in run:
            begin = at.begin - first.begin
            arrived(at.name, bytes(data[begin : begin + at.length]))


def _are_neighbours(run: Sequence[_Place], at: _Place) -> bool:
    """Those that lie one behind the other, as many as make a block."""
    before = run[-1]
    return (
        at.file == before.file
        and at.begin in (before.begin, before.begin + before.length)
        and at.begin - run[0].begin < BLOCK_BYTES
    )
