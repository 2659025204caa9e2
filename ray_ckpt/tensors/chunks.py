"""What one rank held of a tensor, as DCP stores it, and its elements read straight into place.

Elements are numbered in row-major order. A part of a tensor lies in it as rows of equal width:

    [4, 6] split by rows      one row of 12 elements from 0 on, one from 12 on
    [4, 6] split by columns   4 rows of 3 elements, 6 apart, from 0 on; 4 from 3 on
"""

import io
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.base import Ranges
from ray_ckpt.storage.digested_reads import read_parts
from ray_ckpt.tensors.framing import HEAD_BYTES, elements_at
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import around

BLOCK_BYTES = 8 << 20
"""Of one read: large enough for a disk and for a request to S3, small enough to be held often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Where it lies, and what it is."""

    key: str
    """Of the file."""
    begin: int
    """First byte of the chunk's zip file."""
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_plain: bool
    """Written by `torch.save` and nothing around it."""
    frame: bytes | None
    """What stands before the elements, if it is as long as `torch.save` makes it."""

    @classmethod
    def of(cls, key: str, begin: int, length: int, spec: TensorSpec, *, is_plain: bool) -> "Chunk":
        """As an index says it."""
        return cls(
            key=key,
            begin=begin,
            length=length,
            shape=spec.shape,
            dtype=spec.dtype,
            is_plain=is_plain,
            frame=_frame(spec, length) if is_plain else None,
        )


def _frame(spec: TensorSpec, length: int) -> bytes | None:
    if not spec.size_bytes:
        return None
    front, behind = around(spec)
    return front if len(front) + spec.size_bytes + len(behind) == length else None


class Chunks:
    """The chunks of one store; threads may share it.

    Most are framed as `torch.save` frames them here and now. What stands before and behind the
    elements is known then, comes in the same read as the first and the last of them, and is
    compared; all else is found out by a look at the chunk's head.
    """

    def __init__(self, reads: Ranges) -> None:
        self._reads = reads
        self._elements: dict[tuple[str, int], int | None] = {}
        self._looking: dict[tuple[str, int], threading.Lock] = {}

    def elements_at(self, chunk: Chunk) -> int | None:
        """The byte of the file at which its elements begin, in order, as its head says.

        None if they are framed in another way.
        """
        where = chunk.key, chunk.begin
        with self._looking.setdefault(where, threading.Lock()):  # once, whoever needs it first
            if where not in self._elements:
                head = bytearray(min(HEAD_BYTES, chunk.length))
                self._reads.read_into(chunk.key, chunk.begin, memoryview(head))
                at = elements_at(bytes(head), chunk.shape, chunk.dtype) if chunk.is_plain else None
                self._elements[where] = None if at is None else chunk.begin + at
            return self._elements[where]

    def read(self, chunk: Chunk, begin: int, into: Tensor) -> None:
        """The elements from number `begin` on, as many as there are in `into`, which is contiguous.

        Raises:
            IntegrityError: the chunk cannot be read, or holds another tensor than the index says.
        """
        if begin == 0 and chunk.frame is not None:
            self.read_run([(chunk, into)])
        else:
            self._read_by_head(chunk, begin, into)

    def read_run(self, run: Sequence[tuple[Chunk, Tensor]]) -> None:
        """The first elements of chunks that have a frame and lie one behind the other, in one read.

        Of all but the last chunk there is room for every element.
        """
        fronts = [bytearray(len(chunk.frame or b"")) for chunk, _ in run]
        parts = [
            [memoryview(front), *_to_the_end(chunk, chunk.begin + len(front), 0, into)]
            for (chunk, into), front in zip(run, fronts, strict=True)
        ]
        first, _ = run[0]
        read_parts(self._reads, first.key, first.begin, parts)
        for (chunk, into), front in zip(run, fronts, strict=True):
            if front == chunk.frame:
                self._elements[chunk.key, chunk.begin] = chunk.begin + len(front)
            else:
                self._read_by_head(chunk, 0, into)

    def _read_by_head(self, chunk: Chunk, begin: int, into: Tensor) -> None:
        at = self.elements_at(chunk)
        if at is None:
            into.copy_(self._loaded(chunk)[begin : begin + into.numel()])
            return
        offset = at + begin * into.element_size()
        self._reads.read_into_each(chunk.key, offset, _to_the_end(chunk, offset, begin, into))

    def _loaded(self, chunk: Chunk) -> Tensor:
        """All elements of a chunk that is framed in another way, in order."""
        data = bytearray(chunk.length)
        self._reads.read_into(chunk.key, chunk.begin, memoryview(data))
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise IntegrityError(
                f"a chunk cannot be read: {error}", f"{self._reads.uri}/{chunk.key}"
            ) from error
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (
            chunk.shape,
            chunk.dtype,
        ):
            raise IntegrityError(
                f"a chunk is to hold {chunk.dtype} {chunk.shape}, and does not",
                f"{self._reads.uri}/{chunk.key}",
            )
        return tensor.reshape(-1)


