"""The files that one rank writes of a save: what moves, and what stands still beside it.

    __<rank>_0.distcp    small values, then tensors that move
    __<rank>_1.distcp    tensors that stand still: written, or taken over from the save before

A second file is only there where it pays: see `still`. If it cannot be taken over, whatever the
reason, it is written from memory, so that a save never depends on an older step.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ray_ckpt.core.errors import (
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    TransientError,
)
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.commit import Kept
from ray_ckpt.storage.host_memory.copies import Around, FileInMemory, InSegment
from ray_ckpt.tensors.save_target import SaveTarget
from ray_ckpt.tensors.shard_file import digest_of_item, is_plain, new_shard, on_the_host, pieces_of
from ray_ckpt.tensors.still import NOTHING, Division, Knowledge, Memory, Seen, StillFile

log = logging.getLogger("ray_ckpt")
_FOR_NOW = (ObjectNotFoundError, TransientError, StorageFullError)
"""Reasons why a file is not taken over this time."""
_MOVING, _STILL = 0, 1
_FRAME_BYTES = 4096
"""Around a tensor, at most; and a guess at a value, of which nobody knows the size before."""
Find = Callable[[Tensor], tuple[int, int] | None]
"""Number of the segment that a tensor lies in, and where; None if it lies in none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """One file of a rank."""

    entry: FileEntry
    places: Mapping[MetadataIndex, tuple[int, int]]
    """Where each item begins in it, and its length, in bytes."""
    digests: Mapping[MetadataIndex, str]
    """Of the plain tensors in it; empty where nobody is to know them."""
    is_taken_over: bool = False
    """Whether its bytes are an older step's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Into:
    """Where the files of one rank go, and how much of them may be an older step's."""

    target: SaveTarget
    staging: Path
    folder: str
    """The step's."""
    full_every_saves: int
    """So many steps in a row may share a file; 1 for none."""


