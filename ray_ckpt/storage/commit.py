"""How a folder with a manifest appears and disappears: the order of writes, and nothing else.

                    a folder                            an object store
    appears     built in .ray_ckpt/staging/         a note that it has begun, then the objects
                one rename                          in place; the manifest is the last PUT
    is trashed  one rename into .ray_ckpt/trash/    the manifest is copied to the trash,
                                                    then removed; the rest stays in place
    comes back  one rename                          the manifest is copied back
    is purged   manifest first, then the rest       the objects the manifest lists, then it

A reader who decides by the manifest alone sees all of a folder or none of it, whatever dies when.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.local import LocalStore, sync_folder, translated, write_synced


class Commit(Protocol):
    """The order of writes on one kind of backend. All folders are keys of the store."""

    moves_bytes: bool
    """Whether what is set aside takes its files along, so that the folder can be written anew."""

    def staging(self, attempt: str) -> Path:
        """A local folder where this process writes the files of `attempt`.

        On a shared file system every rank gets the same one; on an object store each process gets
        its own.
        """
        ...

    def contribute(self, staging: Path, folder: str) -> None:
        """What this process wrote to `staging` will be part of `folder`; still not visible."""
        ...

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """`folder` is there, whole, with `manifest`; called once, after every contribution.

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
        """`folder` is gone for every reader, and `bring_back` can undo it."""
        ...

    def bring_back(self, aside: str, folder: str) -> None:
        """What was set aside is in place again, unless something else is there now."""
        ...

    def erase(self, aside: str, folder: str) -> int:
        """What was set aside is gone for good; returns the bytes freed. Twice is harmless."""
        ...


class RenameCommit:
    """For a POSIX folder, where one rename shows or hides a whole folder."""

    moves_bytes = True

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def staging(self, attempt: str) -> Path:
        """`.ray_ckpt/staging/<attempt>`, shared by all ranks that see the root."""
        path = self._store.path(names.staging_dir(attempt))
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def contribute(self, staging: Path, folder: str) -> None:
        """Nothing to do: the rename takes everything along."""

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """Manifest last, everything synced, then the rename, then the parent synced."""
        target = self._store.path(folder)
        with translated(target):
            write_synced(staging / names.MANIFEST, manifest)
            for parent, _, _ in os.walk(staging):
                sync_folder(Path(parent))
            self._rename(staging, target)

    def discard(self, staging: Path) -> None:
        """The folder and what is in it are removed."""
        shutil.rmtree(staging, ignore_errors=True)

    def sweep(self, *, prefix: str, idle_s: float, now: float) -> list[str]:
        """Looks at the newest change anywhere in each attempt's folder."""
        swept: list[str] = []
        for attempt in self._store.list_folders(names.STAGING):
            folder = self._store.path(names.staging_dir(attempt))
            if attempt.startswith(prefix) and now - _changed_at(folder) >= idle_s:
                self.discard(folder)
                swept.append(attempt)
        return swept

    def set_aside(self, folder: str, aside: str) -> None:
        """One rename."""
        source, target = self._store.path(folder), self._store.path(aside)
        with translated(source):
            self._rename(source, target)

    def bring_back(self, aside: str, folder: str) -> None:
        """One rename."""
        self.set_aside(aside, folder)

    def erase(self, aside: str, folder: str) -> int:
        """The manifest first, so that a half-erased folder is never taken for a whole one."""
        path = self._store.path(aside)
        with translated(path):
            freed = sum(info.size_bytes for info in self._store.list_objects(aside))
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


class MarkerCommit:
    """For an object store, where the manifest's own PUT and DELETE show and hide a folder."""

    moves_bytes = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def staging(self, attempt: str) -> Path:
        """A folder of this process on the local disk."""
        return Path(tempfile.mkdtemp(prefix=f"ray_ckpt-{attempt}-"))

    def contribute(self, staging: Path, folder: str) -> None:
        """Uploads the files; without a manifest nobody counts them.

        The note comes first, so that the remains of a dead save are not taken for foreign files.
        """
        paths = [path for path in sorted(staging.rglob("*")) if path.is_file()]
        if paths:
            self._store.write(names.begun_key(folder), b"")
        for path in paths:
            self._store.upload(path, f"{folder}/{path.relative_to(staging).as_posix()}")
            path.unlink()

    def publish(self, staging: Path, folder: str, manifest: bytes) -> None:
        """Remaining files first, then the manifest, which must not be there yet."""
        if self._store.stat(names.manifest_key(folder)) is not None:
            raise ObjectExistsError("something is there already", f"{self._store.uri}/{folder}")
        self.contribute(staging, folder)
        self._store.create(names.manifest_key(folder), manifest)
        self._store.delete([names.begun_key(folder)])
        self.discard(staging)

    def discard(self, staging: Path) -> None:
        """The local folder is removed; objects already put are overwritten by the next attempt."""
        shutil.rmtree(staging, ignore_errors=True)

    def sweep(self, *, prefix: str, idle_s: float, now: float) -> list[str]:
        """Nothing: attempts are on the disks of the processes that made them."""
        return []

    def set_aside(self, folder: str, aside: str) -> None:
        """The manifest is copied, then removed: in between both are there, and a rerun ends it."""
        marker = self._store.read(names.manifest_key(folder))
        self._store.write(names.manifest_key(aside), marker)
        self._store.delete([names.manifest_key(folder)])

    def bring_back(self, aside: str, folder: str) -> None:
        """The manifest is put in place if none is there, then removed from aside."""
        self._store.create(names.manifest_key(folder), self._store.read(names.manifest_key(aside)))
        self._store.delete([names.manifest_key(aside)])

    def erase(self, aside: str, folder: str) -> int:
        """Only what the manifest lists, and only while no new manifest is in its place."""
        try:
            marker = self._store.read(names.manifest_key(aside))
        except ObjectNotFoundError:
            return 0
        manifest = Manifest.from_json(marker, f"{self._store.uri}/{aside}")
        freed = 0
        if self._store.stat(names.manifest_key(folder)) is None:
            self._store.delete([f"{folder}/{entry.path}" for entry in manifest.files])
            freed = manifest.total_bytes
        self._store.delete([info.key for info in self._store.list_objects(aside)])
        return freed


def _changed_at(folder: Path) -> float:
    """Time of the newest change in the folder, 0 if it is gone; in seconds since the epoch."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # published or discarded meanwhile
            times.append(path.stat().st_mtime)
    return max(times)
