"""The verbs on a prefix of an S3 bucket, through s3fs.

Writes use `pipe_file` only, where sockets of our own do not serve: an open-for-write handle
publishes a truncated object when the code around it raises.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UsageError,
)
from ray_ckpt.core.findings import Finding
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.core.store_features import weaknesses
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.disk import posix
from ray_ckpt.storage.name_objects import point_by_object, pointed_by_object
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.ranged_file import open_ranged, read_into_each
from ray_ckpt.storage.s3.blocks import S3Blocks
from ray_ckpt.storage.s3.connection import S3Connection
from ray_ckpt.storage.s3.copy import copy_object, is_equal
from ray_ckpt.storage.s3.creates import create_object
from ray_ckpt.storage.s3.deletes import S3Deletes
from ray_ckpt.storage.s3.download import download_in_ranges
from ray_ckpt.storage.s3.features import S3Features
from ray_ckpt.storage.s3.listing import folders_at, objects_at, unfinished_at
from ray_ckpt.storage.s3.multipart import S3Object
from ray_ckpt.storage.s3.upload import PART_BYTES, upload_in_parts
from ray_ckpt.storage.s3.wire import Got

_BLOCK_BYTES = 8 << 20
_READS_AT_ONCE = 8


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        if not uri.removeprefix("s3://").partition("/")[0]:
            raise UsageError("no bucket is named", uri, do="write s3://bucket/prefix")
        self._at = S3Connection(uri)
        self._deletes = S3Deletes(self._at.call_at_name, self.bucket)
        self.features = S3Features(self, partial(self.request, names.PROBES), self._at.endpoint)
        """What this store does."""

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Whoever gets it in another process makes a client of its own."""
        return S3Store, (self.uri,)

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return self._at.uri

    @property
    def bucket(self) -> str:
        """Its name."""
        return self._at.bucket

    def weaknesses(self) -> tuple[Finding, ...]:
        """Found out by the first who asks, or who creates an object."""
        return weaknesses(self.features.get(), self.uri)

    def _not_there(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError("not there", self._at.where(key), do="check bucket and prefix")

    def _got(self, key: str, offset: int, into: memoryview) -> Got | None:
        wire = self._at.wire(key)
        return wire and wire.get(self._at.name(key), offset, into)

    def read(self, key: str) -> bytes:
        """One GET."""
        wire = self._at.wire(key)
        try:
            data = wire and wire.read(self._at.name(key))
        except FileNotFoundError as error:
            raise self._not_there(key) from error
        if data is not None:
            return data
        return self._at.get(key)

    def open_read(self, key: str) -> BinaryIO:
        """A HEAD, then ranged GETs, read ahead in blocks."""
        info = self.stat(key)
        if info is None:
            raise self._not_there(key)
        read_into = partial(self.read_into, key)
        return open_ranged(read_into, info.size_bytes, block_bytes=_BLOCK_BYTES)

    @property
    def reads_at_once(self) -> int:
        """Each waits for an answer of its own."""
        return _READS_AT_ONCE

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """One ranged GET."""
        end = offset + buffer.nbytes
        if offset == end:
            return  # an empty range would be the whole object
        got = self._got(key, offset, buffer.cast("B"))
        if got and got.num_bytes == buffer.nbytes:
            return
        byte_range = f"bytes={offset}-{end - 1}"
        try:
            data = self._at.get(key, Range=byte_range)
        except StorageError:
            info = self.stat(key)
            if info is None or info.size_bytes > offset:
                raise
            data = b""  # a range that begins behind the end is refused as a whole
        if len(data) != buffer.nbytes:
            raise IntegrityError(f"ends before byte {end}", self._at.where(key))
        buffer.cast("B")[:] = data

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One ranged GET."""
        read_into_each(partial(self.read_into, key), offset, buffers)

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        wire = self._at.wire(key)
        if not (wire and wire.put(self._at.name(key), data)):
            self._at.ask(key, lambda files: files.pipe_file(self._at.path(key), data))

    def create(self, key: str, data: bytes) -> None:
        """One PUT with If-None-Match, or an election; the very same bytes count as put by it."""
        features = self.features.get()
        create_object(self, key, data, features=features, put_new=self._put_new)

    def _put_new(self, key: str, data: bytes) -> None:
        try:
            self._at.ask(
                key, lambda files: files.pipe_file(self._at.path(key), data, mode="create")
            )
        except StorageError as error:
            # s3fs gives a failed precondition as EINVAL, like other refusals: look what is there
            if self.stat(key) is None:
                raise
            # a PUT whose answer is lost is sent once more, and then meets itself
            if self.read(key) != data:
                raise ObjectExistsError(
                    "something is there already", self._at.where(key)
                ) from error

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """One PUT, or an upload in parts that goes on where an earlier one was cut off."""
        with posix.translated(source):
            data = source.read_bytes() if source.stat().st_size <= PART_BYTES else None
        if data is None:
            upload_in_parts(source, self._object(key), progress=progress)
            return
        self.write(key, data)
        progress.advance(len(data))

    @property
    def begins_on_disk(self) -> bool:
        """Its parts are sent as they come."""
        return False

    def begin(self, key: str, size_bytes: int) -> S3Blocks:
        """A multipart upload, sent part by part; a small object is sent as a whole."""
        return S3Blocks(self._object(key), size_bytes, write=partial(self.write, key))

    def _object(self, key: str) -> S3Object:
        call, wire = partial(self._at.call, key=key), partial(self._at.wire, key)
        return S3Object(bucket=self.bucket, name=self._at.name(key), call=call, wire=wire)

    def copy(self, source: str, target: str) -> None:
        """Server-side; in parts where the object is larger than 5 GB."""
        ends = self._at.path(source), self._at.path(target)
        self._at.ask(source, lambda files: files.cp_file(*ends))

    def copy_from(self, other: "S3Store", key: str, entry: FileEntry) -> None:
        """The object under the same key of another store of this service is here too.

        Server-side, in parts where it is large; `is_equal` says whether it is what its entry says.
        """
        source, target = other._at.object(key), self._at.object(key)
        copy_object(partial(self._at.call, key=key), source, target, entry)

    def take_over(self, source: str, target: str, entry: FileEntry, *, mark: str | None) -> None:
        """Copied by the service, whose own checksum must say that it is what the entry says."""
        call = partial(self._at.call, key=source)
        copy_object(call, self._at.object(source), self._at.object(target), entry)
        says = self.is_equal(target, entry)
        if says:
            return
        self.delete([target])
        if says is None:
            raise StorageError("computes no checksum of what it copies", self._at.endpoint())
        raise ObjectNotFoundError("it is damaged, or another object", self._at.where(source))

    def is_equal(self, key: str, entry: FileEntry) -> bool | None:
        """Whether the object is what the entry says, by a checksum of the service; one HEAD.

        None if it is as large, and the service has computed none that could tell.
        """
        return is_equal(partial(self._at.call, key=key), self._at.object(key), entry)

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """Ranged GETs, several at once; the first tells how many more there are."""
        download_in_ranges(
            partial(self._start, key), partial(self.read_into, key), target, progress=progress
        )

    def _start(self, key: str, buffer: memoryview) -> Got:
        """The first bytes of the object are in the buffer."""
        got = self._got(key, 0, buffer)
        if got:
            return got
        info = self.stat(key)
        if info is None:
            raise self._not_there(key)
        num_bytes = min(info.size_bytes, buffer.nbytes)
        self.read_into(key, 0, buffer[:num_bytes])
        return Got(num_bytes=num_bytes, total_bytes=info.size_bytes)

    def point(self, key: str, name: str) -> None:
        """One PUT."""
        point_by_object(self, key, name)

    def pointed(self, key: str) -> str | None:
        """One GET, or a HEAD alone where a larger object lies than a name needs."""
        return pointed_by_object(self, key)

    def stat(self, key: str) -> ObjectInfo | None:
        """One HEAD; a prefix is not an object."""
        try:
            info: dict[str, Any] = self._at.ask(key, lambda files: files.info(self._at.path(key)))
        except ObjectNotFoundError:
            return None
        return self._info(info) if info["type"] == "file" else None

    def mark(self, key: str) -> str | None:
        """None: it would be a HEAD for every key."""
        return None

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """One LIST for a thousand objects."""
        return objects_at(self._at, f"{folder}/{prefix}" if folder else prefix)

    def list_folders(self, folder: str) -> list[str]:
        """One LIST with a delimiter. May name prefixes that are just gone: look for an object."""
        return folders_at(self._at, f"{folder}/" if folder else "")

    def free_bytes(self) -> None:
        """A bucket has no end that anybody could ask for."""

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """Multipart uploads; one LIST, and one for the parts of each upload."""
        return unfinished_at(self._at, f"{folder}/" if folder else "")

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """One ABORT each."""
        for write in writes:
            place = {**self._at.object(write.key), "UploadId": write.token}
            self._at.call("abort_multipart_upload", write.key, **place)

    def request(self, key: str, verb: str, **options: Any) -> dict[str, Any]:
        """S3's own answer to one of its own requests; errors are said to be about `key`."""
        return self._at.request(key, verb, **options)

    def delete(self, keys: Sequence[str]) -> None:
        """The first one by itself, then in batches."""
        self._deletes.delete([self._at.name(key) for key in keys])

    def _info(self, info: dict[str, Any]) -> ObjectInfo:
        modified = info.get("LastModified")
        return ObjectInfo(
            key=self._at.key_of(info["name"]),
            size_bytes=int(info["size"]),
            modified_at=modified.timestamp() if modified else 0.0,
            version=info.get("ETag", ""),
        )
