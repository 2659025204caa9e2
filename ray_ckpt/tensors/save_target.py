"""Where the files of a save go, and what makes a save of them.

    IntoRoot     every rank writes to the root (or uploads there); the commit makes it a checkpoint
    OntoNodes    every rank writes to its node's own disk; one record at the root says where all of
                 it lies. Whoever manages the root brings it there and commits it: `core.gathering`

Knows nothing of DCP.
"""

import contextlib
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ray_ckpt.core import names
from ray_ckpt.core.draft import Draft, Node
from ray_ckpt.core.errors import RayCkptError, StorageError
from ray_ckpt.core.events import Becomes
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.room import Room
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.base import Blocks
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.commit import Kept
from ray_ckpt.storage.disk.file_blocks import new_file
from ray_ckpt.storage.disk.posix import sync_folder, translated
from ray_ckpt.storage.room import room_at, room_in

Superseded = tuple[tuple[int, str], ...]
"""Step and save id of what another branch of training has saved."""


class SaveTarget(Protocol):
    """One of the two."""

    @property
    def becomes(self) -> Becomes:
        """What a save is that has ended well."""
        ...

    @property
    def node(self) -> Node | None:
        """Where alone the files lie that this rank writes; None for the root."""
        ...

    def staging(self, attempt: str) -> Path:
        """The folder that this rank writes to."""
        ...

    def room(self, staging: Path) -> Room | None:
        """What is free where this rank writes; None where nobody can say."""
        ...

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> Blocks:
        """A new file of about that size, to be a part of the save."""
        ...

    def make_way(self, draft: Manifest, branch: int | None) -> Superseded:
        """Nothing is in the way of the save; on the coordinator, before a byte is written.

        `branch` is the step that the run goes on from: what is newer and of another trainer is set
        aside now, or returned to be set aside at the commit.

        Raises:
            StepExistsError, ForeignFolderError: the step is there already.
            UsageError: something newer is pinned.
        """
        ...

    def contribute(self, staging: Path, folder: str) -> None:
        """What this rank has written will be part of the save, whatever dies now."""
        ...

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """A file of an older step is part of this save as well, under this name; no byte is read.

        Raises:
            RayCkptError: it is not; it is to be written.
        """
        ...

    def kept(self, folder: str, entry: FileEntry) -> Kept:
        """A file of a save that has ended well, for the one that may take it over."""
        ...

    def end(self, staging: Path, draft: Draft) -> None:
        """The save is what it becomes; on the coordinator, after every rank has written."""
        ...

    def holds(self, draft: Manifest) -> bool:
        """Whether storage shows this very save."""
        ...

    def discard(self, staging: Path) -> None:
        """Nothing of the attempt is left in this rank's folder."""
        ...

    def leave(self, staging: Path) -> None:
        """Nothing is left there but what is part of the save; this rank writes no more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IntoRoot:
    """A save is a checkpoint when it ends."""

    catalog: Catalog
    becomes: Becomes = "committed"
    node: None = None

    def staging(self, attempt: str) -> Path:
        """The root's staging area; on an object store a folder of this process."""
        return self.catalog.commit.staging(attempt)

    def room(self, staging: Path) -> Room | None:
        """One place for all ranks, unless each sends its files from a disk of its own."""
        store = self.catalog.store
        return room_in(store) or (room_at(staging) if store.begins_on_disk else None)

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> Blocks:
        """See `Commit`."""
        return self.catalog.commit.shard(staging, folder, name, size_bytes)

    def make_way(self, draft: Manifest, branch: int | None) -> Superseded:
        """Newer steps are in the trash, and drafts that would become such are given up."""
        now = time.time()
        for other in self.catalog.drafts.all():
            if other.ended is None and _is_in_the_way(other, draft, branch):
                why = f"step-{draft.step} is saved by a run that does not know of it"
                self.catalog.drafts.end(other.save_id, "abandoned", why=why, at=now)
        if branch is not None:
            self.catalog.roll_back(branch, now=now)
        self.catalog.refuse_existing(draft.step)
        self.catalog.commit.clear(names.step_dir(draft.step))
        return ()

    def contribute(self, staging: Path, folder: str) -> None:
        """See `Commit`."""
        self.catalog.commit.contribute(staging, folder)

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """See `Commit`."""
        self.catalog.commit.take_over(kept, staging, folder, name)

    def kept(self, folder: str, entry: FileEntry) -> Kept:
        """As it lies in the step's folder now; one look."""
        mark = self.catalog.store.mark(f"{folder}/{entry.path}")
        return Kept(folder=folder, entry=entry, mark=mark)

    def end(self, staging: Path, draft: Draft) -> None:
        """The commit."""
        self.catalog.commit_step(staging, draft.manifest)

    def holds(self, draft: Manifest) -> bool:
        """One read."""
        with contextlib.suppress(RayCkptError):
            return self.catalog.manifest(draft.step).save_id == draft.save_id
        return False

    def discard(self, staging: Path) -> None:
        """See `Commit`."""
        self.catalog.commit.discard(staging)

    def leave(self, staging: Path) -> None:
        """See `Commit`."""
        self.catalog.commit.leave(staging)


