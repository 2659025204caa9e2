"""A copy of the state in host memory, in buffers that are used again for the same key.

    stage(state_dict)      every tensor copied into the buffer of its key; then training may go on
    key                    the path of names in the nested state dict, never the source's storage:
                           a tensor that a hook makes anew at every call finds its buffer again
    segment                one mapping that holds the buffers of many keys; further ones are made
                           only for keys that are new or have changed their shape or dtype

Knows memory, not checkpoints: who writes the copy, and where to, is somebody else's.
"""

import copy
import itertools
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.cuda._pin_memory_utils as pin_memory_utils
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ray_ckpt.core.errors import StateDictError, UsageError

_ALIGNMENT_BYTES = 512
"""Of every buffer; what direct I/O and vector instructions ask for at most."""
_SPARSENESS = 2
"""Segments this many times larger than what is in use are given up for new ones."""

_WHOLE = frozenset({Tensor, int, float, bool, str, type(None)})
"""Types, most values are of, that are not taken apart."""

_LOCAL = "_local_tensor"
"""What a DTensor calls its part."""

Key = tuple[Any, ...]


class HostMemory(StrEnum):
    """Which memory the copies lie in."""

    PLAIN = "plain"
    """Of this process."""
    PINNED = "pinned"
    """Of this process and registered with CUDA, so that a GPU copies into it at full speed."""
    SHARED = "shared"
    """Another process can map it; registered too where CUDA is there. Linux only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a tensor lies in memory, without gaps."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a buffer lies, in words that another process understands."""

    segment: int | None
    """The segment's number; None for a tensor without elements."""
    offset_bytes: int
    layout: Layout


class Span(NamedTuple):
    """Where a segment lies in this process."""

    number: int
    """The segment's."""
    address: int
    num_bytes: int

    @classmethod
    def of(cls, number: int, mapping: mmap.mmap) -> "Span":
        """Of the segment that is mapped there."""
        num_bytes = len(mapping)
        return cls(number, _bytes(mapping, 0, num_bytes).data_ptr(), num_bytes)


def found_in(spans: Iterable[Span], tensor: Tensor) -> tuple[int, int] | None:
    """Number of the segment that the tensor lies in, and its byte there; None if it has none."""
    address = tensor.data_ptr()
    for span in spans:
        if tensor.nbytes and 0 <= address - span.address < span.num_bytes:
            return span.number, address - span.address
    return None


class Segment:
    """A stretch of host memory, freed when nobody holds it or a tensor in it any more."""

    _numbers = itertools.count()

    def __init__(self, num_bytes: int, memory: HostMemory) -> None:
        self.number = next(self._numbers)
        self.num_bytes = num_bytes
        self.descriptor = -1
        """Of a file without a name, so that no kill leaves anything behind; -1 if not shared."""
        if memory is HostMemory.SHARED:
            self.descriptor = os.memfd_create("ray_ckpt")
            weakref.finalize(self, os.close, self.descriptor)
            os.ftruncate(self.descriptor, num_bytes)
        self._mapping = map_segment(self.descriptor, num_bytes)
        self.span = Span.of(self.number, self._mapping)
        self._unpin: weakref.finalize[Any, Any] | None = None
        if memory is not HostMemory.PLAIN and torch.cuda.is_available():
            address = self.span.address
            pin_memory_utils.pin_memory(address, num_bytes)
            self._unpin = weakref.finalize(self, pin_memory_utils.unpin_memory, address)
            self._unpin.atexit = False  # CUDA may be gone before the interpreter is

    def tensor(self, offset_bytes: int, layout: Layout) -> Tensor:
        """A tensor in this memory."""
        return tensor_at(self._mapping, offset_bytes, layout)

    def close(self) -> None:
        """CUDA has forgotten the memory; tensors in it stay valid."""
        if self._unpin is not None:
            self._unpin()


def map_segment(descriptor: int, num_bytes: int) -> mmap.mmap:
    """The memory behind a segment's descriptor, or new private memory if it is -1."""
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if descriptor == -1 else mmap.MAP_SHARED
    return mmap.mmap(descriptor, num_bytes, flags=kind)


