"""A bucket on the Hugging Face Hub as a store: `hf://buckets/org/name/prefix`.

Each object appears whole, when its bytes are there and a batch has named them. What a bucket lacks
is a condition: of two who create one object both succeed. So it takes copies, each with one writer
and its manifest last; it is no root, whose leases need exactly one winner. It keeps no history:
what is replaced or deleted is gone.

Everything goes by Xet, of which a bucket has nothing else: what is there is not sent again.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    UsageError,
)
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.hub.client import hub_api
from ray_ckpt.storage.hub.errors import translated
from ray_ckpt.storage.name_objects import point_by_object, pointed_by_object
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.ranged_file import open_ranged, read_into_each

_BLOCK_BYTES = 1 << 20
_BEYOND = 416
_READS_AT_ONCE = 8


class BucketStore:
    """Objects under `hf://buckets/org/name/prefix`. Holds nothing but names: it may be pickled."""

    def __init__(self, uri: str) -> None:
        """`uri` names a bucket, and may name a prefix in it.

        Raises:
            UsageError: it names no bucket.
        """
        parts = [part for part in uri.removeprefix(names.BUCKETS).split("/") if part]
        if len(parts) < 2:
            raise UsageError(f"{uri!r} names no bucket", do="write hf://buckets/ORG/NAME/PREFIX")
        self._bucket = "/".join(parts[:2])
        self._prefix = "/".join(parts[2:])
        self._uri = names.BUCKETS + "/".join(parts)

    @property
    def uri(self) -> str:
        """`hf://buckets/org/name/prefix`."""
        return self._uri

    def read(self, key: str) -> bytes:
        """One GET."""
        with translated(self._where(key)):
            return self._get(key).content

    def open_read(self, key: str) -> BinaryIO:
        """A look at its size, then ranged GETs, read ahead in blocks."""
        info = self.stat(key)
        if info is None:
            raise self._missing(key)
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
            return
        with translated(self._where(key)):
            answer = self._get(key, Range=f"bytes={offset}-{end - 1}")
        data = b"" if answer.status_code == _BEYOND else answer.content
        if len(data) != buffer.nbytes:
            raise IntegrityError(f"ends before byte {end}", self._where(key))
        buffer.cast("B")[:] = data

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One ranged GET."""
        read_into_each(partial(self.read_into, key), offset, buffers)

    def write(self, key: str, data: bytes) -> None:
        """Sent, then named by one batch."""
        self._batch(key, add=[(data, self._path(key))])

    def create(self, key: str, data: bytes) -> None:
        """Looks, then writes: enough where one writer is. The very same bytes count as ours.

        Raises:
            ObjectExistsError: something is there.
            UsageError: for what several may want to create at once, as they do in a root.
        """
        if key.startswith(f"{names.PRIVATE}/"):
            self._refuse_to_be_a_root(key)
        if self.stat(key) is not None and self.read(key) != data:
            raise ObjectExistsError("something is there already", self._where(key))
        self.write(key, data)

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """Sent in chunks, of which those that are there are left out; then named by one batch."""
        self._batch(key, add=[(str(source), self._path(key))])
        progress.advance(source.stat().st_size)

    @property
    def begins_on_disk(self) -> bool:
        """Nothing is begun here."""
        return False

    def begin(self, key: str, size_bytes: int) -> NoReturn:
        """An export is made in a root.

        Raises:
            UsageError: always.
        """
        self._refuse_to_be_a_root(key)

    def copy(self, source: str, target: str) -> None:
        """By the name of its content: no byte is sent."""
        found = self._info(source)
        if found is None:
            raise self._missing(source)
        copied = ("bucket", self._bucket, found.xet_hash, self._path(target))
        self._batch(target, copy=[copied])

    def take_over(
        self, source: str, target: str, entry: FileEntry, *, mark: str | None
    ) -> NoReturn:
        """Nobody here can tell what was copied.

        Raises:
            StorageError: always.
        """
        raise StorageError("computes no checksum of what it copies", self._where(source))

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """By Xet, beside the target until it is whole."""
        found = self._info(key)
        if found is None:
            raise self._missing(key)
        with tempfile.TemporaryDirectory(prefix=".ray_ckpt-", dir=target.parent) as folder:
            arriving = Path(folder) / "file"
            with translated(self._where(key)):
                _api().download_bucket_files(self._bucket, [(found, arriving)])
            arriving.replace(target)
        progress.advance(found.size)

    def point(self, key: str, name: str) -> None:
        """One small object."""
        point_by_object(self, key, name)

    def pointed(self, key: str) -> str | None:
        """Its text, if that is one word."""
        return pointed_by_object(self, key)

    def stat(self, key: str) -> ObjectInfo | None:
        """One request; a prefix is not an object."""
        found = self._info(key)
        return None if found is None else self._described(found)

    def mark(self, key: str) -> str | None:
        """None: it would be a request for every key."""
        return None

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """One request for each page."""
        start = self._inside(folder) + prefix
        for entry in self._tree(folder, recursive=True):
            if entry.type == "file" and entry.path.startswith(start):
                yield self._described(entry)

    def list_folders(self, folder: str) -> list[str]:
        """Names of what holds something."""
        start = self._inside(folder)
        found = (e for e in self._tree(folder, recursive=False) if e.path.startswith(start))
        return sorted(
            {
                entry.path.removeprefix(start).partition("/")[0]
                for entry in found
                if _holds(entry, start)
            }
        )

    def free_bytes(self) -> int | None:
        """A bucket has no end that anybody could ask for."""
        return None

    def weaknesses(self) -> tuple[()]:
        """None that matters to copies: it is no root."""
        return ()

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """None: chunks that nothing names are the Hub's to remove."""
        return []

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """Nothing to do."""

    def delete(self, keys: Sequence[str]) -> None:
        """The first object by itself, so that a marker is gone before the rest."""
        for batch in (keys[:1], keys[1:]):
            present = [entry.path for entry in self._paths([self._path(key) for key in batch])]
            if present:
                self._batch(batch[0], delete=present)

    def _batch(self, key: str, **changes: Any) -> None:
        with translated(self._where(key)):
            _api().batch_bucket_files(self._bucket, **changes)

    def _get(self, key: str, **headers: str) -> Any:
        """The answer; also the one that says that a range begins behind the end."""
        from huggingface_hub import utils

        library: Any = utils
        url = f"{_api().endpoint}/buckets/{self._bucket}/resolve/{quote(self._path(key))}"
        own = {**library.build_hf_headers(), "Accept-Encoding": "identity", **headers}
        answer = library.http_backoff("GET", url, headers=own, follow_redirects=True)
        if answer.status_code == 404 and answer.headers.get("X-Error-Code") == "EntryNotFound":
            raise self._missing(key)
        if answer.status_code != _BEYOND:
            library.hf_raise_for_status(answer)
        return answer

    def _tree(self, folder: str, *, recursive: bool) -> Iterator[Any]:
        with translated(self._where(folder)):
            prefix = self._path(folder) or None
            yield from _api().list_bucket_tree(self._bucket, prefix, recursive=recursive)

    def _info(self, key: str) -> Any | None:
        return next(iter(self._paths([self._path(key)])), None)

    def _paths(self, paths: Sequence[str]) -> list[Any]:
        with translated(self._uri):
            return list(_api().get_bucket_paths_info(self._bucket, paths))

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self._prefix, key) if part)

    def _inside(self, folder: str) -> str:
        """How the paths of what lies in the folder begin."""
        return f"{self._path(folder)}/".lstrip("/")

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._prefix}/") if self._prefix else path

    def _where(self, key: str) -> str:
        return f"{self._uri}/{key}"

    def _described(self, entry: Any) -> ObjectInfo:
        moment = entry.uploaded_at or entry.mtime
        at = moment.timestamp() if moment else 0.0
        return ObjectInfo(
            key=self._key(entry.path),
            size_bytes=entry.size,
            modified_at=at,
            version=f"{entry.xet_hash} {at}",
        )

    def _missing(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(
            "not there", self._where(key), do="check the bucket and the prefix"
        )

    def _refuse_to_be_a_root(self, key: str) -> NoReturn:
        raise UsageError(
            "a bucket on the Hub takes copies and is no root: it knows no conditional write",
            self._where(key),
            "nothing was written",
            "save to a path or s3://, and copy to the bucket: ray-ckpt publish ROOT --to ...",
        )


def _api() -> Any:
    api = hub_api()
    if not hasattr(api, "batch_bucket_files"):
        raise UsageError(
            "this huggingface_hub knows no buckets", do="pip install -U huggingface_hub hf_xet"
        )
    return api


def _holds(entry: Any, start: str) -> bool:
    return entry.type == "directory" or "/" in entry.path.removeprefix(start)
