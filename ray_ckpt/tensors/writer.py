"""DCP's writer with a commit at its end: one collective protocol from plan to visible step.

    every rank     writes its shards into the staging folder, digests computed as the bytes go by
    coordinator    gathers sizes and digests (DCP gathers the write results anyway), writes
                   `.metadata`, assets and the manifest, and commits (or, for a save that lies on
                   the nodes, says where all of it is: `save_target`)

An error on any rank reaches all of them through DCP, and nothing becomes visible.
"""

import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Place, merged
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.manifest import FileEntry, Manifest, ModelEntry
from ray_ckpt.core.room import Room, refuse_without_room
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, digest_of
from ray_ckpt.storage.disk.posix import translated, write_synced
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.index import model_keys, tensor_index
from ray_ckpt.tensors.ranks import Phase
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
    """A write result that carries its file's manifest entry to the coordinator."""

    file: FileEntry | None = None
    is_finite: bool = True
    """False for a weight with NaN or Inf in it."""
    place: Place | None = None
    """Where alone the file lies; None for the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What each rank says to the coordinator with its plan."""

    tied: Mapping[str, str]
    room: Room
    """Where it is to write."""


class CommittingWriter(FileSystemWriter):
    """A DCP storage writer for exactly one save."""

    def __init__(self, job: SaveJob) -> None:
        super().__init__(job.attempt)
        self._job = job
        self._target = job.goes_to
        self._staging: Path | None = None
        self._superseded: Superseded = ()
        self._tied: dict[str, str] = {}
        """Of all ranks: in a pipeline each knows its own part of the model."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the staging folder; here, where DCP carries a rank's error to all of them."""
        self._staging = self._target.staging(self._job.attempt)
        self.path = self._staging
        with translated(self._staging):
            prepared = super().prepare_local_plan(plan)
        self._job.note(self._job.attempt, Phase.PLANNED)
        told = _Told(tied=self._model.tied, room=self._target.room(self._staging))
        return replace(prepared, storage_data=told)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuses a step that is there already, or has no room, before a byte is written."""
        told = [cast(_Told, plan.storage_data) for plan in plans]
        needs = [(rank.room, _num_bytes(plan)) for rank, plan in zip(told, plans, strict=True)]
        refuse_without_room(f"step-{self._step}", needs)
        self._superseded = self._target.make_way(self._job.draft, self._job.supersedes)
        self._tied = {name: to for rank in told for name, to in rank.tied.items()}
        named = [replace(p, storage_data=self._prefix(rank)) for rank, p in enumerate(plans)]
        return super().prepare_global_plan(named)

    def _prefix(self, rank: int) -> _StoragePrefix | None:
        """How the names of a rank's shards begin; None: as torch does it."""
        if not self._job.catalog.commit.names_shards_by_save:
            return None
        return _StoragePrefix(names.shard_prefix(rank, self._job.draft.save_id))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Shards written, synced and handed over; each result knows its file's digest."""
        with translated(self._folder_of_attempt):
            results = self._written(plan, planner)
        self._target.contribute(self._folder_of_attempt, self._folder)
        described: Future[list[WriteResult]] = Future()
        described.set_result(results)
        self._job.note(self._job.attempt, Phase.WRITTEN)
        return described

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
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

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after every rank has written: the step is committed."""
        described = [cast(_DescribedResult, result) for rank in results for result in rank]
        # torch 2.11 fills them into a copy, 2.13 into the very object
        metadata.storage_data = {r.index: r.storage_data for r in described}
        metadata.storage_meta = self.storage_meta()
        metadata.version = CURRENT_DCP_VERSION
        with translated(self._folder_of_attempt):
            files = {names.METADATA: pickle.dumps(metadata), **self._assets()}
            extra = [self._write(name, data) for name, data in files.items()]
        shards = {result.file.path: result.file for result in described if result.file}
        manifest = replace(
            self._job.draft,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted([*shards.values(), *extra], key=lambda entry: entry.path)),
            tensors=tensor_index(metadata),
            model=self._model_entry(metadata),
            non_finite=tuple(sorted({r.index.fqn for r in described if not r.is_finite})),
        )
        places = [*(r.place for r in described), *(self._place(entry.path) for entry in extra)]
        draft = Draft(manifest=manifest, places=merged(places), supersedes=self._superseded)
        self._job.check_lease()
        try:
            self._target.end(self._folder_of_attempt, draft)
        except StorageError as error:
            if not self._job.is_done():
                raise
            log.warning("step-%d is there, but may not survive a power cut\n%s", self._step, error)

    def storage_meta(self) -> StorageMeta:
        """The step's name instead of a path of this machine; equal for equal content."""
        return StorageMeta(checkpoint_id=self._folder)

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
        assert self._staging is not None, "DCP plans before it writes"
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

    def _model_entry(self, metadata: Metadata) -> ModelEntry:
        keys = model_keys(metadata, self._job.reserved)
        return replace(self._model, keys=keys, tied=self._tied)


def _num_bytes(plan: SavePlan) -> int:
    """Bytes of the tensors that a rank is to write; the rest of a save is small."""
    return sum(item.tensor_storage_size() or 0 for item in plan.items)
