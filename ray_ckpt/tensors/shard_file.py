"""One rank's shard of a DCP step: items one after the other, each as torch frames it, in one pass.

    a dense tensor    front and end of the zip file that `torch.save` would write, made once for
                      each dtype and shape, and between them the elements as they lie in memory
    anything else     by torch itself

The file is digested while it is written. The zip's own CRC-32 of the elements is left out, as
`torch.serialization.set_crc32_options(False)` does it: it would take longer than the write, torch
never looks at it, and the manifest has a digest of every byte.
"""

import contextlib
import io
from collections.abc import Generator, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import SavePlanner
from torch.distributed.checkpoint.filesystem import _OverlappingCpuLoader, _SerialCpuLoader
from torch.distributed.checkpoint.planner import WriteItem
from typing_extensions import Buffer

from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Blocks
from ray_ckpt.storage.digests import SHARD_ALGORITHM, digest_behind, digest_of, new_digest
from ray_ckpt.storage.disk.ordered_write import OrderedWrite
from ray_ckpt.tensors.chunks import bytes_of
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.torch_file import around

_BYTES_IN_FLIGHT = 64 << 20
"""On their way from a GPU while others are written."""
_LOOK_BYTES = 8 << 20
"""Digested at once: other threads get their turn in between."""
EMPTY = digest_of(b"", SHARD_ALGORITHM)
"""Of no byte at all."""


class ShardFile:
    """A new file; it is there, whole and durable, once `close` has returned."""

    def __init__(self, blocks: Blocks, name: str) -> None:
        self._file = OrderedWrite(blocks, name=name, algorithm=SHARD_ALGORITHM)
        self._lengths: list[int] = []

    def add(self, item: io.BytesIO | Tensor) -> tuple[int, int]:
        """Where the item begins, and its length, in bytes."""
        begin = self._file.size_bytes
        if isinstance(item, io.BytesIO):
            self._file.write(item.getbuffer())
        elif is_plain(item):
            for piece in pieces_of(item):
                self._file.write(piece)
        else:
            torch.save(item, cast(Any, _Stream(self._file)))
        self._file.mark()
        self._lengths.append(self._file.size_bytes - begin)
        return begin, self._lengths[-1]

    def digests(self) -> Iterator[str]:
        """Of each item, in order, once the file is closed; no byte was read for them."""
        before = EMPTY
        for behind, length in zip(self._file.digests, self._lengths, strict=True):
            yield digest_behind(before, behind, length)
            before = behind

    def close(self) -> FileEntry:
        """The file's entry in a manifest."""
        return self._file.close()

    def discard(self) -> None:
        """The file is not there."""
        self._file.discard()


@contextlib.contextmanager
def new_shard(blocks: Blocks, name: str) -> Generator[ShardFile]:
    """A shard that the block fills; nothing is left of it after an error.

    Unless the place is at fault and cannot be told: what lies there is found as unfinished then.
    """
    shard = ShardFile(blocks, name)
    try:
        yield shard
    except BaseException:
        with contextlib.suppress(RayCkptError):
            shard.discard()
        raise


def on_the_host(
    items: Iterable[WriteItem], planner: SavePlanner
) -> Iterator[tuple[Tensor, WriteItem]]:
    """The tensors of these items; from a GPU some come while others are looked at."""
    loader = (
        _OverlappingCpuLoader(planner.resolve_data, inflight_threshhold=_BYTES_IN_FLIGHT)
        if torch.cuda.is_available()
        else _SerialCpuLoader(planner.resolve_data)
    )
    for item in items:
        loader.add(item.tensor_storage_size() or 0, item)
    loader.start_loading()
    yield from cast(Iterator[tuple[Tensor, WriteItem]], loader.values())


def digest_of_item(tensor: Tensor) -> str:
    """The digest that the tensor, a plain one, would have in a shard; nothing is written."""
    digest = new_digest(SHARD_ALGORITHM)
    for piece in pieces_of(tensor):
        for begin in range(0, piece.nbytes, _LOOK_BYTES):
            digest.update(piece[begin : begin + _LOOK_BYTES])
    return digest.text()


def pieces_of(tensor: Tensor) -> tuple[memoryview, memoryview, memoryview]:
    """What a plain tensor is in a shard."""
    front, behind = around(TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype))
    return memoryview(front), bytes_of(tensor), memoryview(behind)


def is_plain(tensor: Tensor) -> bool:
    """Whether its elements lie in memory as they are, in order and without gaps."""
    is_dense = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_quantized
    return is_dense and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


class _Stream(io.RawIOBase):
    """What torch writes is the next of the file."""

    def __init__(self, file: OrderedWrite) -> None:
        self._file = file

    def write(self, data: Buffer) -> int:
        """All of `data`, always."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        return len(view)
