"""DCP's `.metadata` made of columns: the bytes of a pickle, without the objects that it makes.

    of one save    whose it is, and what its files are called
    front          what else is told more than once: classes, words, names, distinct offsets, sizes
    tensors        of each name what it is and its chunks: 22 bytes a chunk
    places         of each item where it lies: 51 bytes

Objects of a tensor's every piece would take DCP ten seconds for half a million of them, and
pickling them as long again; rows of equal length are laid by numpy. `pickle.load` makes of it what
it would of DCP's file, with equal offsets and sizes being one object. While nothing moves, all but
the first part is the same in the next save.
"""

import io
import pickle
import struct
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from ray_ckpt.tensors.save_columns import properties_of
from ray_ckpt.tensors.save_layout import Places
from ray_ckpt.tensors.save_plan import Distinct, GlobalPlan

_NEW, _BUILD, _STOP = b")\x81", b"b", b"."
_DICT, _LIST, _MARK, _PUT_ITEMS, _PUT_ALL = b"}", b"]", b"(", b"u", b"e"
_GET, _NUMBER, _LONG = b"j", b"J", b"\x8a\x08"
_META, _FIRST_FILE = 0, 1
"""Numbers in the memo of what belongs to one save."""
Part = bytes | npt.NDArray[Any]


class MetadataFile:
    """Of every save by this plan whose items come to lie so, whatever its files are called."""

    def __init__(self, plan: GlobalPlan, places: Places) -> None:
        memo = _Memo(_FIRST_FILE + len(places.names))
        offsets = memo.sizes(plan.shared_offsets)
        metadata = _object(
            memo,
            Metadata({}),
            state_dict_metadata=_tensors(memo, plan, offsets),
            planner_data=_plain(plan.paths),
            storage_data=_DICT + _MARK + _stored(memo, plan, places, offsets) + _PUT_ITEMS,
            storage_meta=_GET + struct.pack("<I", _META),
            version=_plain(CURRENT_DCP_VERSION),
        )
        self._rest = b"".join([*memo.front, metadata, _STOP])
        self._num_files = len(places.names)

    def of(self, files: Sequence[str], meta: StorageMeta) -> bytes:
        """The bytes of one save's; its files by their names, in the order of the places."""
        assert len(files) == self._num_files, "the places have a number for each"
        own = [_kept(_META, _plain(meta))]
        own += [_kept(_FIRST_FILE + number, _plain(name)) for number, name in enumerate(files)]
        return b"".join([b"\x80\x04", *own, self._rest])


def _kept(number: int, code: bytes) -> bytes:
    """What the code makes is in the memo, and nowhere else."""
    return code + b"r" + struct.pack("<I", number) + b"0"


class _Memo:
    """What the rest of the pickle points to; numbers below `first` are somebody else's."""

    def __init__(self, first: int) -> None:
        self.front: list[bytes] = []
        self._first = first
        self._numbers: dict[Hashable, int] = {}

    def number(self, key: Hashable, code: Any) -> int:
        """Of what the bytes that `code()` returns make; made once for each key."""
        if key not in self._numbers:
            number = self._numbers[key] = self._first + len(self._numbers)
            self.front.append(_kept(number, code()))
        return self._numbers[key]

    def get(self, key: Hashable, code: Any) -> bytes:
        """What puts it on the stack."""
        return _GET + struct.pack("<I", self.number(key, code))

    def word(self, text: str) -> bytes:
        """A string."""
        return self.get(text, lambda: _plain(text))

    def words(self, texts: Iterable[str]) -> npt.NDArray[np.uint32]:
        """The numbers of many."""
        return np.array([self.number(text, lambda t=text: _plain(t)) for text in texts], np.uint32)

    def kind(self, cls: type) -> bytes:
        """A class."""
        return self.get(cls, lambda: f"c{cls.__module__}\n{cls.__qualname__}\n".encode())

    def size(self, numbers: tuple[int, ...]) -> int:
        """The number of a torch.Size."""
        size = self.kind(torch.Size)
        return self.number(numbers, lambda: size + _plain(numbers) + b"\x85R")

    def sizes(self, distinct: Distinct) -> npt.NDArray[np.uint32]:
        """[n]: the numbers of all items'."""
        numbers = [self.size(value) for value in distinct.values]
        return np.array(numbers, np.uint32)[distinct.numbers]


