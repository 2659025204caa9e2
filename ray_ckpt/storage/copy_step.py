"""A whole checkpoint lies at another place as well: a root of its own, from which a run can resume.

    /path, s3://bucket/prefix, hf://buckets/org/name/prefix     <destination>/step-<n>/

Its manifest is the last that is written there, and the same bytes as here.
"""

import uuid
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, StepExistsError, UsageError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import size_damage
from ray_ckpt.storage.listing import manifest_in, sizes_in
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.publish import Published, copy_files
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.room import expect_room


def copy_step(
    catalog: Catalog, step: int, destination: str, *, progress: Progress = UNTOLD
) -> Published:
    """The checkpoint is at `destination`, equal to what is here; meanwhile no purge takes it.

    A second run is harmless: the same content found there is left as it is, and nothing is sent.

    Raises:
        UsageError: the destination is a repository, or this root itself.
        StepExistsError, ForeignFolderError: something else is there; it is untouched.
        IntegrityError: a file differs from the manifest; nothing became visible.
        AuthorizationError, TransientError, StorageFullError: from the destination.
    """
    if names.is_repository(destination):
        raise UsageError(
            "a repository takes models, and a checkpoint is none",
            destination,
            "nothing was copied",
            "name an export with --name, or copy to a path, s3:// or hf://buckets/ORG/NAME",
        )
    target = open_catalog(destination)
    with reading(catalog.store, step, who=f"copy to {target.uri}"):
        manifest = catalog.manifest(step)
        location = f"{target.uri}/{names.step_dir(step)}"
        if _is_there(target, manifest, location):
            return Published(location=location, bytes_sent=0)
        _copy(catalog, target, manifest, progress)
    _expect_whole(target, manifest, location)
    return Published(location=location, bytes_sent=manifest.total_bytes)


def _is_there(target: Catalog, manifest: Manifest, location: str) -> bool:
    present = manifest_in(target.store, names.step_dir(manifest.step))
    if present is None:
        target.refuse_existing(manifest.step)
        return False
    if present.content_id != manifest.content_id:
        raise StepExistsError(
            f"another save of step-{manifest.step} is there",
            location,
            "it is untouched",
            "copy to another place",
        )
    _expect_whole(target, manifest, location)
    return True


def _copy(catalog: Catalog, target: Catalog, manifest: Manifest, progress: Progress) -> None:
    folder = names.step_dir(manifest.step)
    target.commit.clear(folder)
    staging: Path = target.commit.staging(f"publish-{uuid.uuid4().hex}")
    try:
        expect_room(staging, manifest.total_bytes, what=f"a copy of {folder}")
        copy_files(catalog.store, folder, manifest.files, staging, progress=progress)
        progress.begin(f"sends {folder} to {target.uri}", manifest.total_bytes)
        target.commit.contribute(staging, folder, progress=progress)
        target.commit_step(staging, manifest)
    except BaseException:
        target.commit.discard(staging)
        raise


def _expect_whole(target: Catalog, manifest: Manifest, location: str) -> None:
    sizes = sizes_in(target.store, names.step_dir(manifest.step))
    damage = [text for entry in manifest.files if (text := size_damage(entry, sizes))]
    if damage:
        raise IntegrityError(
            f"the copy is not what left: {'; '.join(damage)}",
            location,
            "the checkpoint it was made from is untouched",
            "look at it and remove it there, then copy again",
        )
