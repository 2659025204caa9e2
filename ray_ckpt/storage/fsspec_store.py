"""The verbs on whatever else fsspec reaches: gs://, abfs://, sftp://, hdfs:// and their packages.

    stores that show an object once it is whole      are written in place
    all others                                       under another name beside it, then moved

Nothing is known of how such a place creates or lists: creates are elections, whose claims rest on
listings that show what was written. Credentials and endpoints come from fsspec's configuration and
from where each package looks for them.
"""

import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from ray_ckpt.core.errors import (
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
    UsageError,
)
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.disk.file_blocks import TEMPORARY
from ray_ckpt.storage.disk.posix import translated as of_this_host
from ray_ckpt.storage.disk.scratch_blocks import ScratchBlocks
from ray_ckpt.storage.election import create_by_election
from ray_ckpt.storage.fsspec_errors import translated
from ray_ckpt.storage.name_objects import point_by_object, pointed_by_object
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.ranged_file import read_into_each

T = TypeVar("T")
_SHOW_WHOLE_OBJECTS = frozenset({"gs", "gcs", "az", "abfs", "abfss", "oss", "memory"})
_READS_AT_ONCE = 4
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "ctime")
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "ino")


class FsspecStore:
    """Objects below a location whose scheme fsspec knows."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._scheme = uri.partition("://")[0]
        self._file_system, self._base = _opened(self._uri)

    def __reduce__(self) -> tuple[type["FsspecStore"], tuple[str]]:
        """Whoever gets it in another process makes a client of its own."""
        return FsspecStore, (self._uri,)

    @property
    def uri(self) -> str:
        """As a person types it."""
        return self._uri

    @property
    def reads_at_once(self) -> int:
        """Few: some of these protocols have one connection."""
        return _READS_AT_ONCE

    def _path(self, key: str) -> str:
        if ".." in key.split("/"):
            raise UsageError(f"{key!r} leaves the root", self._uri, "nothing was touched")
        return f"{self._base}/{key}".rstrip("/") or "/"

    def _key(self, path: str) -> str:
        return path.removeprefix(self._base).lstrip("/")

    def _where(self, key: str) -> str:
        return f"{self._uri}/{key}"

    def _ask(self, key: str, use: Callable[[], T]) -> T:
        with translated(self._where(key)):
            return use()

    def read(self, key: str) -> bytes:
        """The whole object."""
        return self._ask(key, lambda: self._file_system.cat_file(self._path(key)))

    def open_read(self, key: str) -> BinaryIO:
        """As fsspec opens it."""
        return self._ask(key, lambda: self._file_system.open(self._path(key), "rb"))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """One read of a range."""
        view = buffer.cast("B")
        if not view.nbytes:
            return
        with translated(self._where(key)), self._file_system.open(self._path(key), "rb") as stream:
            stream.seek(offset)
            data = stream.read(view.nbytes)
        if len(data) != view.nbytes:
            raise IntegrityError(f"ends before byte {offset + view.nbytes}", self._where(key))
        view[:] = data

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One read of a range."""
        read_into_each(partial(self.read_into, key), offset, buffers)

    def write(self, key: str, data: bytes) -> None:
        """Readers see the old object or the new one."""
        with self._whole(key) as path:
            self._file_system.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> None:
        """By an election."""
        create_by_election(self, key, data, partial(self.write, key, data))

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """The package's own way to send a file."""
        with of_this_host(source):
            size_bytes = source.stat().st_size
        with self._whole(key) as path:
            self._file_system.put_file(str(source), path)
        progress.advance(size_bytes)

    @contextmanager
    def _whole(self, key: str) -> Generator[str]:
        """Where the block puts what is to be the object; nobody sees it before the block's end."""
        path = self._path(key)
        with translated(self._where(key)):
            self._file_system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            if self._scheme in _SHOW_WHOLE_OBJECTS:
                yield path
                return
            beside = f"{PurePosixPath(path).parent}/{TEMPORARY}{uuid.uuid4().hex}"
            try:
                yield beside
                self._move(beside, path)
            except BaseException:
                with suppress(Exception):
                    self._file_system.rm_file(beside)
                raise

    def _move(self, source: str, target: str) -> None:
        """Some protocols move onto nothing only."""
        try:
            self._file_system.mv(source, target)
        except FileExistsError:
            self._file_system.rm_file(target)
            self._file_system.mv(source, target)

    @property
    def begins_on_disk(self) -> bool:
        """What is begun is a file of this host."""
        return True

    def begin(self, key: str, size_bytes: int) -> ScratchBlocks:
        """A file of this host, sent once it is whole."""
        return ScratchBlocks(lambda path: self.upload(path, key))

    def copy(self, source: str, target: str) -> None:
        """By the place itself, if its protocol can."""
        with self._whole(target) as path:
            self._file_system.cp_file(self._path(source), path)

    def take_over(
        self, source: str, target: str, entry: FileEntry, *, mark: str | None
    ) -> NoReturn:
        """Nobody here can tell what was copied.

        Raises:
            StorageError: always.
        """
        raise StorageError("computes no checksum of what it copies", self._where(source))

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """The package's own way to fetch a file."""
        self._ask(key, lambda: self._file_system.get_file(self._path(key), str(target)))
        progress.advance(target.stat().st_size)

    def point(self, key: str, name: str) -> None:
        """An object whose text is the name."""
        point_by_object(self, key, name)

    def pointed(self, key: str) -> str | None:
        """The text of such an object."""
        return pointed_by_object(self, key)

    def stat(self, key: str) -> ObjectInfo | None:
        """One look; a folder is no object."""
        try:
            self._file_system.invalidate_cache()
            info = self._ask(key, lambda: self._file_system.info(self._path(key)))
        except ObjectNotFoundError:
            return None
        return self._info(info) if info["type"] == "file" else None

    def mark(self, key: str) -> None:
        """None: it would be a request for every key."""

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """All below the folder, as the package walks through it."""
        start = f"{folder}/{prefix}" if folder else prefix
        for info in self._found(folder):
            if info.key.startswith(start) and not _is_unfinished(info.key):
                yield info

    def list_folders(self, folder: str) -> list[str]:
        """Names of folders with an object somewhere below."""
        start = f"{folder}/" if folder else ""
        rests = (info.key.removeprefix(start) for info in self.list_objects(folder))
        return sorted({rest.partition("/")[0] for rest in rests if "/" in rest})

    def _found(self, folder: str) -> list[ObjectInfo]:
        def find() -> dict[str, dict[str, Any]]:
            self._file_system.invalidate_cache()
            return self._file_system.find(self._path(folder), detail=True)

        try:
            found = self._ask(folder, find)
        except ObjectNotFoundError:
            return []
        below = f"{folder}/" if folder else ""
        return [info for info in map(self._info, found.values()) if info.key.startswith(below)]

    def free_bytes(self) -> None:
        """Fsspec has no word for it."""

    def weaknesses(self) -> tuple[()]:
        """None that is not seen to: creates are elections."""
        return ()

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """Objects under names of their own, that were never moved."""
        return [
            UnfinishedWrite(key=i.key, size_bytes=i.size_bytes, changed_at=i.modified_at)
            for i in self._found(folder)
            if _is_unfinished(i.key)
        ]

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """They are removed."""
        self.delete([write.key for write in writes])

    def delete(self, keys: Sequence[str]) -> None:
        """One after the other."""
        for key in keys:
            with suppress(ObjectNotFoundError), translated(self._where(key)):
                self._file_system.rm_file(self._path(key))

    def _info(self, info: dict[str, Any]) -> ObjectInfo:
        times = [info[name] for name in _TIMES if info.get(name)]
        versions = [str(info[name]) for name in _VERSIONS if info.get(name)]
        modified_at = _seconds(times[0]) if times else 0.0
        return ObjectInfo(
            key=self._key(info["name"]),
            size_bytes=int(info["size"] or 0),
            modified_at=modified_at,
            version="-".join([*versions, repr(modified_at)]),
        )


def _opened(uri: str) -> tuple[Any, str]:
    """The file system, and the path in it.

    Raises:
        UsageError: the package for it is not there, or it was given what it does not know.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    options = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        with translated(uri):
            file_system, path = cast(Any, fsspec).url_to_fs(uri, **options)
    except ImportError as error:
        raise UsageError(f"its package is missing: {error}", uri, do="install it") from error
    return file_system, path.rstrip("/")


def _is_unfinished(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


def _seconds(time: Any) -> float:
    """Since the epoch, of what a package gives as a time."""
    if isinstance(time, datetime):
        return time.timestamp()
    if isinstance(time, str):
        return datetime.fromisoformat(time).timestamp()
    return float(time)
