"""The verbs on a prefix of an S3 bucket, through s3fs.

Credentials, endpoint and profile come from where everybody's do: `AWS_*`, fsspec's configuration,
IAM. Writes use `pipe_file` and `put_file` only: an open-for-write handle publishes a truncated
object when the code around it raises. Listings are never cached: several processes write.
"""

import contextlib
import errno
import inspect
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from ray_ckpt.core.errors import (
    AuthorizationError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    ThrottledError,
    TransientError,
    UsageError,
)
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.s3_blocks import S3Blocks

_BLOCK_BYTES = 8 << 20
_READS_AT_ONCE = 8
_BATCH_KEYS = 1000
_NAME_BYTES = 256
_DENIED = ("AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_SIGN_IN = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
_TRY_AGAIN = "run the same command again; what was sent already is not sent twice"
_CURES: dict[type[StorageError], str] = {
    AuthorizationError: _SIGN_IN,
    TransientError: _TRY_AGAIN,
    ThrottledError: _TRY_AGAIN,
}
_BY_ERRNO: dict[int | None, type[StorageError]] = {
    errno.EBUSY: ThrottledError,  # SlowDown, ServiceUnavailable
    errno.EINVAL: StorageError,  # the request itself was refused
}


class S3Store:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        self._base = uri.removeprefix("s3://").rstrip("/")
        self._uri = f"s3://{self._base}"
        if not self._base.partition("/")[0]:
            raise UsageError("no bucket is named", uri, do="write s3://bucket/prefix")
        import s3fs  # pyright: ignore[reportMissingTypeStubs]  # heavy, and needed only where there is an s3:// location

        self._file_system: Any = s3fs.S3FileSystem(
            use_listings_cache=False, skip_instance_cache=True
        )
        parameters = inspect.signature(self._file_system._cat_file).parameters
        # versions that can read in parts ask for the size before they read
        self._in_one_part = {"max_concurrency": 1} if "max_concurrency" in parameters else {}

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return self._uri

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}".rstrip("/")

    def _where(self, key: str) -> str:
        return f"{self._uri}/{key}"

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._base}/")

    def read(self, key: str) -> bytes:
        """One GET."""
        with translated(self._where(key)):
            return cast(bytes, self._file_system.cat_file(self._path(key), **self._in_one_part))

    def open_read(self, key: str) -> BinaryIO:
        """Ranged GETs, read ahead in blocks."""
        with translated(self._where(key)):
            stream = self._file_system.open(
                self._path(key), "rb", block_size=_BLOCK_BYTES, cache_type="readahead"
            )
            return cast(BinaryIO, stream)

    @property
    def reads_at_once(self) -> int:
        """Each waits for an answer of its own."""
        return _READS_AT_ONCE

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """One ranged GET."""
        end = offset + buffer.nbytes
        if offset == end:
            return  # an empty range would be the whole object
        try:
            with translated(self._where(key)):
                data = self._file_system.cat_file(
                    self._path(key), start=offset, end=end, **self._in_one_part
                )
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
        with translated(self._where(key)):
            self._file_system.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> None:
        """One PUT with If-None-Match; the very same bytes count as put by this call."""
        try:
            with translated(self._where(key)):
                self._file_system.pipe_file(self._path(key), data, mode="create")
        except StorageError as error:
            # s3fs gives a failed precondition as EINVAL, like other refusals: look what is there
            if self.stat(key) is None:
                raise
            # a PUT whose answer is lost is sent once more, and then meets itself
            if self.read(key) != data:
                raise ObjectExistsError("something is there already", self._where(key)) from error

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """One PUT, or a multipart upload whose completion makes it visible; told of by parts."""
        with translated(self._where(key)):
            self._file_system.put_file(str(source), self._path(key), callback=_Told(progress))

    def begin(self, key: str, size_bytes: int) -> S3Blocks:
        """A multipart upload, sent part by part."""
        bucket, _, name = self._path(key).partition("/")
        return S3Blocks(
            partial(self._call, key=key), bucket=bucket, name=name, size_bytes=size_bytes
        )

    def copy(self, source: str, target: str) -> None:
        """Server-side; in parts where the object is larger than 5 GB."""
        with translated(self._where(source)):
            self._file_system.cp_file(self._path(source), self._path(target))

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """One streamed GET."""
        with translated(self._where(key)):
            self._file_system.get_file(self._path(key), str(target), callback=_Told(progress))

    def point(self, key: str, name: str) -> None:
        """One PUT."""
        self.pointed(key)
        self.write(key, name.encode())

    def pointed(self, key: str) -> str | None:
        """One GET, or a HEAD alone where a larger object lies than a name needs."""
        info = self.stat(key)
        if info is None:
            return None
        text = self.read(key).decode(errors="replace") if info.size_bytes < _NAME_BYTES else ""
        if not text or len(text.split()) != 1:
            raise ObjectExistsError("an object is here whose text is no name", self._where(key))
        return text.strip()

    def stat(self, key: str) -> ObjectInfo | None:
        """One HEAD; a prefix is not an object."""
        try:
            with translated(self._where(key)):
                info = cast(dict[str, Any], self._file_system.info(self._path(key)))
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
        bucket, _, prefix = f"{self._base}/{folder}/".partition("/")
        options = {"Bucket": bucket, "Prefix": prefix}
        found: list[UnfinishedWrite] = []
        while True:
            page = self._call("list_multipart_uploads", folder, **options)
            found.extend(self._unfinished(bucket, entry) for entry in page.get("Uploads", []))
            if not page.get("IsTruncated"):
                return found
            options["KeyMarker"] = page["NextKeyMarker"]
            options["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _unfinished(self, bucket: str, entry: dict[str, Any]) -> UnfinishedWrite:
        """One upload as LIST shows it, and how far it has come."""
        key = self._key(f"{bucket}/{entry['Key']}")
        options = {"Bucket": bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
        size_bytes, changed_at = 0, entry["Initiated"].timestamp()
        while True:
            page = self._call("list_parts", key, **options)
            for part in page.get("Parts", []):
                size_bytes += int(part["Size"])
                changed_at = max(changed_at, part["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                break
            options["PartNumberMarker"] = page["NextPartNumberMarker"]
        return UnfinishedWrite(
            key=key, size_bytes=size_bytes, changed_at=changed_at, token=entry["UploadId"]
        )

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """One ABORT each."""
        for write in writes:
            bucket, _, name = self._path(write.key).partition("/")
            self._call(
                "abort_multipart_upload", write.key, Bucket=bucket, Key=name, UploadId=write.token
            )

    def _call(self, verb: str, key: str, **options: Any) -> dict[str, Any]:
        """S3's own answer; empty where what is asked about is not there."""
        with translated(self._where(key)):
            try:
                return cast(dict[str, Any], self._file_system.call_s3(verb, **options))
            except FileNotFoundError:
                return {}

    def delete(self, keys: Sequence[str]) -> None:
        """The first object by itself, so that a marker is gone before the rest; then in batches.

        Not by s3fs's `rm`: it takes `*` for a pattern, and drops the refusals in S3's answer.
        """
        rest = range(1, len(keys), _BATCH_KEYS)
        for batch in (keys[:1], *(keys[start : start + _BATCH_KEYS] for start in rest)):
            if batch:
                with translated(self._where(batch[0])):
                    self._delete_batch([self._path(key).partition("/")[2] for key in batch])

    def _delete_batch(self, names: Sequence[str]) -> None:
        answer = cast(
            dict[str, Any],
            self._file_system.call_s3(
                "delete_objects",
                Bucket=self._base.partition("/")[0],
                Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
            ),
        )
        for refusal in cast(list[dict[str, str]], answer.get("Errors", [])):
            text = f"{refusal.get('Key')}: {refusal.get('Code')} {refusal.get('Message')}"
            raise PermissionError(text) if refusal.get("Code") in _DENIED else OSError(text)

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


class _Told:
    """As much of an fsspec callback as s3fs calls."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def set_size(self, size: int | None) -> None:
        """Known already."""

    def relative_update(self, inc: int = 1) -> None:
        """So many bytes more have been sent, or have come."""
        self._progress.advance(inc)


@contextlib.contextmanager
def translated(where: str) -> Generator[None]:
    """Turns what s3fs and botocore raise into ours, once."""
    try:
        yield
    except RayCkptError:
        raise
    except FileNotFoundError as error:
        raise ObjectNotFoundError("not there", where, do="check bucket and prefix") from error
    except PermissionError as error:
        raise AuthorizationError(f"the store says no: {error}", where, do=_SIGN_IN) from error
    except OSError as error:
        kind = _BY_ERRNO.get(error.errno, TransientError)
        raise kind(f"the store failed: {error}", where, do=_CURES.get(kind, "")) from error
    except Exception as error:
        kind = _kind_of_client_error(error)
        if kind is None:
            raise
        raise kind(f"the store cannot be used: {error}", where, do=_CURES[kind]) from error


def _kind_of_client_error(error: Exception) -> type[StorageError] | None:
    """Botocore's errors share no base class with OSError; told apart by name, not by import."""
    if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
        return None
    return AuthorizationError if "Credentials" in type(error).__name__ else TransientError