def tensor_at(mapping: mmap.mmap, offset_bytes: int, layout: Layout) -> Tensor:
    """A tensor in mapped memory, whose storage is as long as the tensor and not longer."""
    flat = _bytes(mapping, offset_bytes, layout.num_bytes).view(layout.dtype)
    return flat.as_strided(layout.shape, layout.stride)


def empty(layout: Layout) -> Tensor:
    """A tensor of its own; what a buffer without elements is."""
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffer:
    layout: Layout
    tensor: Tensor
    segment: Segment | None


class Stager:
    """Owns the buffers of one state; one `stage` at a time."""

    def __init__(self, memory: HostMemory) -> None:
        if memory is HostMemory.PINNED and not torch.cuda.is_available():
            raise UsageError("pinned memory needs a CUDA device", do="use HostMemory.PLAIN")
        if memory is HostMemory.SHARED and not hasattr(os, "memfd_create"):
            raise UsageError(
                "shared staging needs Linux", do="save with mode='async', and keep_in_memory_s=None"
            )
        self._memory = memory
        self._buffers: dict[Key, _Buffer] = {}
        self._sharded: dict[Key, DTensor] = {}
        """Those around buffers: to make one takes longer than to copy a small tensor."""
        self.segments: tuple[Segment, ...] = ()
        """Those that hold a buffer."""

    @property
    def num_bytes(self) -> int:
        """Host memory held at present."""
        return sum(segment.num_bytes for segment in self.segments)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same state on the host: training may change its own at once.

        DTensors stay DTensors of the same mesh and placements around a local tensor on the host;
        what is not a tensor is deep-copied. The tensors are overwritten by the next call. A tensor
        under two keys is copied twice.

        Raises:
            StateDictError: a tensor that has no plain memory to copy, named by its key.
        """
        sources = dict(_tensors(state_dict, ()))
        self._make_room({key: _layout(tensor) for key, tensor in sources.items()})
        _copy([(self._buffers[key].tensor, source) for key, source in sources.items()])
        return self._rebuilt(state_dict, ())

    def slot(self, tensor: Tensor) -> Slot:
        """Where a tensor that `stage` returned lies."""
        layout = _layout(tensor)
        if not layout.num_bytes:
            return Slot(segment=None, offset_bytes=0, layout=layout)
        found = self.find(tensor)
        assert found is not None, "not a tensor of this stager"
        return Slot(segment=found[0], offset_bytes=found[1], layout=layout)

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """Number of the segment that the tensor lies in, and where; None if it lies in none."""
        return found_in((segment.span for segment in self.segments), tensor)

    def close(self) -> None:
        """Nothing is held any more; staged states stay valid for who still has them."""
        for segment in self.segments:
            segment.close()
        self._buffers, self._sharded, self.segments = {}, {}, ()

    def _make_room(self, layouts: Mapping[Key, Layout]) -> None:
        """Every key has a buffer of its layout, and no other key has one."""
        kept = {key: b for key, b in self._buffers.items() if layouts.get(key) == b.layout}
        held_bytes = sum(segment.num_bytes for segment in _segments(kept.values()))
        if held_bytes > _SPARSENESS * sum(map(_padded_bytes, layouts.values())):
            kept = {}
        self._buffers = kept
        missing = {key: layout for key, layout in layouts.items() if key not in kept}
        self._buffers |= _allocate(missing, self._memory)
        self._sharded = {k: t for k, t in self._sharded.items() if (*k, _LOCAL) in self._buffers}
        self.segments = _segments(self._buffers.values())

    def _rebuilt(self, value: Any, key: Key) -> Any:
        """`value` with the buffers in place of its tensors."""
        if key in self._buffers:
            return self._buffers[key].tensor
        children = _children(value)
        if children is None:
            return copy.deepcopy(value)
        rebuilt = {k: self._rebuilt(v, (*key, k)) for k, v in children.items()}
        return self._shard(value, key, rebuilt) if type(value) is DTensor else _with(value, rebuilt)

    def _shard(self, value: DTensor, key: Key, children: dict[Any, Any]) -> DTensor:
        """Like `value`, around the buffer; the one of the last time, if it would be the same."""
        made = self._sharded.get(key)
        if made is None or not _is_alike(made, value, children):
            made = self._sharded[key] = _with(value, children)
        return made


def _allocate(layouts: Mapping[Key, Layout], memory: HostMemory) -> dict[Key, _Buffer]:
    """New buffers, side by side in one new segment."""
    num_bytes = sum(map(_padded_bytes, layouts.values()))
    segment = Segment(num_bytes, memory) if num_bytes else None
    buffers: dict[Key, _Buffer] = {}
    offset_bytes = 0
    for key, layout in layouts.items():
        if segment is None or not layout.num_bytes:
            buffers[key] = _Buffer(layout=layout, tensor=empty(layout), segment=None)
        else:
            tensor = segment.tensor(offset_bytes, layout)
            buffers[key] = _Buffer(layout=layout, tensor=tensor, segment=segment)
        offset_bytes += _padded_bytes(layout)
    return buffers


def _segments(buffers: Iterable[_Buffer]) -> tuple[Segment, ...]:
    return tuple(dict.fromkeys(b.segment for b in buffers if b.segment is not None))


def _padded_bytes(layout: Layout) -> int:
    return -(-layout.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _layout(tensor: Tensor) -> Layout:
    """Of a copy: dimensions in the same order, gaps closed, as `clone` has it."""
    # a tensor without gaps is its own model, and there may be thousands
    is_dense = tensor.is_contiguous()
    stride = (tensor if is_dense else torch.empty_like(tensor, device="meta")).stride()
    return Layout(dtype=tensor.dtype, shape=tuple(tensor.shape), stride=stride)


def _bytes(mapping: mmap.mmap, offset_bytes: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes, offset=offset_bytes)


def _tensors(value: Any, key: Key) -> Iterator[tuple[Key, Tensor]]:
    """Every plain tensor with its key."""
    children = _children(value)
    if children is not None:
        for name, child in children.items():
            yield from _tensors(child, (*key, name))
    elif isinstance(value, Tensor):
        yield key, _plain(value, key)


def _children(value: Any) -> Mapping[Any, Any] | None:
    """What `value` is made of, by name; None if it is not taken apart."""
    if type(value) in _WHOLE:
        return None
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_traceable_wrapper_subclass(value) and not isinstance(value, AsyncCollectiveTensor):
        parts = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    return None


def _with(value: Any, children: dict[Any, Any]) -> Any:
    """Like `value`, made of other children."""
    if isinstance(value, Mapping):
        return children
    if isinstance(value, list):
        return list(children.values())
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", tuple)  # a named tuple has its own
        return make(children.values())
    names, context = value.__tensor_flatten__()
    parts = {name: children.get(name, getattr(value, name)) for name in names}
    return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


def _is_alike(made: DTensor, value: DTensor, children: Mapping[Any, Any]) -> bool:
    """Whether what was made is what would be made of these."""
    is_around_it = made._local_tensor is children.get(_LOCAL)
    return is_around_it and (made._spec, made.requires_grad) == (value._spec, value.requires_grad)


def _plain(tensor: Tensor, key: Key) -> Tensor:
    """The tensor's own values, arrived if a collective is still bringing them."""
    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.wait()
    if isinstance(tensor, ShardedTensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise StateDictError(
            f"{'.'.join(map(str, key))} cannot be saved: a {type(tensor).__name__} on "
            f"{tensor.device} with layout {tensor.layout}",
            safe="nothing was saved",
            do="give a dense torch.Tensor or a DTensor",
        )
    return tensor.detach()


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Every target, on the host, has the values of its source.

    Devices copy on a stream of their own while the host's tensors are copied here, one after the
    other: torch's own threads reach the memory's speed (11.8 GB/s with one, 14.1 with two, where
    memcpy does 12.3 on one core), and neither `_foreach_copy_` nor threads around it were faster.
    """
    streams = {
        d: _side_stream(d) for d in {source.device for _, source in pairs} if d.type != "cpu"
    }
    for target, source in pairs:
        if source.device in streams:
            with streams[source.device]:
                target.copy_(source, non_blocking=True)
    for target, source in pairs:
        if source.device not in streams:
            target.copy_(source)
    for stream in streams.values():
        stream.synchronize()


def _side_stream(device: torch.device) -> torch.Stream:
    """A stream that starts when what the device was told so far is done."""
    stream = torch.Stream(device)
    stream.wait_stream(torch.accelerator.current_stream(device))
    return stream
