"""The verbs a backend must have. Knows nothing of checkpoints.

Adding a backend: one file with a class that has these methods, one line in `storage.backends`;
`tests/storage/test_store_contract.py` then runs over it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ray_ckpt.core.findings import Finding
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.progress import UNTOLD, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size_bytes: int
    modified_at: float
    """Seconds since the epoch, by the store's clock."""
    version: str = ""
    """Another one for every object that ever lay under this key, as far as the store can tell."""
    shared: str = ""
    """The same for all keys that lead to the same bytes; empty for an object that has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedWrite:
    """An object that somebody has begun to write; no reader sees it, and no listing of objects."""

    key: str
    """Where it is to be seen once it is whole; on a disk, where its bytes are until then."""
    size_bytes: int
    """So many of it have arrived."""
    changed_at: float
    """When the last of them did, in seconds since the epoch, by the store's clock."""
    token: str = ""
    """What the store itself knows it by."""


class Blocks(Protocol):
    """Where the bytes of one object go; nobody sees it before `finish`."""

    @property
    def block_bytes(self) -> int:
        """Of every block but the last one."""
        ...

    @property
    def puts_at_once(self) -> int:
        """So many blocks are sent side by side."""
        ...

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """Sends the first `num_bytes` of one block; blocks are numbered from 0 on."""
        ...

    def finish(self, size_bytes: int) -> None:
        """All blocks were sent: the object is there, durable; it has so many bytes."""
        ...

    def abandon(self) -> None:
        """Nothing is left of it. Twice is harmless."""
        ...


class Ranges(Protocol):
    """What can be read in pieces."""

    @property
    def uri(self) -> str:
        """The root as a person types it, without a slash at the end."""
        ...

    @property
    def reads_at_once(self) -> int:
        """So many reads side by side are faster than one after the other."""
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """The bytes from `offset` on, as many as there is room for in the buffer.

        Raises:
            IntegrityError: the object ends before.
        """
        ...

    def read_into_each(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """The bytes from `offset` on, into one buffer after the other; one read.

        Raises:
            IntegrityError: the object ends before.
        """
        ...


class Store(Ranges, Protocol):
    """Objects under "/"-separated string keys, relative to one root.

    A key is a `str` and never a `Path`: `Path("s3://a")` is `s3:/a`. Every method may raise
    TransientError, AuthorizationError or StorageFullError. A missing key is ObjectNotFoundError,
    except that deleting it is no error.
    """

    def read(self, key: str) -> bytes:
        """The whole object; meant for small ones."""
        ...

    def open_read(self, key: str) -> BinaryIO:
        """A seekable stream over the object, for reading; the caller closes it."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, durable when this returns; readers see the old or the new."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Like `write`, but only if nothing is there; of several at once exactly one succeeds.

        Raises:
            ObjectExistsError: something is there.
        """
        ...

    def upload(self, source: Path, key: str, *, progress: Progress = UNTOLD) -> None:
        """Stream a local file of any size to `key`; readers see all of it or none."""
        ...

    @property
    def begins_on_disk(self) -> bool:
        """Whether what is begun lies on a disk of this host until it is whole, and is sent then."""
        ...

    def begin(self, key: str, size_bytes: int) -> Blocks:
        """A new object of about that size, to be written block by block; see `ordered_write`."""
        ...

    def copy(self, source: str, target: str) -> None:
        """The object is under `target` too, replacing what was there; no byte passes through here.

        Raises:
            ObjectNotFoundError: there is no `source`.
        """
        ...

    def take_over(self, source: str, target: str, entry: FileEntry, *, mark: str | None) -> None:
        """What `entry` describes is under `target` too, where nothing was; `source` may go any day.

        No byte passes through here: both names lead to the same bytes on a disk, and an object
        store has copied and digested them itself. Durable like a write.

        Raises:
            ObjectNotFoundError: under `source` is nothing, or not what it was when its `mark` was
                taken, or it is damaged. Nothing is under `target`.
            StorageError: the store does not do it, or cannot tell what it has copied. Likewise.
        """
        ...

    def download(self, key: str, target: Path, *, progress: Progress = UNTOLD) -> None:
        """Stream the object into a local file, replacing it."""
        ...

    def point(self, key: str, name: str) -> None:
        """`key` leads to what lies as `name` beside it, from one moment to the next; durable.

        A symbolic link where there are folders, else an object whose text is the name. Replaces
        what `point` made before.

        Raises:
            ObjectExistsError: something is there that is no such thing; it is untouched.
        """
        ...

    def pointed(self, key: str) -> str | None:
        """The name that `key` leads to, as `point` said; None if nothing is there.

        Raises:
            ObjectExistsError: something is there that leads nowhere.
        """
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """What is under `key`, or None."""
        ...

    def mark(self, key: str) -> str | None:
        """Another text once the object, or the entries of the folder, at `key` have changed.

        Empty where nothing is. None, always, if only a request to another machine could tell.
        """
        ...

    def list_objects(self, folder: str, *, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below `folder`, at any depth, in no order; none if the folder is absent.

        With a `prefix`, only what lies under names directly in `folder` that start with it.
        """
        ...

    def list_folders(self, folder: str) -> list[str]:
        """Names directly below `folder` that hold something, sorted. `""` is the root itself."""
        ...

    def free_bytes(self) -> int | None:
        """So many bytes can still be written; None where nobody can say."""
        ...

    def weaknesses(self) -> Sequence[Finding]:
        """What it does not do that is relied on, and what is done instead; one look, remembered."""
        ...

    def list_unfinished(self, folder: str) -> list[UnfinishedWrite]:
        """Every write below `folder`, at any depth, that has begun and has not ended."""
        ...

    def abandon(self, writes: Sequence[UnfinishedWrite]) -> None:
        """They never end, and hold no bytes any more; one that has ended meanwhile is no error."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects in the order given; absent ones are no error.

        Raises:
            UsageError: a key leaves the root, or a symbolic link is on its way; nothing is removed
                through it.
        """
        ...
