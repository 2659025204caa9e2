"""What the files of a step hold and where it lies, as columns of numbers.

    names [m]      with a shape and a dtype each; a value that is no tensor has none
    pieces [n]     offsets, sizes [n, d], file, begin, length; those of one name stand together
    starts [m+1]   pieces of name i are starts[i] to starts[i + 1]

d is the most dimensions that any piece has, the rest is 0 and 1. A save writes it beside
`.metadata`, which says the same in objects: of 512 ranks' it takes seconds to make them. A folder
of others has `.metadata` alone.
"""

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import TensorBytes, TensorEntry
from ray_ckpt.tensors.chunks import Chunk
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.save_columns import Ints, padded
from ray_ckpt.tensors.save_layout import Places
from ray_ckpt.tensors.save_plan import GlobalPlan

_OPTIMIZER = "optimizer"
"""First segment of the names of its tensors."""
_COLUMNS = ("starts", "offsets", "sizes", "begins", "lengths")
_FILE_NUMBERS, _TEXT = "file_numbers", "told"


@dataclass(frozen=True, kw_only=True)  # no slots: what follows from it is kept once it is known
class StepIndex:
    """Of one folder."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[torch.dtype | None]
    starts: Ints
    offsets: Ints
    sizes: Ints
    files: Sequence[str]
    file_numbers: npt.NDArray[np.int32]
    begins: Ints
    lengths: Ints
    wrapped: frozenset[int] = frozenset()
    """Pieces around which something was put (compression, say) that torch alone can take off."""

    @classmethod
    def of(cls, metadata: Metadata) -> "StepIndex":
        """As DCP has written it.

        Raises:
            IntegrityError: it does not say where a piece lies.
        """
        pieces = list(_pieces(metadata))
        counts = [
            len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 1
            for entry in metadata.state_dict_metadata.values()
        ]
        depth = max((len(offsets) for offsets, _, _ in pieces), default=0)
        files: dict[str, int] = {}
        return cls(
            names=list(metadata.state_dict_metadata),
            shapes=[_shape(entry) for entry in metadata.state_dict_metadata.values()],
            dtypes=[_dtype(entry) for entry in metadata.state_dict_metadata.values()],
            starts=np.cumsum([0, *counts], dtype=np.int64),
            offsets=padded([offsets for offsets, _, _ in pieces], depth, 0),
            sizes=padded([sizes for _, sizes, _ in pieces], depth, 1),
            file_numbers=np.array(
                [files.setdefault(at.relative_path, len(files)) for _, _, at in pieces], np.int32
            ),
            files=list(files),
            begins=np.array([at.offset for _, _, at in pieces], np.int64),
            lengths=np.array([at.length for _, _, at in pieces], np.int64),
            wrapped=frozenset(n for n, (_, _, at) in enumerate(pieces) if _is_wrapped(at)),
        )

    @classmethod
    def of_save(cls, plan: GlobalPlan, places: Places) -> "StepIndex":
        """Of what was planned and came to lie there."""
        order, starts = plan.by_name
        entries = plan.first_entries
        return cls(
            names=[entry.name for entry in entries],
            shapes=[entry.shape for entry in entries],
            dtypes=[None if entry.is_value else entry.dtype for entry in entries],
            starts=np.append(starts, len(order)),
            offsets=plan.offsets[order],
            sizes=plan.sizes[order],
            files=places.names,
            file_numbers=places.files[order],
            begins=places.begins[order],
            lengths=places.lengths[order],
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "StepIndex":
        """As `to_bytes` has written it; no pickle of it is run."""
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            told = json.loads(columns[_TEXT].tobytes())
            return cls(
                names=told["names"],
                shapes=list(map(tuple, told["shapes"])),
                dtypes=[None if name is None else getattr(torch, name) for name in told["dtypes"]],
                files=told["files"],
                file_numbers=columns[_FILE_NUMBERS].astype(np.int32),
                **{name: columns[name].astype(np.int64) for name in _COLUMNS},
            )

    def to_bytes(self) -> bytes:
        """A file in numpy's format, of columns as narrow as their numbers allow."""
        dtypes = [None if d is None else str(d).removeprefix("torch.") for d in self.dtypes]
        told = {"names": self.names, "shapes": self.shapes, "dtypes": dtypes, "files": self.files}
        text = np.frombuffer(json.dumps(told).encode(), np.uint8)
        columns: dict[str, Any] = {_TEXT: text}
        columns.update((name, _narrow(getattr(self, name))) for name in (*_COLUMNS, _FILE_NUMBERS))
        stream = io.BytesIO()
        np.savez(stream, **columns)
        return stream.getvalue()

    @classmethod
    def of_specs(cls, specs: Mapping[str, TensorSpec]) -> "StepIndex":
        """Tensors that are made when they are read, each of one piece, which lies nowhere."""
        shapes = [spec.shape for spec in specs.values()]
        depth = max(map(len, shapes), default=0)
        nowhere = np.zeros(len(shapes), np.int64)
        return cls(
            names=list(specs),
            shapes=shapes,
            dtypes=[spec.dtype for spec in specs.values()],
            starts=np.arange(len(shapes) + 1),
            offsets=np.zeros((len(shapes), depth), np.int64),
            sizes=padded(shapes, depth, 1),
            files=[""],
            file_numbers=nowhere.astype(np.int32),
            begins=nowhere,
            lengths=nowhere,
        )

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Name to number."""
        return {name: number for number, name in enumerate(self.names)}

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {
            name: TensorSpec(shape=shape, dtype=dtype)
            for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True)
            if dtype is not None
        }

    def entries(self) -> tuple[TensorEntry, ...]:
        """What the manifest says of every tensor, sorted by name."""
        return tuple(
            TensorEntry(
                name=name, dtype=str(spec.dtype).removeprefix("torch."), shape=tuple(spec.shape)
            )
            for name, spec in sorted(self.specs().items())
        )

    def tensor_bytes(self, model_keys: Collection[str]) -> dict[str, TensorBytes]:
        """What the manifest says of every file with tensors in it."""
        own = set(model_keys)
        optimizers = {name for name in self.names if name.partition(".")[0] == _OPTIMIZER}
        model, optimizer = self._bytes_by_file(own), self._bytes_by_file(optimizers - own)
        held = zip(self.files, model, optimizer, strict=True)
        return {file: TensorBytes(m, o) for file, m, o in held if m or o}

    def _bytes_by_file(self, wanted: Collection[str]) -> list[int]:
        is_wanted = [
            name in wanted and dtype is not None
            for name, dtype in zip(self.names, self.dtypes, strict=True)
        ]
        found = np.zeros(len(self.files), np.int64)
        pieces = np.repeat(is_wanted, np.diff(self.starts))
        np.add.at(found, self.file_numbers[pieces], self.lengths[pieces])
        return found.tolist()

    def values(self) -> list[str]:
        """Names of what is no tensor."""
        return [n for n, dtype in zip(self.names, self.dtypes, strict=True) if dtype is None]

    def pieces(self, number: int) -> range:
        """Of one name."""
        return range(int(self.starts[number]), int(self.starts[number + 1]))

    def is_wrapped(self, name: str) -> bool:
        """Whether something was put around it."""
        return not self.wrapped.isdisjoint(self.pieces(self.numbers[name]))

    def offsets_in(self, number: int, piece: int) -> tuple[int, ...]:
        """Where a piece of the name lies in the whole."""
        return tuple(self.offsets[piece, : len(self.shapes[number])].tolist())

    def sizes_in(self, number: int, piece: int) -> tuple[int, ...]:
        """How much of it the piece is."""
        return tuple(self.sizes[piece, : len(self.shapes[number])].tolist())

    def place(self, piece: int) -> tuple[str, int, int]:
        """File, first byte, number of bytes."""
        file = self.files[int(self.file_numbers[piece])]
        return file, int(self.begins[piece]), int(self.lengths[piece])

    def chunk(self, folder: str, number: int, piece: int) -> Chunk:
        """The piece of that tensor, as it lies in its file."""
        dtype = self.dtypes[number]
        assert dtype is not None, "values have no chunks"
        file, begin, length = self.place(piece)
        spec = TensorSpec(shape=self.sizes_in(number, piece), dtype=dtype)
        is_plain = piece not in self.wrapped
        return Chunk.of(f"{folder}/{file}", begin, length, spec, is_plain=is_plain)

    def ends(self) -> dict[str, int]:
        """File to the end of the last piece in it."""
        found = np.zeros(len(self.files), np.int64)
        np.maximum.at(found, self.file_numbers, self.begins + self.lengths)
        return dict(zip(self.files, found.tolist(), strict=True))


def _narrow(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _pieces(metadata: Metadata) -> Iterator[tuple[Sequence[int], Sequence[int], Any]]:
    """Offsets, sizes and place of each, name after name."""
    stored = cast(Mapping[MetadataIndex, Any], metadata.storage_data or {})
    for name, entry in metadata.state_dict_metadata.items():
        try:
            if isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    at = stored[MetadataIndex(name, chunk.offsets)]
                    yield chunk.offsets, chunk.sizes, at
            else:
                yield (), (), stored[MetadataIndex(name)]
        except KeyError as error:
            raise IntegrityError(f"the index does not say where {name} lies") from error


def _shape(entry: Any) -> tuple[int, ...]:
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else ()


def _dtype(entry: Any) -> torch.dtype | None:
    return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None


def _is_wrapped(at: Any) -> bool:
    """An older torch has no word for it."""
    return bool(getattr(at, "transform_descriptors", None))
