"""DCP's writer with a commit at its end: one collective protocol from plan to visible step.

    every rank     writes its shards into the staging folder, digests computed as the bytes go by
    coordinator    gathers sizes and digests (DCP gathers the write results anyway), writes
                   `.metadata`, assets and the manifest, and commits (or, for a save that lies on
                   the nodes, says where all of it is: `save_target`)

An error on any rank reaches all of them through DCP, and nothing becomes visible.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import Buffer

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Place, merged
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.manifest import FileEntry, Manifest, ModelEntry
from ray_ckpt.core.room import Room, refuse_without_room
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, describe_file, new_digest
from ray_ckpt.storage.disk.posix import sync_file, translated, write_synced
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.index import model_keys, tensor_index
from ray_ckpt.tensors.ranks import Phase
from ray_ckpt.tensors.save_target import IntoRoot, SaveTarget, Superseded

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
        super().__init__(job.attempt, single_file_per_rank=True, sync_files=True)
        self._job = job
        self._target = job.goes_to
        self._staging: Path | None = None
        self._superseded: Superseded = ()
        self._tied: dict[str, str] = {}
        """Of all ranks: in a pipeline each knows its own part of the model."""
        self.fs = _DigestingFileSystem()

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
            results = super().write_data(plan, planner).value()
        files = cast(_DigestingFileSystem, self.fs).described
        self._target.contribute(self._folder_of_attempt, self._folder)
        broken = {
            item.index
            for item in plan.items
            if item.type != WriteItemType.BYTE_IO and not self._is_sound(item, planner)
        }
        described: Future[list[WriteResult]] = Future()
        described.set_result(
            [self._described(r, files, is_finite=r.index not in broken) for r in results]
        )
        self._job.note(self._job.attempt, Phase.WRITTEN)
        return described

    def _is_sound(self, item: WriteItem, planner: SavePlanner) -> bool:
        """Whether a weight is finite everywhere; optimizers may hold what they like."""
        if item.index.fqn.partition(".")[0] in self._job.reserved:
            return True
        return is_finite(planner.resolve_data(item))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after every rank has written: the step is committed."""
        described = [cast(_DescribedResult, result) for rank in results for result in rank]
        plain = [[_plain(cast(_DescribedResult, r)) for r in rank] for rank in results]
        # torch 2.11 fills them into a copy, 2.13 into the very object
        metadata.storage_data = {r.index: r.storage_data for rank in plain for r in rank}
        with translated(self._folder_of_attempt):
            super().finish(metadata, plain)
            # torch syncs it while its bytes are still in the stream's buffer
            sync_file(self._folder_of_attempt / names.METADATA)
            extra = [self._describe_metadata(), *self._write_assets()]
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

    def _described(
        self, result: WriteResult, files: Mapping[str, FileEntry], *, is_finite: bool
    ) -> _DescribedResult:
        name = result.storage_data.relative_path
        return _DescribedResult(
            index=result.index,
            size_in_bytes=result.size_in_bytes,
            storage_data=result.storage_data,
            file=files[name],
            is_finite=is_finite,
            place=self._place(name),
        )

    def _describe_metadata(self) -> FileEntry:
        return describe_file(
            self._folder_of_attempt / names.METADATA, names.METADATA, STRONG_ALGORITHM
        )

    def _write_assets(self) -> list[FileEntry]:
        folder = self._folder_of_attempt / names.ASSETS
        for name, data in self._job.assets.items():
            folder.mkdir(exist_ok=True)
            write_synced(folder / name, data)
        return [
            describe_file(folder / name, f"{names.ASSETS}/{name}", STRONG_ALGORITHM)
            for name in self._job.assets
        ]

    def _model_entry(self, metadata: Metadata) -> ModelEntry:
        keys = model_keys(metadata, self._job.reserved)
        return replace(self._model, keys=keys, tied=self._tied)


class _DigestingFileSystem(FileSystem):
    """DCP's own file system, with a digest of every file written."""

    def __init__(self) -> None:
        self.described: dict[str, FileEntry] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        """A stream that computes the digest in the pass that writes."""
        with super().create_stream(path, mode) as raw:
            if mode != "wb" or Path(path).suffix == ".tmp":
                yield raw
                return
            stream = _DigestingStream(raw)
            yield stream
            name = Path(path).name
            self.described[name] = FileEntry(
                path=name, size_bytes=stream.size_bytes, digest=stream.digest.text()
            )


class _DigestingStream(io.RawIOBase):
    """Passes writes on and digests them; sequential only, which is how DCP writes."""

    def __init__(self, raw: io.IOBase) -> None:
        self._raw: Any = raw
        self.digest = new_digest(SHARD_ALGORITHM)
        self.size_bytes = 0

    def write(self, data: Buffer) -> int:
        """All of `data`, always."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size_bytes += len(view)
        self._raw.write(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Also the wrapped stream."""
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        """Of the wrapped file, flushed, so that DCP can sync it."""
        self._raw.flush()
        return int(self._raw.fileno())

    def close(self) -> None:
        """The wrapped stream stays open: whoever opened it closes it."""
        self.flush()
        super().close()


def _num_bytes(plan: SavePlan) -> int:
    """Bytes of the tensors that a rank is to write; the rest of a save is small."""
    return sum(item.tensor_storage_size() or 0 for item in plan.items)


def _plain(result: _DescribedResult) -> WriteResult:
    return WriteResult(
        index=result.index, size_in_bytes=result.size_in_bytes, storage_data=result.storage_data
    )