@dataclass(frozen=True, slots=True, kw_only=True)
class OntoNodes:
    """A save is staged when it ends, and a checkpoint once all of it was brought to the root."""

    catalog: Catalog
    node: Node
    """This rank's."""
    folder: Path
    """The run's own on the node's disk; each save has one in it."""
    becomes: Becomes = "staged"

    def staging(self, attempt: str) -> Path:
        """Shared by the ranks of one node."""
        path = self.folder / attempt
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def room(self, staging: Path) -> Room:
        """One place for the ranks of a node."""
        return room_at(staging)

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> Blocks:
        """On the node's disk."""
        return new_file(staging / name)

    def make_way(self, draft: Manifest, branch: int | None) -> Superseded:
        """Nothing is changed: steps that were committed stay until this one is."""
        now = time.time()
        observed = self.catalog.observe().at(now)
        others = tuple(_other_branch(observed, draft, branch))
        superseded = {step for step, _ in others}
        newer = [view for view in observed.readable() if view.step in superseded]
        pinned = [view.step for view in newer if view.pins]
        if pinned and branch is not None:
            steps = [view.step for view in newer]
            raise step_errors.cannot_roll_back(self.catalog.uri, branch, steps, pinned[0])
        if any(d.step == draft.step and _is_own(d, draft) for d in observed.drafts):
            raise step_errors.staged(self.catalog.uri, draft.step)
        if draft.step not in {view.step for view in newer}:
            self.catalog.refuse_existing(draft.step)
        return others

    def contribute(self, staging: Path, folder: str) -> None:
        """The files are synced as they are written; now their names are, too."""
        with translated(staging):
            for path in (staging, self.folder, self.folder.parent):
                sync_folder(path)

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """Never: until it is brought it is all there is, and two saves would be lost with it.

        Raises:
            StorageError: always.
        """
        raise StorageError("saves that lie on their nodes share no file", str(self.folder))

    def kept(self, folder: str, entry: FileEntry) -> Kept:
        """It is never taken over."""
        return Kept(folder=folder, entry=entry, mark=None)

    def end(self, staging: Path, draft: Draft) -> None:
        """The record that says where all of it lies."""
        self.contribute(staging, "")
        self.catalog.drafts.add(draft)

    def holds(self, draft: Manifest) -> bool:
        """One look."""
        with contextlib.suppress(RayCkptError):
            return self.catalog.drafts.is_there(draft.save_id)
        return False

    def discard(self, staging: Path) -> None:
        """The part on this node is gone."""
        shutil.rmtree(staging, ignore_errors=True)

    def leave(self, staging: Path) -> None:
        """All that lies there is part of the save."""

    def sweep(self, *, live: Collection[str], own: str) -> None:
        """Nothing of this run is left on the node but `live` saves, by their ids.

        Those of the trainer that saves with ids like `own` may have just begun: they stay as well.
        """
        prefix = names.save_attempt("")
        for folder in self.folder.glob(f"{prefix}*"):
            save_id = folder.name.removeprefix(prefix)
            if save_id not in live and not names.are_of_one_trainer(save_id, own):
                shutil.rmtree(folder, ignore_errors=True)


def _other_branch(
    observed: Observation, draft: Manifest, branch: int | None
) -> Iterator[tuple[int, str]]:
    """What trainers before this one have saved after the step that it goes on from."""
    for view in observed.readable():
        manifest = view.manifest
        is_newer = branch is not None and view.step > branch
        if manifest and is_newer and not names.are_of_one_trainer(manifest.save_id, draft.save_id):
            yield view.step, manifest.save_id
    for other in observed.drafts:
        if other.ended is None and _is_in_the_way(other, draft, branch):
            yield other.step, other.save_id


def _is_in_the_way(other: Draft, draft: Manifest, branch: int | None) -> bool:
    """Whether another trainer's draft is of the same step, or of another branch of training."""
    is_newer = branch is not None and other.step > branch
    return not _is_own(other, draft) and (is_newer or other.step == draft.step)


def _is_own(other: Draft, draft: Manifest) -> bool:
    return names.are_of_one_trainer(other.save_id, draft.save_id)
