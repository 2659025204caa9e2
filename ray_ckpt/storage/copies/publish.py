"""An export or a checkpoint reaches a place outside its root: all of it or none of it, and once.

                                  an export                                a checkpoint
    /path, s3://bucket/prefix,
    hf://buckets/org/name         <destination>/exports/<name>/step-<n>/   <destination>/step-<n>/
    hf://org/repo[@branch]        one commit, and the tag step-<n>         refused

A path or a prefix is a root like any other then.
"""

from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.copy_policy import INSTEAD_OF_HUB, NOT_ON_HUB, Proof
from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.cargo import Published, cargo_of, cargo_of_checkpoint
from ray_ckpt.storage.copies.root_copy import copy_to_root
from ray_ckpt.storage.hub.client import parse_hub
from ray_ckpt.storage.hub.repository import publish_to_hub
from ray_ckpt.storage.progress import UNTOLD, Progress


def publish_export(
    catalog: Catalog,
    export: ExportView,
    destination: str,
    *,
    verify: Proof = "sizes",
    progress: Progress = UNTOLD,
) -> Published:
    """The export is at `destination`, proven equal to what left.

    A second run is harmless: the same content found at the destination is left as it is, and
    nothing is sent.

    Raises:
        ObjectExistsError: another export of that name and step is there; it is untouched.
        UsageError: the destination is the export's own root.
        IntegrityError: the export differs from its own manifest, or what was read back from the
            destination does, and nothing became visible; or the copy that is there was altered
            since it was made, and is untouched.
        AuthorizationError, TransientError, StorageFullError: from the destination.
    """
    publish = _publish_to_hub if names.is_repository(destination) else _publish_to_root
    return publish(catalog, export, destination, verify, progress)


def publish_checkpoint(
    catalog: Catalog,
    manifest: Manifest,
    destination: str,
    *,
    verify: Proof = "sizes",
    progress: Progress = UNTOLD,
) -> Published:
    """The checkpoint of this manifest is at `destination`, from where `load` and `fetch` read it.

    A second run is harmless, as for an export.

    Raises:
        UsageError: the destination is the root itself, or the Hub, or a trainer saves there.
        ForeignFolderError: somebody else's folder is in its place; it is untouched.
        ObjectExistsError, IntegrityError, AuthorizationError, TransientError, StorageFullError: as
            for an export.
    """
    refuse_hub(destination)
    cargo = cargo_of_checkpoint(manifest, catalog.uri)
    return copy_to_root(catalog, cargo, destination, verify=verify, progress=progress)


def refuse_no_place(destination: str) -> None:
    """Nothing, if its name could be a destination's; nobody is asked there.

    Must come before anything is asked for: whatever is asked is tried, and recorded.

    Raises:
        UsageError: it is no place for copies.
    """
    if names.is_repository(destination):
        parse_hub(destination)
        return
    uri = open_catalog(destination).uri
    if Path(uri).is_file():
        raise UsageError(
            "a file is here, and no folder", uri, "nothing was sent", "name another place"
        )


def refuse_hub(destination: str) -> None:
    """Nothing, if a checkpoint may be copied there.

    Raises:
        UsageError: it is on the Hub.
    """
    if names.is_repository(destination):
        raise UsageError(NOT_ON_HUB, destination, "nothing was sent", INSTEAD_OF_HUB)


def _publish_to_root(
    catalog: Catalog, export: ExportView, destination: str, verify: Proof, progress: Progress
) -> Published:
    return copy_to_root(catalog, cargo_of(export), destination, verify=verify, progress=progress)


def _publish_to_hub(
    catalog: Catalog, export: ExportView, destination: str, verify: Proof, progress: Progress
) -> Published:
    progress.begin(f"sends {export.name} to {destination}")  # its client counts for itself
    location, bytes_sent = publish_to_hub(
        catalog.store, export, destination, verify=verify, progress=progress
    )
    return Published(location=location, bytes_sent=bytes_sent)
