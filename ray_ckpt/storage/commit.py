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
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.local import LocalStore, sync_folder, translated, write_synced
from ray_ckpt.storage.progress import UNTOLD, Progress


class Commit(Protocol):
    """The order of writes on one kind of backend. All folders are keys of the store."""

    names_shards_by_save: bool
    """Whether shards must be named after their save (`names.shard_prefix`), because they stay where
    they are when the folder is set aside and written anew."""

    def staging(self, attempt: str) -> Path:
        """A local folder where this process writes the files of `attempt`.

        On a shared file system every rank gets the same one; on an object store each process gets
        its own.
        """
        ...

    def clear(self, folder: str) -> None:
        """What a dead save left in `folder` is gone; for the one writer, before it contributes."""
        ...

    def contribute(self, staging: Path, folder: str, *, progress: Progress = UNTOLD) -> None:
        """What this process wrote to `staging` will be part of `folder`; still not visible."""
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

    def discard(self, staging: Path) -> None:
        """Nothing of `staging` is left on this machine."""
        ...

    def sweep(self, *, prefix: str, idle_s: float, now: float) -> list[str]:
        """Attempts of dead processes are gone; returns their names.

        An attempt whose name starts with `prefix` is dead if nothing in its folder has changed
        for `idle_s` seconds.
        """
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

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def staging(self, attempt: str) -> Path:
        """`.ray_ckpt/staging/<attempt>`, shared by all ranks that see the root."""
        path = self._store.path(names.staging_dir(attempt))
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def clear(self, folder: str) -> None:
        """Nothing to do: a dead save never came so far."""

    def contribute(self, staging: Path, folder: str, *, progress: Progress = UNTOLD) -> None:
        """Nothing to do: the rename takes everything along."""

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

    def discard(self, staging: Path) -> None:
        """The folder and what is in it are removed."""
        shutil.rmtree(staging, ignore_errors=True)

    def sweep(self, *, prefix: str, idle_s: float, now: float) -> list[str]:
        """Looks at the newest change anywhere in each attempt's folder."""
        swept: list[str] = []
        for attempt in self._store.list_folders(names.STAGING):
            folder = self._store.inside(names.staging_dir(attempt))
            if attempt.startswith(prefix) and now - _changed_at(folder) >= idle_s:
                self.discard(folder)
                swept.append(attempt)
        return swept

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
            freed = _size_of(path)
            (path / names.MANIFEST).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
        return freed

    def _rename(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # must be rename(2): it refuses a target folder that holds anything
            source.rename(target)
        except OSError as error:
            if target.exists():
                raise ObjectExistsError("something is there already", str(target)) from error
            raise
        sync_folder(target.parent)
        sync_folder(source.parent)


def _changed_at(folder: Path) -> float:
    """Time of the newest change in the folder, 0 if it is gone; in seconds since the epoch."""
    return max((status.st_mtime for status in _statuses(folder)), default=0.0)


def _size_of(folder: Path) -> int:
    """Bytes of the files that go with the folder; what links point to stays."""
    return sum(s.st_size for s in _statuses(folder) if stat.S_ISREG(s.st_mode))


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # published or discarded meanwhile
            yield path.lstat()
