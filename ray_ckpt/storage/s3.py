"""The verbs on a prefix of an S3 bucket, through s3fs.

Credentials, endpoint and profile come from where everybody's do: `AWS_*`, fsspec's configuration,
IAM. Keys that are refused are looked up once more: who rotates them need not tell us. Writes use
`pipe_file` and `put_file` only: an open-for-write handle publishes a truncated object when the code
around it raises. Listings are never cached: several processes write.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    AuthorizationError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    TransientError,
    UsageError,
)
from ray_ckpt.core.findings import Finding
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.core.store_features import weaknesses
from ray_ckpt.storage import posix
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.name_objects import point_by_object, pointed_by_object
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.s3_blocks import S3Blocks
from ray_ckpt.storage.s3_client import make_file_system
from ray_ckpt.storage.s3_copy import copy_object, is_equal
from ray_ckpt.storage.s3_creates import create_object
from ray_ckpt.storage.s3_deletes import S3Deletes
from ray_ckpt.storage.s3_download import download_in_ranges
from ray_ckpt.storage.s3_errors import (
    has_broken_off,
    is_gone,
    is_unknown,
    may_have_newer_keys,
    translated,
)
from ray_ckpt.storage.s3_features import S3Features
from ray_ckpt.storage.s3_multipart import S3Object
from ray_ckpt.storage.s3_stream import S3Stream, body_of
from ray_ckpt.storage.s3_unfinished import parts_of, uploads_of
from ray_ckpt.storage.s3_upload import PART_BYTES, upload_in_parts
from ray_ckpt.storage.s3_wire import Got, S3Wire, open_wire

T = TypeVar("T")
_BLOCK_BYTES = 8 << 20
_READS_AT_ONCE = 8
_REPEATS = 2


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self._base = uri.removeprefix("s3://").rstrip("/")
        self._uri = f"s3://{self._base}"
        if not self._base.partition("/")[0]:
            raise UsageError("no bucket is named", uri, do="write s3://bucket/prefix")
        self._file_system = self._made()
        self._wired: tuple[Any, S3Wire | None] = (None, None)
        self._deletes = S3Deletes(self._at_name, self.bucket)
        self.features = S3Features(self, partial(self.request, names.PROBES), self._endpoint)
        """What this store does."""

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Whoever gets it in another process makes a client of its own."""
        return S3Store, (self._uri,)

    def _made(self) -> Any:
        with translated(self._uri):
            return make_file_system()

    def _endpoint(self) -> str:
        return self._ask("", lambda files: str(files.s3.meta.endpoint_url))

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return self._uri

    @property
    def bucket(self) -> str:
        """Its name."""
        return self._base.partition("/")[0]

    def weaknesses(self) -> tuple[Finding, ...]:
        """Found out by the first who asks, or who creates an object."""
        return weaknesses(self.features.get(), self._uri)

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}".rstrip("/")

    def _name(self, key: str) -> str:
        """As it is called in the bucket."""
        return self._path(key).partition("/")[2]

    def _where(self, key: str) -> str:
        return f"{self._uri}/{key}"

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._base}/")

    def _ask(self, key: str, use: Callable[[Any], T]) -> T:
        """What `use` makes of the s3fs file system.

        Again, if its answer has broken off, or if newer keys may be there meanwhile; whatever else
        is worth another try botocore has tried again itself.
        """
        for _ in range(_REPEATS):
            try:
                with translated(self._where(key)):
                    return use(self._file_system)
            except AuthorizationError as error:
                if not may_have_newer_keys(error):
                    raise
                self._file_system = self._made()
            except TransientError as error:
                if not has_broken_off(error):
                    raise
        with translated(self._where(key)):
            return use(self._file_system)

    def _wire(self, key: str) -> S3Wire | None:
        """The way for bulk bytes, with the keys that s3fs has now."""
        of, wire = self._wired
        if of is not self._file_system:
            of = self._file_system
            wire = self._ask(key, lambda files: open_wire(files, self.bucket))
            self._wired = (of, wire)
        return wire

    def _not_there(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError("not there", self._where(key), do="check bucket and prefix")

    def _got(self, key: str, offset: int, into: memoryview) -> Got | None:
        wire = self._wire(key)
        return wire and wire.get(self._name(key), offset, into)

    def read(self, key: str) -> bytes:
        """One GET."""
        wire = self._wire(key)
        try:
            data = wire and wire.read(self._name(key))
        except FileNotFoundError as error:
            raise self._not_there(key) from error
        if data is not None:
            return data
        return self._ask(key, lambda files: body_of(files, self._path(key)))

    def open_read(self, key: str) -> BinaryIO:
        """A HEAD, then ranged GETs, read ahead in blocks."""
        info = self.stat(key)
        if info is None:
            raise self._not_there(key)
        stream = S3Stream(partial(self.read_into, key), info.size_bytes)
        return cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))

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
            data = self._ask(key, lambda files: body_of(files, self._path(key), Range=byte_range))
        except StorageError:
            info = self.stat(key)
            if info is None or info.size_bytes > offset:
                raise
            data = b""  # a range that begins behind the end is refused as a whole
        if len(data) != buffer.nbytes:
            raise IntegrityError(f"ends before byte {end}", self._where(key))
        buffer.cast("B")[:] = data

    def write(self, key: str, data: bytes) -> None:
        """One PUT."""
        wire = self._wire(key)
        if not (wire and wire.put(self._name(key), data)):
            self._ask(key, lambda files: files.pipe_file(self._path(key), data))

    def create(self, key: str, data: bytes) -> None:
        """One PUT with If-None-Match, or an election; the very same bytes count as put by it."""
        features = self.features.get()
        create_object(self, key, data, features=features, put_new=self._put_new)

    def _put_new(self, key: str, data: bytes) -> None:
        try:
            self._ask(key, lambda files: files.pipe_file(self._path(key), data, mode="create"))
        except StorageError as error:
            # s3fs gives a failed precondition as EINVAL, like other refusals: look what is there
            if self.stat(key) is None:
                raise
            # a PUT whose answer is lost is sent once more, and then meets itself
            if self.read(key) != data:
                raise ObjectExistsError("something is there already", self._where(key)) from error

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """One PUT, or an upload in parts that goes on where an earlier one was cut off."""
        with posix.translated(source):
            data = source.read_bytes() if source.stat().st_size <= PART_BYTES else None
        if data is None:
            upload_in_parts(source, self._object(key), progress=progress)
            return
        self.write(key, data)
        progress.advance(len(data))

    def begin(self, key: str, size_bytes: int) -> S3Blocks:
        """A multipart upload, sent part by part."""
        return S3Blocks(self._object(key), size_bytes)

    def _object(self, key: str) -> S3Object:
        call, wire = partial(self._call, key=key), partial(self._wire, key)
        return S3Object(bucket=self.bucket, name=self._name(key), call=call, wire=wire)

    def copy(self, source: str, target: str) -> None:
        """Server-side; in parts where the object is larger than 5 GB."""
        ends = self._path(source), self._path(target)
        self._ask(source, lambda files: files.cp_file(*ends))

    def copy_from(self, other: "S3Store", key: str, entry: FileEntry) -> None:
        """The object under the same key of another store of this service is here too.

        Server-side, in parts where it is large; `is_equal` says whether it is what its entry says.
        """
        source, target = _at(other._path(key)), _at(self._path(key))
        copy_object(partial(self._call, key=key), source, target, entry)

    def is_equal(self, key: str, entry: FileEntry) -> bool | None:
        """Whether the object is what the entry says, by a checksum of the service; one HEAD.

        None if it is as large, and the service has computed none that could tell.
        """
        return is_equal(partial(self._call, key=key), _at(self._path(key)), entry)

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
            info: dict[str, Any] = self._ask(key, lambda files: files.info(self._path(key)))
        except ObjectNotFoundError:
            return None
        return self._info(info) if info["type"] == "file" else None

    def mark(self, key: str) -> str | None:
        """None: it would be a HEAD for every key."""
        return None

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """One LIST for a thousand objects."""
        start = f"{folder}/{prefix}" if folder else prefix
        for page in self._pages(start):
            yield from map(self._listed, page.get("Contents", []))

    def list_folders(self, folder: str) -> list[str]:
        """One LIST with a delimiter. May name prefixes that are just gone: look for an object."""
        pages = self._pages(f"{folder}/" if folder else "", Delimiter="/")
        found = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", []))
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)

    def _pages(self, start: str, **options: str) -> Iterator[dict[str, Any]]:
        """The answers to as many LISTs as it takes, for keys that start with `start`.

        Not by s3fs's `find` and `ls`, which ask twice more where nothing is.
        """
        bucket, _, prefix = f"{self._base}/{start}".partition("/")
        while True:
            page = self._call("list_objects_v2", start, Bucket=bucket, Prefix=prefix, **options)
            yield page  # empty where there is no such bucket
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def free_bytes(self) -> None:
        """A bucket has no end that anybody could ask for."""

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """Multipart uploads; one LIST, and one for the parts of each upload."""
        below = f"{folder}/" if folder else ""
        bucket, _, prefix = f"{self._base}/{below}".partition("/")
        call = partial(self._call, key=folder)
        begun = uploads_of(call, bucket=bucket, prefix=prefix)
        return [self._unfinished(bucket, upload) for upload in begun]

    def _unfinished(self, bucket: str, upload: dict[str, Any]) -> UnfinishedWrite:
        """One upload as LIST shows it, and how far it has come."""
        key, token = self._key(f"{bucket}/{upload['Key']}"), upload["UploadId"]
        at = {"Bucket": bucket, "Key": upload["Key"], "UploadId": token}
        parts = list(parts_of(partial(self._call, key=key), at))
        times = [upload["Initiated"], *(part["LastModified"] for part in parts)]
        return UnfinishedWrite(
            key=key,
            size_bytes=sum(int(part["Size"]) for part in parts),
            changed_at=max(time.timestamp() for time in times),
            token=token,
        )

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """One ABORT each."""
        for write in writes:
            bucket, _, name = self._path(write.key).partition("/")
            self._call(
                "abort_multipart_upload", write.key, Bucket=bucket, Key=name, UploadId=write.token
            )

    def _call(self, verb: str, key: str, **options: Any) -> dict[str, Any]:
        """S3's own answer; empty where what is asked about is not there, or nobody can say."""
        try:
            return self.request(key, verb, **options)
        except StorageError as error:
            is_untold = verb == "list_multipart_uploads" and is_unknown(error)
            if not is_untold and not is_gone(error):
                raise
            return {}

    def _at_name(self, verb: str, name: str, **options: Any) -> dict[str, Any]:
        return self._call(verb, self._key(f"{self.bucket}/{name}"), **options)

    def request(self, key: str, verb: str, **options: Any) -> dict[str, Any]:
        """S3's own answer to one of its own requests; errors are said to be about `key`."""
        return self._ask(key, lambda files: files.call_s3(verb, **options))

    def delete(self, keys: Sequence[str]) -> None:
        """The first one by itself, then in batches."""
        self._deletes.delete([self._name(key) for key in keys])

    def _listed(self, entry: dict[str, Any]) -> ObjectInfo:
        """From an answer to LIST; a folder that some tool made an object of ends with a slash."""
        return ObjectInfo(
            key=self._key(f"{self._base.partition('/')[0]}/{entry['Key']}"),
            size_bytes=int(entry["Size"]),
            modified_at=entry["LastModified"].timestamp(),
            version=entry["ETag"],
        )

    def _info(self, info: dict[str, Any]) -> ObjectInfo:
        modified = info.get("LastModified")
        return ObjectInfo(
            key=self._key(info["name"]),
            size_bytes=int(info["size"]),
            modified_at=modified.timestamp() if modified else 0.0,
            version=info.get("ETag", ""),
        )


def _at(path: str) -> dict[str, str]:
    bucket, _, name = path.partition("/")
    return {"Bucket": bucket, "Key": name}