def _tensors(memo: _Memo, plan: GlobalPlan, offsets: npt.NDArray[np.uint32]) -> bytes:
    order, _ = plan.by_name
    sizes = memo.sizes(plan.shared_sizes)
    chunk = ChunkStorageMetadata(torch.Size(()), torch.Size(()))
    row = _row(memo, chunk, offsets=_pointers(offsets[order]), sizes=_pointers(sizes[order]))
    rows = _laid(row, len(order))
    width = len(rows) // max(len(order), 1)
    pieces = [_DICT, _MARK]
    for entry, start, end in plan.named:
        pieces.append(memo.word(entry.name))
        if entry.is_value:
            pieces.append(memo.kind(BytesStorageMetadata) + _NEW)
            continue
        properties = properties_of(entry)
        pieces.append(
            _object(
                memo,
                TensorStorageMetadata(properties, torch.Size(()), []),
                properties=memo.get(entry.properties, lambda p=properties: _plain(p)),
                size=_GET + struct.pack("<I", memo.size(entry.shape)),
                chunks=b"".join([_LIST, _MARK, rows[start * width : end * width], _PUT_ALL]),
            )
        )
    return b"".join([*pieces, _PUT_ITEMS])


def _stored(
    memo: _Memo,
    plan: GlobalPlan,
    places: Places,
    offsets: npt.NDArray[np.uint32],
) -> bytes:
    """Keys and values of all items."""
    index = MetadataIndex("", torch.Size(()), 0)
    names = memo.words(entry.name for entry in plan.all_entries)[plan.entries]
    files = (_FIRST_FILE + places.files).astype(np.uint32)
    are_values = np.array([entry.is_value for entry in plan.all_entries], bool)[plan.entries]
    hints = _hints(plan)
    found = list[bytes]()
    for rows, is_value in (
        (np.flatnonzero(~are_values), False),
        (np.flatnonzero(are_values), True),
    ):
        fqn = _pointers(names[rows])
        key = (
            _row(memo, MetadataIndex(""), fqn=fqn, index=[b"N"])
            if is_value
            else _row(
                memo,
                index,
                fqn=fqn,
                index=[_NUMBER, hints[rows].astype("<i4")],
                offset=_pointers(offsets[rows]),
            )
        )
        info = _row(
            memo,
            _StorageInfo("", 0, 0),
            relative_path=_pointers(files[rows]),
            offset=[_LONG, places.begins[rows].astype("<i8")],
            length=[_LONG, places.lengths[rows].astype("<i8")],
        )
        found.append(_laid([*key, *info], len(rows)))
    return b"".join(found)


def _hints(plan: GlobalPlan) -> npt.NDArray[np.intp]:
    """[n]: which of its name's chunks an item is."""
    order, starts = plan.by_name
    counts = np.diff(np.append(starts, len(order)))
    found = np.empty(len(order), np.intp)
    found[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return found


def _object(memo: _Memo, example: Any, **fields: bytes) -> bytes:
    """An object like the example, with these fields."""
    columns: dict[str, list[Part]] = {name: [code] for name, code in fields.items()}
    return b"".join(bytes(part) for part in _row(memo, example, **columns))


def _row(memo: _Memo, example: Any, **fields: list[Part]) -> list[Part]:
    """The same for many: what differs are columns."""
    state = example.__getstate__()
    assert state.keys() == fields.keys(), "torch's records have the fields that we know"
    parts: list[Part] = [memo.kind(type(example)), _NEW, _DICT, _MARK]
    for name in state:
        parts += [memo.word(name), *fields[name]]
    return [*parts, _PUT_ITEMS, _BUILD]


def _pointers(numbers: npt.NDArray[np.uint32]) -> list[Part]:
    return [_GET, numbers.astype("<u4")]


def _laid(parts: Sequence[Part], count: int) -> bytes:
    """The parts one after the other, `count` times: constants, and columns [count]."""
    kinds = [f"S{len(part)}" if isinstance(part, bytes) else part.dtype for part in parts]
    rows = np.empty(count, np.dtype([(f"{n}", kind) for n, kind in enumerate(kinds)]))
    for number, part in enumerate(parts):
        rows[f"{number}"] = part
    return rows.tobytes()


def _plain(value: Any) -> bytes:
    """What pushes a value that repeats nothing and holds itself nowhere."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=2)
    pickler.fast = True  # no memo: its numbers would be taken for ours
    pickler.dump(value)
    return stream.getvalue()[2:-1]