class RankFiles:
    """The files of one save of one rank: `write`, and `remember` once the save has ended well."""

    def __init__(self, plan: SavePlan, planner: SavePlanner, into: Into, memory: Memory) -> None:
        self._values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        self._tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self._prefix = plan.storage_data.prefix
        self._planner = planner
        self._into = into
        self._memory = memory
        self._remembers = into.full_every_saves > 1 and not memory.is_refused
        self._knowledge = self._known()
        self._next = NOTHING
        self._files: Sequence[RankFile] = ()
        self._is_sound: Callable[[WriteItem], bool] = lambda _: True
        self.unsound: set[MetadataIndex] = set()
        """Weights with NaN or Inf in them."""

    def write(self, is_sound: Callable[[WriteItem], bool]) -> list[RankFile]:
        """All items are in these files, small values first, then the tensors."""
        expected = self._knowledge.expected()
        looked = self._looked(item for item in self._tensors if item.index in expected)
        division = self._knowledge.divide(looked, full_every_saves=self._into.full_every_saves)
        seen = self._knowledge.seen
        self.unsound = {index for index in division.same if not seen[index].is_sound}
        self._is_sound = lambda item: item.index in division.same or is_sound(item)
        files = self._divided(division, looked)
        self._files = files
        self._next = Knowledge(
            seen=self._knowledge.after(self._found(files), expected=expected),
            file=self._still_file(files),
        )
        return files

    def in_memory(self, find: Find) -> list[FileInMemory]:
        """The files, and where their plain tensors lie in memory that outlives this save."""
        items = {item.index: item for item in self._tensors}
        return [
            FileInMemory(
                entry=file.entry,
                bytes_of_it=tuple(
                    piece
                    for index, place in file.places.items()
                    if index in items
                    for piece in self._lying(items[index], place, find)
                ),
            )
            for file in self._files
        ]

    def _lying(
        self, item: WriteItem, place: tuple[int, int], find: Find
    ) -> Iterator[Around | InSegment]:
        tensor = self._planner.resolve_data(item)
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            return
        found = find(tensor)
        begin, length = place
        front, elements, behind = pieces_of(tensor)
        at = begin + front.nbytes
        if found is None or at + elements.nbytes + behind.nbytes != begin + length:
            return  # nobody misses it: what is not in memory is read from storage
        yield Around(begin, bytes(front))
        yield InSegment(at, *found, elements.nbytes)
        yield Around(at + elements.nbytes, bytes(behind))

    def remember(self) -> None:
        """The save has ended well: the next one may take over its still file."""
        file = self._next.file
        if self._remembers:
            self._memory.keep(replace(self._next, file=self._as_it_lies(file) if file else None))

    def _as_it_lies(self, file: StillFile) -> StillFile | None:
        """The file of a step that is there now, whatever a look at it says."""
        into, entry = self._into, file.kept.entry
        try:
            return replace(file, kept=into.target.kept(into.folder, entry))
        except RayCkptError as error:
            self._tell(error, file.kept.key)
            return None

    def _known(self) -> Knowledge:
        """From the save before; nothing, if that one held tensors that are not here now."""
        known = self._memory.known
        here = {item.index for item in self._tensors}
        return known if self._remembers and known.seen.keys() <= here else NOTHING

    def _looked(self, items: Iterable[WriteItem]) -> dict[MetadataIndex, str]:
        """Digests of the plain ones among these tensors."""
        return {
            item.index: digest_of_item(tensor)
            for tensor, item in on_the_host(items, self._planner)
            if is_plain(tensor)
        }

    def _divided(self, division: Division, looked: Mapping[MetadataIndex, str]) -> list[RankFile]:
        moving = [item for item in self._tensors if item.index not in division.still]
        still = [item for item in self._tensors if item.index in division.still]
        files: list[RankFile] = []
        if moving or self._values:
            files.append(self._written(_MOVING, self._values, moving))
        if still:
            taken_over = self._taken_over(division.file, looked) if division.file else None
            files.append(taken_over or self._written(_STILL, [], still))
        return files

    def _written(
        self, number: int, values: Sequence[WriteItem], tensors: Sequence[WriteItem]
    ) -> RankFile:
        places: dict[MetadataIndex, tuple[int, int]] = {}
        plain: set[MetadataIndex] = set()
        name, into = self._name(number), self._into
        size_bytes = sum(_size_of(item) for item in [*values, *tensors])
        blocks = into.target.shard(into.staging, into.folder, name, size_bytes)
        with new_shard(blocks, name) as shard:
            for item in values:
                places[item.index] = shard.add(self._planner.resolve_data(item))
            for tensor, item in on_the_host(tensors, self._planner):
                places[item.index] = shard.add(tensor)
                plain |= {item.index} if is_plain(tensor) else set()
                if not self._is_sound(item):  # looked at here, while the disk writes
                    self.unsound.add(item.index)
            entry = shard.close()
        digests = zip(places, shard.digests(), strict=True) if self._remembers else ()
        of_plain = {index: digest for index, digest in digests if index in plain}
        return RankFile(entry=entry, places=places, digests=of_plain)

    def _taken_over(self, file: StillFile, looked: Mapping[MetadataIndex, str]) -> RankFile | None:
        """The file as the save before left it; None if it is to be written after all."""
        name, into = self._name(_STILL), self._into
        try:
            into.target.take_over(file.kept, into.staging, into.folder, name)
        except RayCkptError as error:
            self._tell(error, file.kept.key)
            return None
        digests = {index: looked[index] for index in file.places}
        entry = replace(file.kept.entry, path=name)
        return RankFile(entry=entry, places=file.places, digests=digests, is_taken_over=True)

    def _tell(self, error: RayCkptError, what: str) -> None:
        """Why a file is written again; and if that will be so each time, no more is tried."""
        if isinstance(error, StorageError) and not isinstance(error, _FOR_NOW):
            self._memory.is_refused = True
            log.warning("every save writes everything: no file can be taken over here\n%s", error)
        else:
            log.info("%s is not taken over but written again: %s", what, error.what)

    def _found(self, files: Iterable[RankFile]) -> dict[MetadataIndex, Seen]:
        return {
            index: Seen(
                digest=digest,
                num_bytes=file.places[index][1],
                is_sound=index not in self.unsound,
            )
            for file in files
            for index, digest in file.digests.items()
        }

    def _still_file(self, files: Iterable[RankFile]) -> StillFile | None:
        """The one that the next save may take over."""
        for file in files:
            if file.entry.path == self._name(_STILL):
                before = self._knowledge.file
                num_before = before.num_steps if before and file.is_taken_over else 0
                kept = Kept(folder=self._into.folder, entry=file.entry, mark=None)
                return StillFile(kept=kept, places=file.places, num_steps=num_before + 1)
        return None

    def _name(self, number: int) -> str:
        return f"{self._prefix}{number}{DEFAULT_SUFFIX}"


def _size_of(item: WriteItem) -> int:
    """About."""
    return (item.tensor_storage_size() or 0) + _FRAME_BYTES
