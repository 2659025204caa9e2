"""What one rank writes of a save, and the commit that the coordinator makes of all of it.

    every rank     writes its shards into the staging folder, digests computed as the bytes go by
    coordinator    hears sizes and digests, writes `.metadata`, assets and the manifest, and
                   commits (or, for a save that lies on the nodes, says where all of it is:
                   `save_target`)

When each of it happens, and that an error on one rank is raised on all: `save_protocol`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Place, merged
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.manifest import FileEntry, Manifest, ModelEntry, TensorEntry
from ray_ckpt.core.room import Room, refuse_without_room
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, digest_of
from ray_ckpt.storage.disk.posix import translated, write_synced
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.metadata_file import metadata_file
from ray_ckpt.tensors.ranks import Phase
from ray_ckpt.tensors.save_layout import Layout, Places, Written, tensor_entries
from ray_ckpt.tensors.save_plan import GlobalPlan
from ray_ckpt.tensors.save_target import IntoRoot, SaveTarget, Superseded
from ray_ckpt.tensors.shard_file import new_shard, on_the_host

log = logging.getLogger("ray_ckpt")


def no_note(save: str, phase: Phase) -> None:
    """Nobody waits."""


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """One save, as every rank knows it."""

    catalog: Catalog
    draft: Manifest
    """The manifest so far: everything but files, tensors and the model's keys."""
    assets: Mapping[str, bytes]
    """Files that go to `hf_assets/`, by name; only the coordinator's are written."""
    reserved: frozenset[str]
    """First segments of keys that are not the model's: `optimizer`, `rng`, ..."""
    check_lease: Callable[[], None]
    """Raises if another writer has taken over; called right before the commit."""
    supersedes: int | None = None
    """What is newer than this step, of another trainer, is another branch: it is set aside."""
    target: SaveTarget | None = None
    """Where the files go; None for the root itself."""
    note: Callable[[str, Phase], None] = no_note
    """Told how far this rank has come, for those who wait."""

    @property
    def step(self) -> int:
        """The step that is saved."""
        return self.draft.step

    @property
    def attempt(self) -> str:
        """Name of the staging folder, the same on every rank."""
        return names.save_attempt(self.draft.save_id)

    @property
    def goes_to(self) -> SaveTarget:
        """Where the files go."""
        return self.target or IntoRoot(catalog=self.catalog)

    def is_done(self) -> bool:
        """Whether storage shows this very save; one read."""
        return self.goes_to.holds(self.draft)


@dataclass(frozen=True)
class _DescribedResult(WriteResult):
    """A write result that carries its file's manifest entry."""

    file: FileEntry
    is_finite: bool = True
    """False for a weight with NaN or Inf in it."""
    place: Place | None = None
    """Where alone the file lies; None for the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What each rank says to the coordinator before anything is planned."""

    tied: Mapping[str, str]
    room: Room
    """Where it is to write."""


