"""How a folder with a manifest appears and disappears: the order of writes, and nothing else.

                    a folder                            an object store
    appears     built in .ray_ckpt/staging/         a note that it has begun, then the objects
                one rename                          in place; the manifest is the last PUT
    is trashed  one rename into .ray_ckpt/trash/    small files, then the manifest are copied to the
                                                    trash, then removed; shards stay in place
    comes back  one rename                          the same the other way round
    is purged   manifest first, then the rest       the shards, then what is in the trash

A reader who decides by the manifest alone sees all of a folder or none of it, whatever dies when.
`RenameCommit` is the left column, `storage.marker` the right one. Neither follows a symbolic link.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.manifest import FileEntry, Manifest
from ray_ckpt.storage.base import Blocks
from ray_ckpt.storage.disk.file_blocks import FileBlocks, new_file
from ray_ckpt.storage.disk.posix import make_folder, sync_folder, translated, write_synced
from ray_ckpt.storage.disk.store import LocalStore, changed_at, own_size_of, size_of
from ray_ckpt.storage.progress import UNTOLD, Progress

_GIVEN_UP = ".dead"
"""How the name of an attempt's folder ends while it is removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What one attempt has written that nobody sees yet; whether it still runs its age must say."""

    attempt: str
    what: str
    """What became of it, should it be dead, as a sentence without a subject ends."""
    folder: str
    """Where it lies."""
    size_bytes: int
    changed_at: float
    """Time of the newest change, in seconds since the epoch, by the store's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A file of a committed step, as it was when it was committed."""

    folder: str
    entry: FileEntry
    mark: str | None
    """Of the store, so that no other file is ever taken for it."""

    @property
    def key(self) -> str:
        """Where it lies."""
        return f"{self.folder}/{self.entry.path}"


class Commit(Protocol):
    """The order of writes on one kind of backend. All folders are keys of the store."""

    names_shards_by_save: bool
    """Whether shards must be named after their save (`names.shard_prefix`), because they stay where
    they are when the folder is set aside and written anew."""

    is_staging_shared: bool
    """Whether every rank that sees the root has the same staging folder."""

    def staging(self, attempt: str) -> Path:
        """A local folder where this process writes the files of `attempt`.

        On a shared file system every rank gets the same one; on an object store each process gets
        its own.
        """
        ...

    def clear(self, folder: str) -> None:
        """What a dead save left in `folder` is gone; for the one writer, before it contributes."""
        ...

    def begin(self, folder: str) -> None:
        """Whatever lies in `folder` before its manifest does is ours; comes before the first."""
        ...

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> Blocks:
        """A new file of about that size, which will be part of `folder` once it is whole."""
        ...

    def contribute(self, staging: Path, folder: str, *, progress: Progress = UNTOLD) -> None:
        """What this process wrote to `staging` will be part of `folder`; still not visible."""
        ...

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """The file will be part of `folder` as well, under this name; see `Store.take_over`.

        Raises:
            ObjectNotFoundError: it is not what it was, or its step is damaged or not committed.
            StorageError: the store does not do it.
        """
        ...

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """`folder` is there, whole, with `manifest`; called once, after every contribution.

        Raises:
            ObjectExistsError: a committed folder is there already; it is untouched.
        """
        ...

    def waiting_key(self, folder: str, save_id: str, name: str) -> str:
        """Where a file that was brought from a node waits until `folder` is published."""
        ...

    def publish_waiting(self, folder: str, manifest: Manifest) -> None:
        """`folder` is there, whole, made of all that waits for it.

        Raises:
            ObjectExistsError: a committed folder is there already; it is untouched.
        """
        ...

    def part_key(self, folder: str, export_id: str, file: str, *, token: str) -> str:
        """Where a file of an export is written before `folder` is published; see `storage.parts`.

        The token tells those apart who write the same file at once, where each has its own place.
        """
        ...

    def take_part(self, key: str, target: Path) -> None:
        """The finished file under `key` will be in the folder, where `target` is in its staging."""
        ...

    def drop_parts(self, export_id: str) -> None:
        """Nothing is left of the files of an export that no folder has taken."""
        ...

    def discard(self, staging: Path) -> None:
        """Nothing of `staging` is left on this machine."""
        ...

    def leave(self, staging: Path) -> None:
        """Nothing that this process alone can see of `staging` is left; it writes no more there."""
        ...

    def remains(self) -> list[Remains]:
        """Of every attempt that has begun and not ended, whether it is dead or at work."""
        ...

    def give_up(self, remains: Remains) -> None:
        """Nothing is left of a dead attempt; should it wake up after all, it can show nothing."""
        ...

    def set_aside(self, folder: str, aside: str) -> None:
        """`folder` is gone for every reader, and `bring_back` can undo it.

        Raises:
            UsageError: the folder, or the way to it or to the trash, is a symbolic link.
        """
        ...

    def bring_back(self, aside: str, folder: str) -> None:
        """What was set aside is in place again, unless something else is there now."""
        ...

    def erase(self, aside: str, folder: str) -> int:
        """What was set aside is gone for good; returns the bytes freed. Twice is harmless."""
        ...


