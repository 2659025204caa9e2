"""What goes between a rank and its save process: records, and the state as memory that both map.

Tensors are never copied: a record says where each lies in shared memory, and which piece of the
whole it is. Values of the user's own classes are serialised where these are known.
"""

import io
import mmap
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ray_ckpt.core.errors import SaveError
from ray_ckpt.tensors.ranks import Phase
from ray_ckpt.tensors.save_planner import is_simple, pickled
from ray_ckpt.tensors.staging import Slot, Stager, empty, tensor_at
from ray_ckpt.tensors.writer import SaveJob, no_count, no_note


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStore:
    """To rank 0's child: make the place where the children meet; the answer is its port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """To every child: meet the others."""

    address: tuple[str, int]
    rank: int
    size: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """All memory that the next save lies in; descriptors of what is new follow, in this order."""

    num_bytes: dict[int, int]
    """By the segment's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save. Tensors are pickled as Slots."""

    job: SaveJob
    values: dict[str, Any]
    """By flat key: tensors, Sharded, Serialized, and numbers, strings and the like."""
    mappings: dict[str, Any]
    """DCP's: flat key to path in the nested state dict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Sent on the way: SaveJob.note was called."""

    save: str
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Sent at the end of every request."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serialized:
    """A value as `torch.save` writes it: its class need not be known to the child."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """A rank's chunks of a DTensor, without its mesh: one of DCP's checkpointable objects."""

    size: torch.Size
    """Of the whole tensor."""
    chunks: tuple[ChunkStorageMetadata, ...]
    tensors: tuple[Tensor, ...]
    """One per chunk."""

    @classmethod
    def of(cls, fqn: str, tensor: DTensor) -> "Sharded":
        """What DCP would ask the DTensor."""
        chunks = tuple(tensor.__create_chunk_list__())
        shards = (tensor.__get_tensor_shard__(MetadataIndex(fqn, c.offsets)) for c in chunks)
        return cls(size=tensor.size(), chunks=chunks, tensors=tuple(shards))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """One per chunk; equal to those of the DTensor."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(tensor),
                    size=self.size,
                ),
            )
            for chunk, tensor in zip(self.chunks, self.tensors, strict=True)
        ]

    def shard(self, index: MetadataIndex) -> Tensor:
        """The tensor of one write item."""
        return next(
            tensor
            for chunk, tensor in zip(self.chunks, self.tensors, strict=True)
            if chunk.offsets == index.offset
        )


def packed(job: SaveJob, staged: dict[str, Any], stager: Stager) -> bytes:
    """A Save, pickled."""
    flat, mappings = flatten_state_dict(staged)
    values = {key: _described(key, value) for key, value in flat.items() if _is_here(value)}
    buffer = io.BytesIO()
    _Packer(buffer, stager).dump(
        Save(job=replace(job, note=no_note, wrote=no_count), values=values, mappings=mappings)
    )
    return buffer.getvalue()


def _is_here(value: Any) -> bool:
    """False for a DTensor of which this rank has no part; DCP leaves it out, too."""
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def _described(key: str, value: Any) -> Any:
    if isinstance(value, DTensor):
        return Sharded.of(key, value)
    if isinstance(value, Tensor) or is_simple(value):
        return value
    return Serialized(data=pickled(value))


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, stager: Stager) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._stager = stager

    def persistent_id(self, obj: Any) -> Slot | None:
        """A staged tensor's place instead of its bytes."""
        return self._stager.slot(obj) if type(obj) is Tensor else None


class Unpacker(pickle.Unpickler):
    """Undoes :func:`packed` over mapped segments, by their numbers."""

    def __init__(self, data: bytes, mappings: Mapping[int, mmap.mmap]) -> None:
        super().__init__(io.BytesIO(data))
        self._mappings = mappings

    def persistent_load(self, pid: Any) -> Tensor:
        """The tensor in that place."""
        if pid.segment is None:
            return empty(pid.layout)
        return tensor_at(self._mappings[pid.segment], pid.offset_bytes, pid.layout)


def portable(error: BaseException) -> BaseException:
    """The error, if another process can read it; else one that tells of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever a foreign exception does when it is pickled
        return SaveError(repr(error), safe="nothing of it is visible; older steps are untouched")
    return error