class CommittingWriter:
    """Writes the files of exactly one save."""

    def __init__(self, job: SaveJob) -> None:
        self._job = job
        self._target = job.goes_to
        self._staging: Path | None = None
        self._superseded: Superseded = ()
        self._tied: dict[str, str] = {}
        """Of all ranks: in a pipeline each knows its own part of the model."""

    def prepare_local_plan(self) -> Told:
        """Makes the staging folder; here, where a rank's error is carried to all of them."""
        self._staging = self._target.staging(self._job.attempt)
        told = Told(tied=self._model.tied, room=self._target.room(self._staging))
        self._job.note(self._job.attempt, Phase.PLANNED)
        return told

    def prepare_global_plan(self, told: Sequence[Told], num_bytes: Sequence[int]) -> None:
        """Refuses a step that is there already, or has no room, before a byte is written.

        On the coordinator, with what every rank has told, and the bytes that it is to write.
        """
        needs = [(rank.room, count) for rank, count in zip(told, num_bytes, strict=True)]
        refuse_without_room(f"step-{self._step}", needs)
        self._superseded = self._target.make_way(self._job.draft, self._job.supersedes)
        self._tied = {name: to for rank in told for name, to in rank.tied.items()}

    def prefix(self, rank: int) -> _StoragePrefix:
        """How the names of a rank's shards begin."""
        is_own = self._job.catalog.commit.names_shards_by_save
        save_id = self._job.draft.save_id
        return _StoragePrefix(names.shard_prefix(rank, save_id) if is_own else f"__{rank}_")

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Written:
        """Shards written, synced and handed over."""
        with translated(self._folder_of_attempt):
            results = self._written(plan, planner)
        self._target.contribute(self._folder_of_attempt, self._folder)
        written = _told_of(plan, results)
        self._job.note(self._job.attempt, Phase.WRITTEN)
        return written

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[_DescribedResult]:
        """All items of this rank, in one file: small values first, then the tensors."""
        if not plan.items:
            return []
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        places: dict[MetadataIndex, tuple[int, int]] = {}
        path = self._folder_of_attempt / name
        with new_shard(path, past_the_cache=not self._target.sends_at_once) as shard:
            for item in values:
                places[item.index] = shard.add(planner.resolve_data(item))
            for tensor, item in on_the_host(tensors, planner):
                places[item.index] = shard.add(tensor)
            entry = shard.close()
        place = self._place(name)
        broken = {item.index for item in tensors if not self._is_sound(item, planner)}
        return [
            _DescribedResult(
                index=index,
                size_in_bytes=length,
                storage_data=_StorageInfo(name, begin, length),
                file=entry,
                is_finite=index not in broken,
                place=place,
            )
            for index, (begin, length) in places.items()
        ]

    def _is_sound(self, item: WriteItem, planner: SavePlanner) -> bool:
        """Whether a weight is finite everywhere; optimizers may hold what they like."""
        if item.index.fqn.partition(".")[0] in self._job.reserved:
            return True
        return is_finite(planner.resolve_data(item))

    def finish(
        self, *, plan: GlobalPlan, layouts: Sequence[Layout], written: Sequence[Written]
    ) -> None:
        """On the coordinator, after every rank has written: the step is committed."""
        lying = Places.of(written, layouts)
        # the step's name instead of a path of this machine; equal for equal content
        meta = StorageMeta(checkpoint_id=self._folder)
        with translated(self._folder_of_attempt):
            files = {names.METADATA: metadata_file(plan, lying, meta), **self._assets()}
            extra = [self._write(name, data) for name, data in files.items()]
        shards = [entry for rank in written for entry in rank.files]
        tensors = tensor_entries(plan, lying)
        manifest = replace(
            self._job.draft,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted([*shards, *extra], key=lambda entry: entry.path)),
            tensors=tensors,
            model=self._model_entry(tensors),
            non_finite=tuple(sorted({name for rank in written for name in rank.non_finite})),
        )
        places = [
            *(place for rank in written for place in rank.places),
            *(self._place(entry.path) for entry in extra),
        ]
        draft = Draft(manifest=manifest, places=merged(places), supersedes=self._superseded)
        self._job.check_lease()
        try:
            self._target.end(self._folder_of_attempt, draft)
        except StorageError as error:
            if not self._job.is_done():
                raise
            log.warning("step-%d is there, but may not survive a power cut\n%s", self._step, error)

    def discard(self) -> None:
        """Nothing of this attempt is left."""
        if self._staging is not None:
            self._target.discard(self._staging)

    def leave(self) -> None:
        """Nothing is left of this attempt but what it has handed over."""
        if self._staging is not None:
            self._target.leave(self._staging)

    @property
    def _folder_of_attempt(self) -> Path:
        assert self._staging is not None, "a save plans before it writes"
        return self._staging

    @property
    def _model(self) -> ModelEntry:
        return self._job.draft.model or ModelEntry(family=None, keys=())

    @property
    def _step(self) -> int:
        return self._job.draft.step

    @property
    def _folder(self) -> str:
        return names.step_dir(self._step)

    def _place(self, name: str) -> Place | None:
        node = self._target.node
        folder = str(self._folder_of_attempt)
        return None if node is None else Place(node=node, folder=folder, files=(name,))

    def _assets(self) -> dict[str, bytes]:
        return {f"{names.ASSETS}/{name}": data for name, data in self._job.assets.items()}

    def _write(self, name: str, data: bytes) -> FileEntry:
        path = self._folder_of_attempt / name
        path.parent.mkdir(exist_ok=True)
        write_synced(path, data)
        digest = digest_of(data, STRONG_ALGORITHM)
        return FileEntry(path=name, size_bytes=len(data), digest=digest)

    def _model_entry(self, tensors: Sequence[TensorEntry]) -> ModelEntry:
        all_names = (entry.name for entry in tensors)
        keys = (name for name in all_names if name.partition(".")[0] not in self._job.reserved)
        return replace(self._model, keys=tuple(keys), tied=self._tied)


def _told_of(plan: SavePlan, results: Sequence[_DescribedResult]) -> Written:
    """What the coordinator hears of the items, in the order of the plan."""
    by_index = {result.index: result for result in results}
    ordered = [by_index[item.index] for item in plan.items]
    files = {result.file.path: result.file for result in ordered}
    numbers = {path: number for number, path in enumerate(files)}
    stored = [result.storage_data for result in ordered]
    return Written(
        files=tuple(files.values()),
        layout=Layout(
            files=np.array([numbers[one.relative_path] for one in stored], np.int32),
            begins=np.array([one.offset for one in stored], np.int64),
            lengths=np.array([one.length for one in stored], np.int64),
        ),
        non_finite=tuple(result.index.fqn for result in ordered if not result.is_finite),
        places=merged(result.place for result in ordered),
    )
