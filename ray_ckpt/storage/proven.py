"""A file arrives from a store and is the one that its manifest describes, or it is not there."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import describe_file
from ray_ckpt.storage.disk.posix import sync_file
from ray_ckpt.storage.progress import UNTOLD, Progress


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

    As many come at once as the store is good for.

    Raises:
        IntegrityError: what came differs.
    """
    progress.begin(f"reads {origin.folder}", 2 * sum(entry.size_bytes for entry in entries))

    def bring(entry: FileEntry) -> None:
        _bring(origin, entry, target, progress)

    with ThreadPoolExecutor(origin.store.reads_at_once, "ray_ckpt files") as threads:
        # after an error what has begun ends, the rest never begins
        list(threads.map(bring, entries))


def _bring(origin: Origin, entry: FileEntry, target: Path, progress: Progress = UNTOLD) -> None:
    """Below `target` lies the file of this entry, synced and equal to it.

    Its bytes are told of twice: once they were read, and once they were proven.

    Raises:
        IntegrityError: what came differs; it was removed.
    """
    path = target / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    origin.store.download(f"{origin.folder}/{entry.path}", path, progress=progress)
    found = describe_file(path, entry.path, algorithm_of(entry), progress=progress)
    if found != entry:
        path.unlink()
        raise origin.damaged(entry, found.digest)
    sync_file(path)


def algorithm_of(entry: FileEntry) -> str:
    """By which its digest was made."""
    return entry.digest.partition(":")[0]