class RenameCommit:
    """For a POSIX folder, where one rename shows or hides a whole folder."""

    names_shards_by_save = False
    is_staging_shared = True

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def staging(self, attempt: str) -> Path:
        """`.ray_ckpt/staging/<attempt>`, shared by all ranks that see the root."""
        path = self._store.path(names.staging_dir(attempt))
        with translated(path):
            make_folder(path.parent)
            path.mkdir(exist_ok=True)  # last: nobody would clear it away if this raised after it
        return path

    def clear(self, folder: str) -> None:
        """Nothing to do: a dead save never came so far."""

    def begin(self, folder: str) -> None:
        """Nothing to do: nothing lies there."""

    def shard(self, staging: Path, folder: str, name: str, size_bytes: int) -> FileBlocks:
        """In the staging folder."""
        return new_file(staging / name)

    def contribute(self, staging: Path, folder: str, *, progress: Progress = UNTOLD) -> None:
        """Nothing to do: the rename takes everything along."""

    def take_over(self, kept: Kept, staging: Path, folder: str, name: str) -> None:
        """A hard link, unless a step was found damaged that has one to the same file."""
        for aside in self._store.list_folders(names.QUARANTINE):
            key = f"{names.QUARANTINE}/{aside}/{kept.entry.path}"
            if self._store.mark(key) == kept.mark:
                raise ObjectNotFoundError("a damaged step shares it", str(self._store.path(key)))
        target = f"{names.staging_dir(staging.name)}/{name}"
        self._store.take_over(kept.key, target, kept.entry, mark=kept.mark)

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """Manifest last, everything synced, then the rename, then the parent synced."""
        target = self._store.path(folder)
        with translated(target):
            write_synced(staging / names.MANIFEST, manifest)
            for parent, _, _ in os.walk(staging):
                sync_folder(Path(parent))
            self._rename(staging, target)

    def waiting_key(self, folder: str, save_id: str, name: str) -> str:
        """In a folder of its own in the staging area, which one rename takes to its place."""
        return f"{names.staging_dir(names.gather_attempt(save_id))}/{name}"

    def publish_waiting(self, folder: str, manifest: Manifest) -> None:
        """Like `publish`: all files are synced."""
        staging = names.staging_dir(names.gather_attempt(manifest.save_id))
        self.publish(self._store.path(staging), folder, manifest.to_json())

    def part_key(self, folder: str, export_id: str, file: str, *, token: str) -> str:
        """In a staging folder that all who make this export share."""
        return f"{names.staging_dir(names.export_attempt(export_id))}/{token}-{file}"

    def take_part(self, key: str, target: Path) -> None:
        """A second link to it: whoever else makes the same export finds it in its place."""
        with translated(target):
            target.hardlink_to(self._store.path(key))

    def drop_parts(self, export_id: str) -> None:
        """The shared folder is removed."""
        self.discard(self._store.inside(names.staging_dir(names.export_attempt(export_id))))

    def discard(self, staging: Path) -> None:
        """The folder and what is in it are removed."""
        shutil.rmtree(staging, ignore_errors=True)

    def leave(self, staging: Path) -> None:
        """Nothing to do: all ranks see the same folder."""

    def remains(self) -> list[Remains]:
        """One folder each; what somebody has begun to give up is of no age any more."""
        found: list[Remains] = []
        for attempt in self._store.list_folders(names.STAGING):
            if attempt == names.EXPORTS:
                continue  # notes about copies that are removed: see storage.retire
            key = names.staging_dir(attempt)
            folder = self._store.inside(key)
            is_given_up = attempt.endswith(_GIVEN_UP)
            remains = Remains(
                attempt=attempt.removesuffix(_GIVEN_UP),
                what="it was not committed",
                folder=key,
                size_bytes=size_of(folder),
                changed_at=0.0 if is_given_up else changed_at(folder),
            )
            found.append(remains)
        return found

    def give_up(self, remains: Remains) -> None:
        """Renamed first, so that a writer that is not dead after all cannot publish a part."""
        folder = self._store.inside(remains.folder)
        if not folder.name.endswith(_GIVEN_UP):
            given_up = folder.with_name(folder.name + _GIVEN_UP)
            with contextlib.suppress(ObjectNotFoundError), translated(folder):
                folder.rename(given_up)
            folder = given_up
        self.discard(folder)

    def set_aside(self, folder: str, aside: str) -> None:
        """One rename."""
        source, target = self._store.inside(folder), self._store.inside(aside)
        with translated(source):
            self._rename(source, target)

    def bring_back(self, aside: str, folder: str) -> None:
        """One rename."""
        self.set_aside(aside, folder)

    def erase(self, aside: str, folder: str) -> int:
        """The manifest first, so that a half-erased folder is never taken for a whole one."""
        path = self._store.inside(aside)
        with translated(path):
            freed = own_size_of(path)
            (path / names.MANIFEST).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
        return freed

    def _rename(self, source: Path, target: Path) -> None:
        make_folder(target.parent)
        try:
            # must be rename(2): it refuses a target folder that holds anything
            source.rename(target)
        except OSError as error:
            if target.exists():
                raise ObjectExistsError("something is there already", str(target)) from error
            raise
        sync_folder(target.parent)
        sync_folder(source.parent)
