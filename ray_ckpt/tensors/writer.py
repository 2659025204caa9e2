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
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Place, merged
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.events import Volume
from ray_ckpt.core.manifest import FileEntry, Manifest, ModelEntry, TensorEntry
from ray_ckpt.core.room import Room, refuse_without_room
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import STRONG_ALGORITHM, digest_of
from ray_ckpt.storage.disk.posix import translated, write_synced
from ray_ckpt.storage.host_memory.copies import FileInMemory
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.metadata_file import MetadataFile
from ray_ckpt.tensors.rank_files import Find, Into, RankFile, RankFiles
from ray_ckpt.tensors.ranks import Phase
from ray_ckpt.tensors.save_layout import Layout, Places, Written
from ray_ckpt.tensors.save_plan import GlobalPlan
from ray_ckpt.tensors.save_target import IntoRoot, SaveTarget, Superseded
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.still import Memory

log = logging.getLogger("ray_ckpt")


def no_note(save: str, phase: Phase) -> None:
    """Nobody waits."""


def no_count(volume: Volume) -> None:
    """Nobody asks."""


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
    wrote: Callable[[Volume], None] = no_count
    """Told by the coordinator how many bytes the files of the step have."""
    full_every_saves: int = 1
    """So many steps in a row may share the bytes of what does not change; 1 for none."""
    is_kept: bool = False
    """Whether the copy that it is written from stays in memory."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What each rank says to the coordinator before anything is planned."""

    tied: Mapping[str, str]
    room: Room | None
    """Where it is to write; None if nobody can say what is free there."""


class CommittingWriter:
    """Writes the files of exactly one save."""

    def __init__(self, job: SaveJob, memory: Memory | None = None) -> None:
        """`memory` is of what this process has saved before."""
        self._job = job
        self._memory = memory or Memory()
        self._memory.begin()
        self._files: RankFiles | None = None
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
        rooms = zip((rank.room for rank in told), num_bytes, strict=True)
        needs = [(room, count) for room, count in rooms if room is not None]
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
            files = self._write_files(plan, planner) if plan.items else []
        self._target.contribute(self._folder_of_attempt, self._folder)
        written = self._told_of(plan, files)
        self._job.note(self._job.attempt, Phase.WRITTEN)
        return written

    def _write_files(self, plan: SavePlan, planner: SavePlanner) -> list[RankFile]:
        """Each item of this rank is in one of these files."""
        into = Into(
            target=self._target,
            staging=self._folder_of_attempt,
            folder=self._folder,
            full_every_saves=self._job.full_every_saves,
        )
        self._files = RankFiles(plan, planner, into, self._memory)
        return self._files.write(lambda item: self._is_sound(item, planner))

    def _told_of(self, plan: SavePlan, files: Sequence[RankFile]) -> Written:
        """What the coordinator hears of the items, in the order of the plan."""
        lie = {
            index: (number, *place)
            for number, file in enumerate(files)
            for index, place in file.places.items()
        }
        lying = np.array([lie[item.index] for item in plan.items], np.int64).reshape(-1, 3)
        unsound = self._files.unsound if self._files is not None else ()
        return Written(
            files=tuple(file.entry for file in files),
            taken_over=tuple(file.entry.path for file in files if file.is_taken_over),
            layout=Layout(
                files=lying[:, 0].astype(np.int32),
                begins=lying[:, 1].copy(),
                lengths=lying[:, 2].copy(),
            ),
            non_finite=tuple(sorted({index.fqn for index in unsound})),
            places=merged(self._place(file.entry.path) for file in files),
        )

    def _is_sound(self, item: WriteItem, planner: SavePlanner) -> bool:
        """Whether a weight is finite everywhere; optimizers may hold what they like."""
        if item.index.fqn.partition(".")[0] in self._job.reserved:
            return True
        return is_finite(planner.resolve_data(item))

    def finish(
        self,
        plan: GlobalPlan,
        places: Places,
        metadata: MetadataFile,
        written: Sequence[Written],
    ) -> None:
        """On the coordinator, after every rank has written: the step is committed."""
        index = StepIndex.of_save(plan, places)
        # the step's name instead of a path of this machine; equal for equal content
        meta = StorageMeta(checkpoint_id=self._folder)
        with translated(self._folder_of_attempt):
            files = {
                names.METADATA: metadata.of(places.names, meta),
                names.INDEX: index.to_bytes(),
                **self._assets(),
            }
            extra = [self._write(name, data) for name, data in files.items()]
        shards = [entry for rank in written for entry in rank.files]
        tensors = index.entries()
        model = self._model_entry(tensors)
        manifest = replace(
            self._job.draft,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(sorted([*shards, *extra], key=lambda entry: entry.path)),
            tensors=tensors,
            tensor_bytes=index.tensor_bytes(model.keys),
            model=model,
            non_finite=tuple(sorted({name for rank in written for name in rank.non_finite})),
        )
        on_nodes = [
            *(place for rank in written for place in rank.places),
            *(self._place(entry.path) for entry in extra),
        ]
        draft = Draft(manifest=manifest, places=merged(on_nodes), supersedes=self._superseded)
        self._job.wrote(_volume(written, extra))
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
        """Nothing is left of this attempt but what it has handed over; it has ended well."""
        if self._files is not None:
            self._files.remember()
        if self._staging is not None:
            self._target.leave(self._staging)

    def in_memory(self, find: Find) -> list[FileInMemory]:
        """What this rank has written, as far as it lies in memory that outlives the save."""
        return [] if self._files is None else self._files.in_memory(find)

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


def _volume(written: Sequence[Written], extra: Sequence[FileEntry]) -> Volume:
    """Of all ranks' files, and those that the coordinator has added."""
    taken = {path for rank in written for path in rank.taken_over}
    files = [*(entry for rank in written for entry in rank.files), *extra]
    return Volume(
        written_bytes=sum(entry.size_bytes for entry in files if entry.path not in taken),
        taken_over_bytes=sum(entry.size_bytes for entry in files if entry.path in taken),
    )
