"""Any piece of any tensor of a DCP step, read from its files into place; nothing is held.

A tensor lies in chunks, one for each rank that held a part of it.
"""

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
from ray_ckpt.tensors.chunks import (
    BLOCK_BYTES,
    Chunk,
    Chunks,
    Rows,
    rows_of,
    split_dimension,
)
from ray_ckpt.tensors.reader import DcpReader, step_reader
from ray_ckpt.tensors.recording import TensorSpec


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
        self._places: dict[str, list[tuple[Chunk, list[Rows]]]] = {}
        self._chunks = Chunks(store)

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

    def _read_rows(self, chunk: Chunk, rows: Rows, into: Tensor) -> None:
        if rows.count == 1:
            self._chunks.read(chunk, rows.begin_in_part, into[: rows.width])
            return
        together = torch.empty(rows.count * rows.width, dtype=into.dtype)
        self._chunks.read(chunk, rows.begin_in_part, together)
        shape = rows.count, rows.width
        into.as_strided(shape, (rows.apart, 1)).copy_(together.view(shape))

    def _placed(self, key: str) -> list[tuple[Chunk, list[Rows]]]:
        if key not in self._places:
            entry = self._entry(key)
            split = split_dimension(entry.size, entry.chunks)
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

    def _chunk(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> Chunk:
        stored: Mapping[MetadataIndex, Any] = cast(Any, self._metadata.storage_data)
        info = stored[MetadataIndex(key, chunk.offsets)]
        return Chunk.of(self._folder, info, chunk.sizes, entry.properties.dtype)


def step_tensors(catalog: Catalog, manifest: Manifest) -> StepTensors:
    """The tensors of one committed step."""
    return StepTensors(catalog.store, step_reader(catalog, manifest))