def _to_the_end(chunk: Chunk, offset: int, begin: int, into: Tensor) -> list[memoryview]:
    """The memory of `into`, and behind the chunk's last element also room for all that follows."""
    if begin + into.numel() < math.prod(chunk.shape):
        return [bytes_of(into)]
    rest = chunk.begin + chunk.length - offset - into.nbytes
    return [bytes_of(into), memoryview(bytearray(max(0, rest)))]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Elements of a tensor that lie one after the other in a part of it."""

    begin: int
    """Of the first one in the tensor."""
    begin_in_part: int
    count: int
    width: int
    apart: int
    """From the beginning of one row to that of the next, in the tensor."""

    @property
    def end(self) -> int:
        """Behind the last one in the tensor."""
        return self.begin + (self.count - 1) * self.apart + self.width

    def within(self, begin: int, end: int) -> Iterator["Rows"]:
        """What of them lies in `begin` to `end`: whole rows together, cut ones by themselves."""
        first = max(0, -(-(begin - self.begin) // self.apart))
        behind = min(self.count, (end - self.begin - self.width) // self.apart + 1)
        if first > 0:
            yield from self._cut(first - 1, begin, end)
        if first < behind:
            yield self.rows(first, behind - first)
        if max(first, behind) < self.count:
            yield from self._cut(max(first, behind), begin, end)

    def _cut(self, index: int, begin: int, end: int) -> Iterator["Rows"]:
        at = self.begin + index * self.apart
        left, right = max(begin - at, 0), min(end - at, self.width)
        if left < right:
            yield self._part(index, 1, left, right - left)

    def rows(self, first: int, count: int) -> "Rows":
        """So many of them, from number `first` on."""
        return self._part(first, count, 0, self.width)

    def _part(self, index: int, count: int, left: int, width: int) -> "Rows":
        return Rows(
            begin=self.begin + index * self.apart + left,
            begin_in_part=self.begin_in_part + index * self.width + left,
            count=count,
            width=width,
            apart=self.apart,
        )


def rows_of(size: Sequence[int], part: ChunkStorageMetadata, split: int) -> Iterator[Rows]:
    """Where in a tensor the elements of a part lie, which is whole behind dimension `split`."""
    inner = math.prod(size[split + 1 :])
    width = part.sizes[split] * inner if size else 1
    left = part.offsets[split] * inner if size else 0
    apart = math.prod(size[split:])
    if width == 0 or math.prod(part.sizes) == 0:
        return
    begin_in_part = 0
    for first, count in _leading(size[:split], part):
        yield Rows(
            begin=first * apart + left,
            begin_in_part=begin_in_part,
            count=count,
            width=width,
            apart=apart,
        )
        begin_in_part += count * width


def _leading(size: Sequence[int], part: ChunkStorageMetadata) -> Iterator[tuple[int, int]]:
    """Runs of what the dimensions in front number, the last of them the fastest: first, count."""
    if not size:
        yield 0, 1
        return
    whole = len(size) - 1
    while whole > 0 and part.sizes[whole] == size[whole]:
        whole -= 1
    below = math.prod(size[whole + 1 :])
    ranges = [range(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True)]
    for outer in itertools.product(*ranges[:whole]):
        first = 0
        for index, length in zip(outer, size, strict=False):
            first = first * length + index
        first = first * size[whole] + part.offsets[whole]
        yield first * below, part.sizes[whole] * below


def split_dimension(size: Sequence[int], parts: Sequence[ChunkStorageMetadata]) -> int:
    """The last dimension of which some part holds not all; 0 if all are whole."""
    cut = [d for part in parts for d, n in enumerate(part.sizes) if n != size[d]]
    return max(cut, default=0)
