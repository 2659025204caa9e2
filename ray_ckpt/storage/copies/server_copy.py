"""Files of a folder go from one prefix of an S3 service to another, and the service copies them.

Each is proven equal to its entry before anybody counts it: by the checksum that the service has
computed of what it copied, or else by reading it back. What is there and equal, from an attempt
that died, is not copied again.
"""

import logging
import threading
from collections.abc import Sequence

from ray_ckpt.core.errors import StorageError, StorageFullError, TransientError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import algorithm_of, describe_object
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.proven import Origin
from ray_ckpt.storage.s3.store import S3Store

log = logging.getLogger("ray_ckpt")
_FILES_AT_ONCE = 4
"""Each in several parts, if it is large."""


def copy_on_server(
    origin: Origin, entries: Sequence[FileEntry], target: Store, *, progress: Progress
) -> list[FileEntry]:
    """What the service has not copied; all else is below the same folder of `target`, and equal.

    Everything, where the two are not on one service that copies; then the log says why.

    Raises:
        IntegrityError: a file differs from its entry.
        TransientError, StorageFullError: another try may do.
    """
    if not isinstance(origin.store, S3Store) or not isinstance(target, S3Store):
        return list(entries)
    copying = _Copying(origin, origin.store, target, progress)
    is_there = at_once(copying.bring, entries, num_threads=_FILES_AT_ONCE)
    return [entry for entry, there in zip(entries, is_there, strict=True) if not there]


class _Copying:
    def __init__(
        self, origin: Origin, source: S3Store, target: S3Store, progress: Progress
    ) -> None:
        self._origin = origin
        self._source = source
        self._target = target
        self._progress = progress
        self._is_refused = threading.Event()
        self._telling = threading.Lock()

    def bring(self, entry: FileEntry) -> bool:
        """Whether the file is there now, equal to its entry; else the service would not copy it."""
        if self._found(entry) != entry.digest:
            if not self._copy(entry):
                return False
            found = self._found(entry)
            if found != entry.digest:
                raise self._origin.damaged(entry, found or "of another size")
        self._progress.advance(entry.size_bytes)
        return True

    def _copy(self, entry: FileEntry) -> bool:
        if self._is_refused.is_set():
            return False
        key = self._key(entry)
        try:
            self._target.copy_from(self._source, key, entry)
        except (TransientError, StorageFullError):
            raise
        except StorageError as error:
            self._refused(key, error)
            return False
        return True

    def _refused(self, key: str, error: StorageError) -> None:
        """Told once, also where several files are refused at the same moment."""
        with self._telling:
            if not self._is_refused.is_set():
                log.warning(
                    "%s is not copied there by the store, its bytes go through this host: %s",
                    f"{self._source.uri}/{key}",
                    error.what,
                )
            self._is_refused.set()

    def _found(self, entry: FileEntry) -> str | None:
        """Digest of what is there, as far as it can be the file; its bytes are read at need."""
        key = self._key(entry)
        says = self._target.is_equal(key, entry)
        if says is None:
            algorithm = algorithm_of(entry)
            found = describe_object(self._target, key, name=entry.path, algorithm=algorithm)
            return found.digest
        return entry.digest if says else None

    def _key(self, entry: FileEntry) -> str:
        return f"{self._origin.folder}/{entry.path}"
