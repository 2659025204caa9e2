"""A finished export reaches a place outside its root: all of it or none of it, and only once.

    /path, s3://bucket/prefix, hf://buckets/org/name/prefix
                                  <destination>/exports/<name>/step-<n>/, a root like any other
    hf://org/repo[@branch]        one commit, and the tag step-<n>

To add a kind of destination: a module of its own, and a line in `_PUBLISHERS`.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, ObjectExistsError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import describe_file, size_damage
from ray_ckpt.storage.hub import publish_to_hub
from ray_ckpt.storage.listing import manifest_in, sizes_in
from ray_ckpt.storage.posix import sync_file
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.retire import finish_retiring
from ray_ckpt.storage.room import expect_room


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where an export is now."""

    location: str
    """As a person opens it: a folder, a prefix, or a repository at a revision."""
    bytes_sent: int
    """0 if the very same export was there already."""


def publish_export(
    catalog: Catalog, export: ExportView, destination: str, *, progress: Progress = UNTOLD
) -> Published:
    """The export is at `destination`, proven equal to what left.

    A second run is harmless: the same content found at the destination is left as it is, and
    nothing is sent.

    Raises:
        ObjectExistsError: another export of that name and step is there; it is untouched.
        IntegrityError: the export differs from its own manifest, and nothing became visible; or
            the copy that is there was altered since it was made, and is untouched.
        AuthorizationError, TransientError, StorageFullError: from the destination.
    """
    is_root = "://" not in destination or destination.startswith(names.BUCKETS)
    scheme = "" if is_root else destination.partition("://")[0]
    publisher = _PUBLISHERS.get(scheme, _publish_to_root)
    return publisher(catalog, export, destination, progress)


def _publish_to_root(
    catalog: Catalog, export: ExportView, destination: str, progress: Progress
) -> Published:
    target = open_catalog(destination)
    folder = names.export_dir(export.name, export.step)
    location = f"{target.uri}/{folder}"
    finish_retiring(target.store, folder)
    present = manifest_in(target.store, folder)
    if present is not None and present.content_id == export.manifest.content_id:
        _check_files(target.store, export, location)
        return Published(location=location, bytes_sent=0)
    if present is not None:
        raise ObjectExistsError(
            f"another export {export.name} of step-{export.step} is there",
            location,
            "it is untouched",
            "publish under another --name, or to another place",
        )
    staging = target.commit.staging(f"publish-{uuid.uuid4().hex}")
    try:
        _expect_room(staging, export)
        copy_files(catalog.store, folder, export.manifest.files, staging, progress=progress)
        progress.begin(f"sends {export.name} to {destination}", export.manifest.total_bytes)
        target.commit.contribute(staging, folder, progress=progress)
        target.commit_export(staging, export.name, export.manifest)
    except BaseException:
        target.commit.discard(staging)
        raise
    _check_files(target.store, export, location)
    return Published(location=location, bytes_sent=export.manifest.total_bytes)


def _publish_to_hub(
    catalog: Catalog, export: ExportView, destination: str, progress: Progress
) -> Published:
    progress.begin(f"sends {export.name} to {destination}")  # its client counts for itself
    location, bytes_sent = publish_to_hub(catalog.store, export, destination, progress=progress)
    return Published(location=location, bytes_sent=bytes_sent)


def _expect_room(staging: Path, export: ExportView) -> None:
    """Before the first byte: at the destination itself, or on this host's disk on the way there."""
    what = f"a copy of {export.name} of step-{export.step}"
    expect_room(staging, export.manifest.total_bytes, what=what)


_PUBLISHERS: dict[str, Callable[[Catalog, ExportView, str, Progress], Published]] = {
    "hf": _publish_to_hub,
}


def copy_files(
    store: Store,
    folder: str,
    entries: tuple[FileEntry, ...],
    target: Path,
    *,
    progress: Progress = UNTOLD,
) -> None:
    """Local copies of these files below `target`, synced, each proven equal to its entry.

    Raises:
        IntegrityError: a file differs from its entry.
    """
    progress.begin(f"reads {folder}", 2 * sum(entry.size_bytes for entry in entries))
    for entry in entries:
        path = target / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download(f"{folder}/{entry.path}", path, progress=progress)
        sync_file(path)
        algorithm = entry.digest.partition(":")[0]
        found = describe_file(path, entry.path, algorithm, progress=progress)
        if found != entry:
            raise IntegrityError(
                f"{entry.path} is {found.digest}, its manifest says {entry.digest}",
                f"{store.uri}/{folder}",
                "nothing was published; the checkpoint it was made from is untouched",
                "remove the export's folder and export the step again",
            )


def _check_files(store: Store, export: ExportView, location: str) -> None:
    """Nothing, if every file is there in its size.

    Raises:
        IntegrityError: the store has lost something, or somebody has altered the copy.
    """
    sizes = sizes_in(store, names.export_dir(export.name, export.step))
    damage = [text for entry in export.manifest.files if (text := size_damage(entry, sizes))]
    if damage:
        raise IntegrityError(
            f"the copy is not what left: {'; '.join(damage)}",
            location,
            "the export it was made from is untouched",
            "look at it and remove it there, then publish again",
        )
