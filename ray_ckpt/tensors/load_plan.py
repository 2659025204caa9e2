"""Which elements of which pieces of a step fill a state dict, whoever had cut it how.

    held     of each tensor the part that is on this rank: offsets, sizes [w, d]
    pieces   of the same names in the step                                [n, d]
    reads    where a part and a piece overlap

Columns against columns: a rank of hundreds looks at each of its tensors' hundreds of pieces.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ray_ckpt.tensors.save_columns import Ints, padded
from ray_ckpt.tensors.step_index import StepIndex

_PAIRS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Elements of one piece, and the memory they are for."""

    name: str
    number: int
    """Of the name in the index."""
    piece: int
    offsets: tuple[int, ...]
    """In the piece."""
    sizes: tuple[int, ...]
    target: Tensor
    """Of these sizes; on any device, in any order in memory, of any dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What one rank reads."""

    reads: Sequence[Read]
    """In the order in which the pieces lie in the files: a disk reads ahead."""
    values: Sequence[str]
    """Names of what is no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What this rank holds of a tensor."""

    name: str
    number: int
    """Of the name in the index."""
    local: Tensor
    offsets: Sequence[int]


def plan_load(
    index: StepIndex, state_dict: Mapping[str, Any], reads: Callable[[str], bool]
) -> LoadPlan:
    """What fills the entries of a flat state dict of which `reads` says that this rank reads them.

    Raises:
        ValueError: the step lacks an entry, or has something else of its name.
    """
    places = _Places()
    parts: list[Part] = []
    values: list[str] = []
    for name, held in state_dict.items():
        number = _number(index, name, held)
        if index.dtypes[number] is None:
            values.append(name)
        elif (local := places.held(held)) is not None and reads(name):
            parts.append(Part(name=name, number=number, local=local[0], offsets=local[1]))
    return LoadPlan(reads=reads_of(index, parts), values=values)


def reads_of(index: StepIndex, parts: Sequence[Part]) -> list[Read]:
    """What fills the parts, in the order in which it lies."""
    found = [read for some in _together(index, parts) for read in _overlaps(index, some)]
    lie = np.array([read.piece for read in found], np.int64)
    order = np.lexsort((index.begins[lie], index.file_numbers[lie]))
    return [found[at] for at in order.tolist()]


def _number(index: StepIndex, name: str, held: Any) -> int:
    number = index.numbers.get(name)
    if number is None:
        raise ValueError(f"there is no {name}")
    if index.dtypes[number] is None:
        return number
    if not isinstance(held, Tensor):
        raise ValueError(f"{name} is a tensor there and {type(held).__name__} here")
    if tuple(held.shape) != index.shapes[number]:
        there = list(index.shapes[number])
        raise ValueError(f"{name} is {list(held.shape)} here and {there} there")
    return number


class _Places:
    """Where parts of DTensors lie; a parameter and its moments lie alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._is_here: dict[int, bool] = {}

    def held(self, tensor: Tensor) -> tuple[Tensor, Sequence[int]] | None:
        """What is here of the tensor, and its offsets; None if nothing is."""
        if not isinstance(tensor, DTensor):
            return tensor.detach(), (0,) * tensor.dim()
        mesh = tensor.device_mesh
        if id(mesh) not in self._is_here:
            self._is_here[id(mesh)] = mesh.get_coordinate() is not None
        if not self._is_here[id(mesh)]:
            return None
        local = tensor.to_local().detach()
        return local, self._offsets(tuple(tensor.shape), mesh, tuple(tensor.placements))

    def _offsets(
        self, shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...]
    ) -> tuple[int, ...]:
        key = shape, id(mesh), placements
        if key not in self._known:
            _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
            self._known[key] = tuple(offsets)
        return self._known[key]


def _together(index: StepIndex, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
    """As many at once as have not too many pieces."""
    begin = num_pairs = 0
    for end, part in enumerate(parts):
        num_pieces = len(index.pieces(part.number))
        if num_pairs and num_pairs + num_pieces > _PAIRS_AT_ONCE:
            yield parts[begin:end]
            begin, num_pairs = end, 0
        num_pairs += num_pieces
    yield parts[begin:]


def _overlaps(index: StepIndex, parts: Sequence[Part]) -> Iterator[Read]:
    depth = index.offsets.shape[1]
    numbers = np.array([part.number for part in parts], np.int64)
    begins = padded([part.offsets for part in parts], depth, 0)
    ends = begins + padded([part.local.shape for part in parts], depth, 1)
    of_part, pieces = _pairs(index.starts[numbers], index.starts[numbers + 1])
    piece_begins = index.offsets[pieces]
    low = np.maximum(begins[of_part], piece_begins)
    high = np.minimum(ends[of_part], piece_begins + index.sizes[pieces])
    overlap = np.flatnonzero((low < high).all(axis=1))
    low, high, of_part, pieces = low[overlap], high[overlap], of_part[overlap], pieces[overlap]
    rows = zip(
        of_part.tolist(),
        pieces.tolist(),
        (low - piece_begins[overlap]).tolist(),
        (low - begins[of_part]).tolist(),
        (high - low).tolist(),
        strict=True,
    )
    for at, piece, in_piece, in_part, lengths in rows:
        part = parts[at]
        num_dims = part.local.dim()
        sizes = tuple(lengths[:num_dims])
        is_all = sizes == tuple(part.local.shape)
        yield Read(
            name=part.name,
            number=part.number,
            piece=piece,
            offsets=tuple(in_piece[:num_dims]),
            sizes=sizes,
            target=part.local if is_all else narrowed(part.local, in_part[:num_dims], sizes),
        )


def _pairs(starts: Ints, ends: Ints) -> tuple[npt.NDArray[np.intp], Ints]:
    """Each of `len(starts)` with each number from its start to its end."""
    counts = ends - starts
    of_each = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(of_each)) - np.repeat(np.cumsum(counts) - counts, counts)
    return of_each, starts[of_each] + within


def narrowed(tensor: Tensor, begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """So much of it from there on, in each dimension: a view."""
    return tensor[tuple(slice(at, at + n) for at, n in zip(begins, sizes, strict=True))]
