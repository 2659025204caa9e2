"""A file arrives from a store and is the one that its manifest describes, or it is not there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import algorithm_of, describe_file, digest_of
from ray_ckpt.storage.disk.posix import sync_file, write_synced
from ray_ckpt.storage.progress import UNTOLD, Progress

_SMALL_BYTES = 128 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A folder that files come from, and what is told where one of them is damaged."""

    store: Store
    folder: str
    safe: str
    do: str

    def damaged(self, entry: FileEntry, digest: str) -> IntegrityError:
        """The error for a file whose bytes have another digest than its manifest says."""
        return IntegrityError(
            f"{entry.path} is {digest}, its manifest says {entry.digest}",
            f"{self.store.uri}/{self.folder}",
            self.safe,
            self.do,
        )


def bring_all(
    origin: Origin, entries: Sequence[FileEntry], target: Path, *, progress: Progress = UNTOLD
) -> None:
    """Below `target` lie the files of these entries, synced, each equal to its own.

    Of large files as many come at once as the store is good for; small ones wait for answers most
    of their time, and to be synced.

    Raises:
        IntegrityError: what came differs.
    """
    progress.begin(f"reads {origin.folder}", 2 * sum(entry.size_bytes for entry in entries))
    small = [entry for entry in entries if entry.size_bytes <= _SMALL_BYTES]
    large = [entry for entry in entries if entry.size_bytes > _SMALL_BYTES]
    for parent in {(target / entry.path).parent for entry in entries}:
        parent.mkdir(parents=True, exist_ok=True)
    at_once(partial(_bring_small, origin, target=target, progress=progress), small)
    at_once(
        partial(_bring, origin, target=target, progress=progress),
        large,
        num_threads=origin.store.reads_at_once,
    )


def _bring(origin: Origin, entry: FileEntry, *, target: Path, progress: Progress) -> None:
    """The file is there, synced and equal to its entry.

    Its bytes are told of twice: once they were read, and once they were proven.

    Raises:
        IntegrityError: what came differs; it was removed.
    """
    path = target / entry.path
    origin.store.download(_key(origin, entry), path, progress=progress)
    found = describe_file(path, entry.path, algorithm_of(entry), progress=progress)
    if found != entry:
        path.unlink()
        raise origin.damaged(entry, found.digest)
    sync_file(path)


def _bring_small(origin: Origin, entry: FileEntry, *, target: Path, progress: Progress) -> None:
    """The same, proven before it is written."""
    data = origin.store.read(_key(origin, entry))
    digest = digest_of(data, algorithm_of(entry))
    if (len(data), digest) != (entry.size_bytes, entry.digest):
        raise origin.damaged(entry, digest)
    write_synced(target / entry.path, data)
    progress.advance(2 * entry.size_bytes)


def _key(origin: Origin, entry: FileEntry) -> str:
    return f"{origin.folder}/{entry.path}"
