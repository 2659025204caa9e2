"""Any piece of any tensor of a DCP step, read from its files into place; nothing is held.

A tensor lies in chunks, one for each rank that held a part. Its elements, counted in row-major
order of the whole tensor, lie in each chunk as rows of equal width:

    [4, 6] split by rows      one row of 12 elements from 0 on, one from 12 on
    [4, 6] split by columns   4 rows of 3 elements, 6 apart, from 0 on; 4 from 3 on
"""

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.tensors.framing import HEAD_BYTES, elements_at
from ray_ckpt.tensors.reader import DcpReader, step_reader
from ray_ckpt.tensors.recording import TensorSpec

BLOCK_BYTES = 8 << 20
"""Of one read: large enough for a disk and for a request to S3, small enough to be held often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What one rank held of a tensor, and where it lies."""

    key: str
    """Of the file."""
    begin: int
    """First byte of the chunk's zip file."""
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_plain: bool
    """Written by `torch.save` and nothing around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Elements of a tensor that lie one after the other in a chunk."""

    begin: int
    """Of the first one in the tensor."""
    begin_in_chunk: int
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
            yield self._rows(first, behind - first, 0, self.width)
        if max(first, behind) < self.count:
            yield from self._cut(max(first, behind), begin, end)

    def _cut(self, index: int, begin: int, end: int) -> Iterator["Rows"]:
        at = self.begin + index * self.apart
        left, right = max(begin - at, 0), min(end - at, self.width)
        if left < right:
            yield self._rows(index, 1, left, right - left)

    def _rows(self, index: int, count: int, left: int, width: int) -> "Rows":
        return Rows(
            begin=self.begin + index * self.apart + left,
            begin_in_chunk=self.begin_in_chunk + index * self.width + left,
            count=count,
            width=width,
            apart=self.apart,
        )


