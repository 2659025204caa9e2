"""The verbs on a folder of a POSIX file system: a disk, or a share that all nodes mount.

What a person calls durable here: the file is synced, then renamed into place, then its folder is
synced. Names that start with `.tmp-` are unfinished and never listed.
"""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from ray_ckpt.core.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    UsageError,
)
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.disk.file_blocks import TEMPORARY, FileBlocks, new_file
from ray_ckpt.storage.disk.posix import (
    made_in,
    make_folder,
    read_into,
    sync_file,
    sync_folder,
    sync_folder_if_there,
    translated,
    write_synced,
)
from ray_ckpt.storage.progress import UNTOLD, Progress

_UNTOUCHED = "nothing was changed, neither here nor where a link points"


class LocalStore:
    """Objects are files below `root`, which need not exist before the first write."""

    def __init__(self, root: str) -> None:
        self._root = Path(root).expanduser().absolute()

    @property
    def uri(self) -> str:
        """The absolute path."""
        return str(self._root)

    def path(self, key: str) -> Path:
        """Where `key` lies on this machine."""
        return self._root / key

    def inside(self, key: str) -> Path:
        """Like `path`, for what is to be moved or removed: certainly below the root.

        The root itself may be a symbolic link; nothing below it may.

        Raises:
            UsageError: the key leaves the root, or a symbolic link is on its way.
        """
        path = self._root
        for part in key.split("/"):
            if part in ("", ".", ".."):
                raise UsageError(f"{key!r} is no key", self.uri, _UNTOUCHED)
            path = path / part
            with translated(path):
                is_link = path.is_symlink()
            if is_link:
                raise UsageError(
                    "a symbolic link is here, and what it points to is not ours to move or remove",
                    str(path),
                    _UNTOUCHED,
                    f"rm {path}    (removes the link alone), or put the folder itself there",
                )
        return path

    def read(self, key: str) -> bytes:
        """The whole file."""
        with translated(self.path(key)):
            return self.path(key).read_bytes()

    def open_read(self, key: str) -> BinaryIO:
        """The file itself, unbuffered: callers read in large pieces or buffer themselves."""
        with translated(self.path(key)):
            return cast(BinaryIO, self.path(key).open("rb", buffering=0))

    @property
    def reads_at_once(self) -> int:
        """One: the kernel reads ahead."""
        return 1

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Straight into place."""
        self.read_into_each(key, offset, [buffer])

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Straight into their places."""
        with translated(self.path(key)):
            read_into(self.path(key), offset, buffers)

    def write(self, key: str, data: bytes) -> None:
        """Written beside, synced, renamed over; then the folder is synced."""
        with translated(self.path(key)), self._temporary(key) as temporary:
            write_synced(temporary, data)
            temporary.replace(self.path(key))
            sync_folder_if_there(self.path(key).parent)

    def create(self, key: str, data: bytes) -> None:
        """Written beside and hard-linked into place: link, unlike rename, never replaces."""
        with translated(self.path(key)), self._temporary(key) as temporary:
            write_synced(temporary, data)
            self.path(key).hardlink_to(temporary)
            sync_folder(self.path(key).parent)

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """Copied beside, synced, renamed into place; told of as a whole."""
        with translated(self.path(key)), self._temporary(key) as temporary:
            shutil.copyfile(source, temporary)
            sync_file(temporary)
            progress.advance(temporary.stat().st_size)
            temporary.replace(self.path(key))
            sync_folder_if_there(self.path(key).parent)

    @property
    def begins_on_disk(self) -> bool:
        """Beside its place."""
        return True

    def begin(self, key: str, size_bytes: int) -> FileBlocks:
        """Written beside, past the page cache, and linked into place."""
        return new_file(self.path(key))

    def copy(self, source: str, target: str) -> None:
        """Copied beside, synced, renamed into place."""
        self.upload(self.path(source), target)

    def take_over(self, source: str, target: str, entry: FileEntry, *, mark: str | None) -> None:
        """A second name of the same file."""
        link, path = self.path(target), self.path(source)
        with translated(path):
            make_folder(link.parent)
            link.hardlink_to(path)
            # must be asked of the new name: what the old one leads to may change at any moment
            if _version(link.lstat()) != mark:
                link.unlink()
                raise ObjectNotFoundError("it is another file by now", str(path))
            sync_folder(link.parent)

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """A plain copy, told of as a whole."""
        with translated(self.path(key)):
            shutil.copyfile(self.path(key), target)
            progress.advance(target.stat().st_size)

    def point(self, key: str, name: str) -> None:
        """A symbolic link, made beside and renamed over: at every moment it leads somewhere."""
        self.pointed(key)
        with (
            translated(self.path(key)),
            self._temporary(key, partial(os.symlink, name)) as temporary,
        ):
            temporary.replace(self.path(key))
            sync_folder_if_there(self.path(key).parent)

    def pointed(self, key: str) -> str | None:
        """Where the link leads."""
        path = self.path(key)
        with translated(path):
            if path.is_symlink():
                return str(path.readlink())
            if path.exists():
                raise ObjectExistsError("something is here that is no symbolic link", str(path))
        return None

    def stat(self, key: str) -> ObjectInfo | None:
        """Size and time of the file, or None."""
        with contextlib.suppress(ObjectNotFoundError), translated(self.path(key)):
            return _info(key, self.path(key).stat())
        return None

    def mark(self, key: str) -> str | None:
        """Inode, time and size: one system call."""
        try:
            return _version(os.stat(f"{self._root}/{key}"))  # noqa: PTH116  a Path costs more
        except FileNotFoundError:
            return ""
        except OSError:
            with translated(self.path(key)):
                raise

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """Files below `folder`; symbolic links to folders are not followed."""
        with translated(self.path(folder)):
            found, below = _scan(self._entries(folder), f"{folder}/" if folder else "", prefix)
        yield from found
        for key in below:
            yield from self.list_objects(key)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What lies directly in the folder; nothing if it is not there."""
        with contextlib.suppress(ObjectNotFoundError), translated(self.path(folder)):
            return list(os.scandir(self.path(folder)))
        return []

    def list_folders(self, folder: str) -> list[str]:
        """Folders directly below `folder`; symbolic links do not count."""
        return sorted(e.name for e in self._entries(folder) if e.is_dir(follow_symlinks=False))

    def free_bytes(self) -> int:
        """Of the file system on which the root lies, or will lie."""
        folder = self._root
        while not folder.exists():
            folder = folder.parent
        with translated(folder):
            return shutil.disk_usage(folder).free

    def weaknesses(self) -> tuple[()]:
        """None: a file system links and renames at once, or it is none."""
        return ()

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """Files under temporary names."""
        found: list[UnfinishedWrite] = []
        with translated(self.path(folder)):
            for parent, _, files in os.walk(self.path(folder)):
                paths = (Path(parent, name) for name in files if name.startswith(TEMPORARY))
                found.extend(write for path in paths if (write := self._unfinished(path)))
        return found

    def _unfinished(self, path: Path) -> UnfinishedWrite | None:
        with contextlib.suppress(FileNotFoundError):  # it is whole now
            status = path.lstat()
            return UnfinishedWrite(
                key=path.relative_to(self._root).as_posix(),
                size_bytes=status.st_size,
                changed_at=status.st_mtime,
            )
        return None

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """Unlinks."""
        self.delete([write.key for write in writes])

    def delete(self, keys: Sequence[str]) -> None:
        """Unlinks, then removes the folders that this left empty."""
        for key in keys:
            path = self.inside(key)
            with translated(path):
                path.unlink(missing_ok=True)
        for parent in {self.path(key).parent for key in keys}:
            self._remove_empty(parent)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._root and self._root in folder.parents:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @contextlib.contextmanager
    def _temporary(self, key: str, make: Callable[[Path], None] = Path.touch) -> Generator[Path]:
        """Something of a private name beside `key`, gone afterwards whatever happens."""
        parent = self.path(key).parent
        temporary = parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            made_in(parent, lambda: make(temporary))
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _scan(
    entries: list[os.DirEntry[str]], parent: str, prefix: str
) -> tuple[list[ObjectInfo], list[str]]:
    """The files among the entries of a folder, and the keys of the folders."""
    files: list[ObjectInfo] = []
    folders: list[str] = []
    for entry in entries:
        if not entry.name.startswith(prefix):
            continue
        if entry.is_dir(follow_symlinks=False):
            folders.append(f"{parent}{entry.name}")
        elif not entry.name.startswith(TEMPORARY):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a broken link
                info = _info(f"{parent}{entry.name}", entry.stat())
                files.extend([info] if info else [])
    return files, folders


def _info(key: str, status: os.stat_result) -> ObjectInfo | None:
    """What is there, if it is a file."""
    if not stat.S_ISREG(status.st_mode):
        return None
    return ObjectInfo(
        key=key,
        size_bytes=status.st_size,
        modified_at=status.st_mtime,
        version=_version(status),
        shared=f"{status.st_dev}-{status.st_ino}" if status.st_nlink > 1 else "",
    )


def _version(status: os.stat_result) -> str:
    # the inode too: what is written beside and renamed within one tick of the clock has another
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def changed_at(folder: Path) -> float:
    """Time of the newest change in the folder, 0 if it is gone; in seconds since the epoch."""
    return max((status.st_mtime for status in _statuses(folder)), default=0.0)


def size_of(folder: Path) -> int:
    """Bytes of the files that go with the folder; what links point to stays."""
    return sum(s.st_size for s in _statuses(folder) if stat.S_ISREG(s.st_mode))


def own_size_of(folder: Path) -> int:
    """Bytes that are free once the folder is gone: no file elsewhere has them as well."""
    files = (s for s in _statuses(folder) if stat.S_ISREG(s.st_mode))
    return sum(s.st_size for s in files if s.st_nlink == 1)


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # published or discarded meanwhile
            yield path.lstat()
