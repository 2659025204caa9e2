"""Any piece of any tensor of a DCP step, read from its files into place; nothing is held.

A tensor lies in chunks, one for each rank that held a part of it.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

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
from ray_ckpt.tensors.piece_reads import read_values
from ray_ckpt.tensors.reader import DcpReader, step_reader
from ray_ckpt.tensors.recording import TensorSpec


class StepTensors:
    """The tensors of one DCP folder; threads may share it.

    Raises:
        IntegrityError: its index differs from the manifest.
    """

    def __init__(self, store: Store, reader: DcpReader) -> None:
        self.uri = reader.uri
        self._store = store
        self._folder = str(reader.path)
        self._index = reader.index
        self._places: dict[str, list[tuple[Chunk, list[Rows]]]] = {}
        self._chunks = Chunks(store)

    @property
    def reads_at_once(self) -> int:
        """So many reads side by side are faster than one after the other."""
        return self._store.reads_at_once

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return self._index.specs()

    def others(self) -> list[str]:
        """Keys of what is no tensor, sorted."""
        return sorted(self._index.values())

    def pickled(self, key: str) -> bytes:
        """What is no tensor, as it lies there: nothing of it is run."""
        found: dict[str, bytes] = {}
        read_values(self._store, self._folder, self._index, [key], found.__setitem__)
        return found[key]

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor's elements."""
        return self._spec(key).dtype

    def whole(self, key: str) -> Tensor:
        """One tensor, contiguous and on the CPU."""
        spec = self._spec(key)
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
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
            shape, index = self._spec(key).shape, self._index
            number = index.numbers[key]
            parts = {
                piece: ChunkStorageMetadata(
                    torch.Size(index.offsets_in(number, piece)),
                    torch.Size(index.sizes_in(number, piece)),
                )
                for piece in index.pieces(number)
            }
            split = split_dimension(shape, list(parts.values()))
            self._places[key] = [
                (index.chunk(self._folder, number, piece), list(rows_of(shape, part, split)))
                for piece, part in parts.items()
            ]
        return self._places[key]

    def _spec(self, key: str) -> TensorSpec:
        number = self._index.numbers.get(key)
        dtype = None if number is None else self._index.dtypes[number]
        if number is None or dtype is None:
            raise IntegrityError(f"the index names no tensor {key}", self.uri)
        return TensorSpec(shape=self._index.shapes[number], dtype=dtype)


def step_tensors(catalog: Catalog, manifest: Manifest) -> StepTensors:
    """The tensors of one committed step."""
    return StepTensors(catalog.store, step_reader(catalog, manifest))