class StepTensors:
    """The tensors of one DCP folder; threads may share it.

    Raises:
        IntegrityError: `.metadata` differs from the manifest, here and once something is read.
    """

    def __init__(self, store: Store, reader: DcpReader) -> None:
        self.uri = reader.uri
        self._store = store
        self._folder = str(reader.path)
        self._metadata: Metadata = reader.read_metadata()
        self._places: dict[str, list[tuple[_Chunk, list[Rows]]]] = {}
        self._elements: dict[tuple[str, int], int | None] = {}

    @property
    def reads_at_once(self) -> int:
        """So many reads side by side are faster than one after the other."""
        return self._store.reads_at_once

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {
            key: TensorSpec(shape=tuple(entry.size), dtype=entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def others(self) -> list[str]:
        """Keys of what is no tensor, sorted."""
        entries = self._metadata.state_dict_metadata.items()
        return sorted(key for key, entry in entries if not isinstance(entry, TensorStorageMetadata))

    def pickled(self, key: str) -> bytes:
        """What is no tensor, as it lies there: nothing of it is run."""
        stored: Mapping[MetadataIndex, Any] = cast(Any, self._metadata.storage_data)
        info = stored[MetadataIndex(key)]
        data = bytearray(info.length)
        file = f"{self._folder}/{info.relative_path}"
        self._store.read_into(file, info.offset, memoryview(data))
        return bytes(data)

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor's elements."""
        return self._entry(key).properties.dtype

    def whole(self, key: str) -> Tensor:
        """One tensor, contiguous and on the CPU."""
        entry = self._entry(key)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        parts = tensor.view(-1).split(BLOCK_BYTES // tensor.element_size())
        begins = itertools.accumulate((part.numel() for part in parts), initial=0)
        with ThreadPoolExecutor(self.reads_at_once) as threads:
            for _ in threads.map(partial(self.read, key), begins, parts):
                pass
        return tensor

    def read(self, key: str, begin: int, into: Tensor) -> None:
        """The elements from number `begin` on, as many as there are in `into`, which has one
        dimension, is contiguous and of the tensor's dtype.

        Raises:
            IntegrityError: a chunk cannot be read, or holds another tensor than the index says.
        """  # noqa: D205
        end = begin + into.numel()
        for chunk, all_rows in self._placed(key):
            for rows in all_rows:
                if begin < rows.end and rows.begin < end:
                    for part in rows.within(begin, end):
                        self._read_rows(chunk, part, into[part.begin - begin :])

    def _read_rows(self, chunk: _Chunk, rows: Rows, into: Tensor) -> None:
        if rows.count == 1:
            self._read_elements(chunk, rows.begin_in_chunk, into[: rows.width])
            return
        together = torch.empty(rows.count * rows.width, dtype=into.dtype)
        self._read_elements(chunk, rows.begin_in_chunk, together)
        shape = rows.count, rows.width
        into.as_strided(shape, (rows.apart, 1)).copy_(together.view(shape))

    def _read_elements(self, chunk: _Chunk, begin: int, into: Tensor) -> None:
        where = chunk.key, chunk.begin
        if where not in self._elements:
            head = bytearray(min(HEAD_BYTES, chunk.length))
            self._store.read_into(chunk.key, chunk.begin, memoryview(head))
            at = elements_at(bytes(head), chunk.shape, chunk.dtype) if chunk.is_plain else None
            self._elements[where] = at
        at = self._elements[where]
        if at is None:
            into.copy_(self._loaded(chunk)[begin : begin + into.numel()])
            return
        offset = chunk.begin + at + begin * into.element_size()
        self._store.read_into(chunk.key, offset, bytes_of(into))

    def _loaded(self, chunk: _Chunk) -> Tensor:
        """All elements of a chunk that is framed in another way, in order."""
        data = bytearray(chunk.length)
        self._store.read_into(chunk.key, chunk.begin, memoryview(data))
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise IntegrityError(
                f"a chunk cannot be read: {error}", f"{self._store.uri}/{chunk.key}"
            ) from error
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (
            chunk.shape,
            chunk.dtype,
        ):
            raise IntegrityError(
                f"a chunk is to hold {chunk.dtype} {chunk.shape}, and does not",
                f"{self._store.uri}/{chunk.key}",
            )
        return tensor.reshape(-1)

    def _placed(self, key: str) -> list[tuple[_Chunk, list[Rows]]]:
        if key not in self._places:
            entry = self._entry(key)
            split = _split_dimension(entry.size, entry.chunks)
            self._places[key] = [
                (self._chunk(key, entry, chunk), list(rows_of(entry.size, chunk, split)))
                for chunk in entry.chunks
            ]
        return self._places[key]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise IntegrityError(f"the index names no tensor {key}", self.uri)
        return entry

    def _chunk(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> _Chunk:
        stored: Mapping[MetadataIndex, Any] = cast(Any, self._metadata.storage_data)
        info = stored[MetadataIndex(key, chunk.offsets)]
        return _Chunk(
            key=f"{self._folder}/{info.relative_path}",
            begin=info.offset,
            length=info.length,
            shape=tuple(chunk.sizes),
            dtype=entry.properties.dtype,
            is_plain=not getattr(info, "transform_descriptors", None),
        )


def step_tensors(catalog: Catalog, manifest: Manifest) -> StepTensors:
    """The tensors of one committed step."""
    return StepTensors(catalog.store, step_reader(catalog, manifest))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


def rows_of(size: Sequence[int], chunk: ChunkStorageMetadata, split: int) -> Iterator[Rows]:
    """Where in the tensor the elements of a chunk lie, which is whole behind dimension `split`."""
    inner = math.prod(size[split + 1 :])
    width = chunk.sizes[split] * inner if size else 1
    left = chunk.offsets[split] * inner if size else 0
    apart = math.prod(size[split:])
    if width == 0 or math.prod(chunk.sizes) == 0:
        return
    begin_in_chunk = 0
    for first, count in _leading(size[:split], chunk):
        yield Rows(
            begin=first * apart + left,
            begin_in_chunk=begin_in_chunk,
            count=count,
            width=width,
            apart=apart,
        )
        begin_in_chunk += count * width


def _leading(size: Sequence[int], chunk: ChunkStorageMetadata) -> Iterator[tuple[int, int]]:
    """Runs of what the dimensions in front number, the last of them the fastest: first, count."""
    if not size:
        yield 0, 1
        return
    whole = len(size) - 1
    while whole > 0 and chunk.sizes[whole] == size[whole]:
        whole -= 1
    below = math.prod(size[whole + 1 :])
    ranges = [range(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
    for outer in itertools.product(*ranges[:whole]):
        first = 0
        for index, length in zip(outer, size, strict=False):
            first = first * length + index
        first = first * size[whole] + chunk.offsets[whole]
        yield first * below, chunk.sizes[whole] * below


def _split_dimension(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> int:
    """The last dimension of which some chunk holds a part only; 0 if all are whole."""
    parts = [d for chunk in chunks for d, n in enumerate(chunk.sizes) if n != size[d]]
    return max(parts, default=0)
