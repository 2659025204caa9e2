"""Safetensors files that several ranks fill together: each writes the elements that it holds.

    rank 0       makes the files: header, and room for every tensor
    each rank    its own rows of every output that is a view, straight to where they belong
    one rank     an output that is computed: the ranks bring its sources together there
    one rank     reads a file back, for its digest

No row is sent to another rank, and no byte is written twice.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.digests import STRONG_ALGORITHM, describe_file
from ray_ckpt.storage.disk.posix import sync_file, translated
from ray_ckpt.tensors.chunks import BLOCK_BYTES, bytes_of
from ray_ckpt.tensors.export_plan import ExportPlan
from ray_ckpt.tensors.gate import Values
from ray_ckpt.tensors.output_shards import OutputShard
from ray_ckpt.tensors.ranks import Ranks, raise_first
from ray_ckpt.tensors.recording import Output
from ray_ckpt.tensors.safetensors_file import header, in_file_order
from ray_ckpt.tensors.views import View

_SHORTEST_RUN = 64
"""Elements; what lies in shorter pieces is brought together first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an output lies in its file."""

    output: Output
    at: int
    """Its first byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What this rank holds of a tensor: some of its elements, which follow one upon the other."""

    elements: Tensor
    begin: int
    """Of the first one, counted in row-major order of the whole tensor."""
    is_written_here: bool
    """Whether this rank is the one among its equals that writes them."""


def write_together(
    plan: ExportPlan, tensors: Mapping[str, Tensor], ranks: Ranks, *, folder: Path
) -> list[FileEntry]:
    """Every file is there, synced; returns the entries of all, on every rank. Collective.

    An error of one rank is raised by all, at the end: the others need what it holds.
    """
    errors: list[Exception] = []
    fronts = {shard.file: _front(plan, shard) for shard in plan.shards}
    ranks.on_coordinator(lambda: _make(folder, plan, fronts))
    files = ranks.together(
        lambda: [
            _Writing(
                plan=plan,
                tensors=tensors,
                path=folder / shard.file,
                is_mine=number % ranks.size == ranks.rank,
            )
            for number, shard in enumerate(plan.shards)
        ]
    )
    for shard, file in zip(plan.shards, files, strict=True):
        for name, place in _places(plan, shard, len(fronts[shard.file])).items():
            file.write(name, place, errors)
        _attempt(file.close, errors)
    ranks.together(lambda: raise_first(errors))
    own = ranks.together(
        lambda: [
            describe_file(folder / shard.file, shard.file, STRONG_ALGORITHM)
            for number, shard in enumerate(plan.shards)
            if number % ranks.size == ranks.rank
        ]
    )
    return [entry for entries in ranks.gather(own) for entry in entries]


class _Writing:
    """One file, as one rank writes to it."""

    def __init__(
        self, *, plan: ExportPlan, tensors: Mapping[str, Tensor], path: Path, is_mine: bool
    ) -> None:
        self._plan = plan
        self._tensors = tensors
        self._path = path
        self._is_mine = is_mine
        with translated(path):
            self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, name: str, place: _Place, errors: list[Exception]) -> None:
        """What this rank has of one output. Collective where it is computed."""
        held = self._held(place.output)
        if held is None:
            self._write_computed(name, place, errors)
        elif held.is_written_here and not errors:
            _attempt(lambda: self._write_rows(name, place, held), errors)

    def close(self) -> None:
        """What was written here is on the disk."""
        with translated(self._path):
            os.close(self._descriptor)
            sync_file(self._path)

    def _held(self, output: Output) -> _Held | None:
        """What this rank has of it; None if nobody can write it from his own part alone."""
        view = output.view
        if view is None or _run_length(view) < min(_SHORTEST_RUN, view.num_elements):
            return None
        return _part_of(self._tensors[view.source].detach(), is_mine=self._is_mine)

    def _write_rows(self, name: str, place: _Place, held: _Held) -> None:
        view = place.output.view
        assert view is not None, "it is no computed one"
        values = self._values(name, place)
        item_bytes = place.output.spec.dtype.itemsize
        most = BLOCK_BYTES // held.elements.element_size()
        for begin, at, count in runs(view, held.begin, held.begin + held.elements.numel()):
            for first in range(0, count, most):
                start = begin - held.begin + first
                block = held.elements[start : start + min(most, count - first)]
                for dtype in view.casts:
                    block = block.to(dtype)
                values.look(block)
                self._put(block, place.at + (at + first) * item_bytes)

    def _write_computed(self, name: str, place: _Place, errors: list[Exception]) -> None:
        whole: dict[str, Tensor] = {}
        for key in place.output.sources:  # every rank, in this order
            tensor = self._tensors[key].detach()
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._is_mine:
                whole[key] = full.cpu().contiguous()
        if self._is_mine and not errors:
            _attempt(lambda: self._compute(name, place, whole), errors)

    def _compute(self, name: str, place: _Place, whole: Mapping[str, Tensor]) -> None:
        tensor = self._plan.recording.run([name], whole.__getitem__)[name].contiguous()
        values = self._values(name, place)
        if tensor.numel():
            values.look(tensor)
            self._put(tensor, place.at)
        values.end()

    def _put(self, block: Tensor, at: int) -> None:
        left = memoryview(bytes_of(block.cpu().contiguous()))
        with translated(self._path):
            while left.nbytes:
                done = os.pwrite(self._descriptor, left, at)
                at += done
                left = left[done:]

    def _values(self, name: str, place: _Place) -> Values:
        return Values(
            name,
            place.output.spec,
            allow_non_finite=self._plan.allow_non_finite,
            allow_zeros=self._plan.allow_zeros,
        )


def runs(view: View, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """What of a view is made of the elements `begin` to `end` of its source, piece by piece.

    Each is (first element in the source, first element in the view, number of elements).
    """
    length = _run_length(view)
    if not view.num_elements:
        return
    outer = list(zip(view.sizes, view.strides, strict=True))
    if length > 1:
        outer = outer[:-1]
    starts = torch.tensor([view.offset])
    for size, stride in outer:
        starts = (starts[:, None] + torch.arange(size) * stride).reshape(-1)
    chosen = ((starts < end) & (starts + length > begin)).nonzero().flatten()
    for number, start in zip(chosen.tolist(), starts[chosen].tolist(), strict=True):
        first, behind = max(start, begin), min(start + length, end)
        yield first, number * length + first - start, behind - first


def _run_length(view: View) -> int:
    """How many elements of a view follow one upon the other in its source."""
    if not view.sizes:
        return 1
    return view.sizes[-1] if view.strides[-1] == 1 else 1


def _part_of(tensor: Tensor, *, is_mine: bool) -> _Held | None:
    """What this rank holds; None where its elements do not follow one upon the other."""
    if not isinstance(tensor, DTensor):
        return _Held(elements=tensor.contiguous().view(-1), begin=0, is_written_here=is_mine)
    shards = [(n, p) for n, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    if len(shards) > 1 or any(type(p) is not Shard or p.dim != 0 for _, p in shards):
        return None
    local = tensor.to_local().contiguous().view(-1)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank has a part of the mesh"
    copies = [at for n, at in enumerate(coordinate) if n not in {n for n, _ in shards}]
    if not shards:
        return _Held(elements=local, begin=0, is_written_here=is_mine)
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    return _Held(elements=local, begin=offset[0] * row, is_written_here=not any(copies))


def _front(plan: ExportPlan, shard: OutputShard) -> bytes:
    specs = {name: plan.recording.outputs[name].spec for name in shard.outputs}
    return header(in_file_order(specs), plan.file_metadata)


def _places(plan: ExportPlan, shard: OutputShard, at: int) -> dict[str, _Place]:
    outputs = {name: plan.recording.outputs[name] for name in shard.outputs}
    places: dict[str, _Place] = {}
    for name, spec in in_file_order({n: output.spec for n, output in outputs.items()}).items():
        places[name] = _Place(output=outputs[name], at=at)
        at += spec.size_bytes
    return places


def _make(folder: Path, plan: ExportPlan, fronts: Mapping[str, bytes]) -> None:
    for shard in plan.shards:
        path = folder / shard.file
        with translated(path), path.open("xb") as file:
            file.write(fronts[shard.file])
            file.truncate(len(fronts[shard.file]) + shard.size_bytes)


def _attempt(act: Callable[[], None], errors: list[Exception]) -> None:
    try:
        act()
    except Exception as error:  # noqa: BLE001  the other ranks still need this one's pieces
        errors.append(error)
