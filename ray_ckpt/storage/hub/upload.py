"""Files of an export on their way to the Hub: sent one by one, and seen by nobody.

    large    sent by itself, at any time before the commit: the Hub keeps it by its SHA-256
    small    goes with the commit

A file that the Hub has already is not sent again, whoever sent it. Of a store that is no local disk
each large one is fetched, sent and removed: no copy of the whole export lies on this host.
"""

import contextlib
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import STRONG_ALGORITHM
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.hub.client import hub_api, parse_hub
from ray_ckpt.storage.hub.errors import translated
from ray_ckpt.storage.parts import Part
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.room import expect_room

_SMALL_BYTES = 16 << 20
"""The Hub takes what has more than 10 MiB for large, whatever it is."""
_FILES_AT_ONCE = 2
"""While one is read for its SHA-256 another is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """From where to where files go."""

    api: Any
    """A `huggingface_hub.HfApi`."""
    repository: str
    branch: str
    store: Store

    def addition(self, entry: FileEntry, key: str) -> Any:
        """What adds the file under `key` to a commit; if it is large, the Hub has it now.

        Raises:
            IntegrityError: it is not the file that its entry describes.
        """
        if entry.size_bytes < _SMALL_BYTES:
            return self._proven(self.store.read(key), entry, key)
        with self._on_this_host(key, entry.size_bytes) as path:
            addition = self._proven(str(path), entry, key)
            self.send(addition)
        return addition

    def send(self, addition: Any) -> None:
        """The Hub has the file, if it is one of those that do not go with a commit."""
        self.api.preupload_lfs_files(self.repository, additions=[addition], revision=self.branch)

    def _proven(self, content: bytes | str, entry: FileEntry, key: str) -> Any:
        from huggingface_hub import CommitOperationAdd  # heavy, and needed for hf:// only

        addition = CommitOperationAdd(path_in_repo=entry.path, path_or_fileobj=content)
        found = f"{STRONG_ALGORITHM}:{addition.upload_info.sha256.hex()}"
        if (found, addition.upload_info.size) != (entry.digest, entry.size_bytes):
            raise IntegrityError(
                f"{entry.path} is {found}, its manifest says {entry.digest}",
                f"{self.store.uri}/{key}",
                "nothing was published; the checkpoint it was made from is untouched",
                "remove the export's folder and export the step again",
            )
        return addition

    @contextlib.contextmanager
    def _on_this_host(self, key: str, size_bytes: int) -> Generator[Path]:
        if isinstance(self.store, LocalStore):
            yield self.store.path(key)
            return
        with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as folder:
            expect_room(Path(folder), size_bytes, what=f"{key} on its way to the Hub")
            path = Path(folder) / "file"
            self.store.download(key, path)
            yield path


def sent(upload: Upload, export: ExportView, *, progress: Progress) -> list[Any]:
    """What adds every file of an export and its manifest to a commit; large files are there.

    Raises:
        IntegrityError: a file differs from the export's manifest.
    """
    from huggingface_hub import CommitOperationAdd

    folder = names.export_dir(export.name, export.step)

    def send(entry: FileEntry) -> Any:
        addition = upload.addition(entry, f"{folder}/{entry.path}")
        progress.advance(entry.size_bytes)
        return addition

    additions = at_once(send, export.manifest.files, num_threads=_FILES_AT_ONCE)
    manifest = CommitOperationAdd(names.MANIFEST, export.manifest.to_json())
    return [*additions, manifest]


def send_to_hub(store: Store, part: Part, destination: str) -> None:
    """The Hub has a finished file of an export, for the commit that will show it.

    A second run is harmless: what is there is not sent again.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError, StorageFullError
        IntegrityError: it is not what was written.
    """
    repository, branch = parse_hub(destination)
    with translated(destination):
        upload = Upload(api=hub_api(), repository=repository, branch=branch, store=store)
        addition = upload.addition(part.entry, part.key)
        upload.send(addition)
