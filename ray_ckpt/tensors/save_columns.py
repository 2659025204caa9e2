"""What one rank has to save, as columns of numbers: a hundredth of the same as DCP's objects.

Table      rank 0's kinds of item, which most ranks share: names, shapes, dtypes
Columns    one rank's items: which kind each is, and which part of the whole

items      entries [n] into table and own     offsets [n, d]     sizes [n, d]
           d is the most dimensions that any of them has; the rest is 0 and 1
"""

import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

Ints = npt.NDArray[np.int64]
Paths = Mapping[str, Any]
"""DCP's: flat key to path in the nested state dict."""


class Entry(NamedTuple):
    """All that pieces of one tensor have in common, or one value that is no tensor."""

    name: str
    kind: int
    """A WriteItemType's."""
    shape: tuple[int, ...] = ()
    """Of the whole tensor."""
    properties: tuple[Any, ...] | None = None
    """A TensorProperties' state; None for a value."""

    @property
    def is_value(self) -> bool:
        """Whether it is no tensor."""
        return self.properties is None

    @property
    def is_shard(self) -> bool:
        """Whether there may be more pieces than this one."""
        return self.kind == WriteItemType.SHARD.value

    @property
    def dtype(self) -> torch.dtype:
        """Of a tensor."""
        assert self.properties is not None, "only tensors have one"
        return self.properties[0]


@dataclass(frozen=True, slots=True)
class Table:
    """What rank 0 has."""

    entries: Sequence[Entry]
    paths: Paths

    @classmethod
    def of(cls, items: Sequence[WriteItem], paths: Paths) -> "Table":
        """Each kind once, in the order of the items."""
        return cls(list(dict.fromkeys(map(_entry, items))), paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What one rank has."""

    own: Sequence[Entry]
    """That the table lacks; they are counted on from its end."""
    paths: Paths
    """Of keys that the table lacks."""
    entries: npt.NDArray[np.int32]
    offsets: Ints
    sizes: Ints

    @classmethod
    def of(cls, items: Sequence[WriteItem], paths: Paths, table: Table) -> "Columns":
        """The items in their order."""
        numbers = {entry: number for number, entry in enumerate(table.entries)}
        entries = [numbers.setdefault(_entry(item), len(numbers)) for item in items]
        chunks = [item.tensor_data.chunk if item.tensor_data else None for item in items]
        depth = max((len(chunk.offsets) for chunk in chunks if chunk), default=0)
        return cls(
            own=list(numbers)[len(table.entries) :],
            paths={key: path for key, path in paths.items() if key not in table.paths},
            entries=np.array(entries, np.int32),
            offsets=padded([chunk.offsets if chunk else () for chunk in chunks], depth, 0),
            sizes=padded([chunk.sizes if chunk else () for chunk in chunks], depth, 1),
        )


def packed(value: Any) -> bytes:
    """For the way between two ranks: columns shrink to a tenth."""
    return zlib.compress(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), 1)


def unpacked(data: bytes) -> Any:
    """What was packed, by a rank of this training."""
    return pickle.loads(zlib.decompress(data))


def properties_of(entry: Entry) -> TensorProperties:
    """As DCP has them."""
    properties = TensorProperties()
    properties.__setstate__(entry.properties)
    return properties


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    if data is None:
        return Entry(item.index.fqn, item.type.value)
    properties = data.properties.__getstate__()
    return Entry(item.index.fqn, item.type.value, tuple(data.size), properties)


def padded(rows: Sequence[Sequence[int]], depth: int, rest: int) -> Ints:
    """[len(rows), depth]; short rows are filled up."""
    filler = (rest,) * depth
    flat = [number for row in rows for number in (*row, *filler[len(row) :])]
    return np.array(flat, np.int64).reshape(len(rows), depth)
