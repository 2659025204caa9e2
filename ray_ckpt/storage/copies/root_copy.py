"""A folder with a manifest is copied into another root: all of it or none of it.

    from S3 to the same S3    the service copies its files by itself, where it can
    else                      they come to this host, are proven, and go there

Where digests are to say that it is whole, every file is read back from there then. The manifest is
last: until then nobody sees anything of the copy.
"""

import uuid
from dataclasses import replace

from ray_ckpt.core import names
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.errors import IntegrityError, ObjectExistsError, UsageError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.cargo import Cargo, Published
from ray_ckpt.storage.copies.retire import finish_retiring
from ray_ckpt.storage.copies.server_copy import copy_on_server
from ray_ckpt.storage.digests import size_damage
from ray_ckpt.storage.lease import TRAINER, holder_of
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.proven import Origin, bring_all
from ray_ckpt.storage.read_back import read_back
from ray_ckpt.storage.room import expect_room
from ray_ckpt.storage.versions import fingerprint_of, infos_in


def copy_to_root(
    catalog: Catalog, cargo: Cargo, destination: str, *, verify: Proof, progress: Progress
) -> Published:
    """The copy is at `destination`, equal to what left; twice is harmless.

    Raises:
        ObjectExistsError: something else is there under its name; it is untouched.
        UsageError: the destination is the root itself, or a trainer saves checkpoints there.
        ForeignFolderError: somebody else's folder is in the place of a checkpoint.
        IntegrityError: the folder differs from its own manifest, or what was read back does, and
            nothing became visible; or the copy that is there was altered since it was made, and is
            untouched.
        StorageError: from the destination.
    """
    target = open_catalog(destination)
    location = f"{target.uri}/{cargo.folder}"
    if target.uri == catalog.uri:
        raise UsageError(
            f"{cargo.title} would be its own copy",
            location,
            "nothing was changed",
            "name another place with --to, or in the [[publish]] entry",
        )
    finish_retiring(target.store, cargo.folder)
    present = manifest_in(target.store, cargo.folder)
    if present is not None and present.content_id != cargo.manifest.content_id:
        raise _another(cargo, location)
    if present is not None:
        return _find(target, cargo, verify=verify, progress=progress)
    if names.parse_step(cargo.folder) is not None:
        _refuse_others_steps(target, cargo)
    published = _make(catalog, cargo, target, verify=verify, progress=progress)
    return replace(published, fingerprint=_check_files(target, cargo))


def _find(target: Catalog, cargo: Cargo, *, verify: Proof, progress: Progress) -> Published:
    """The copy that was there already, looked at as closely as is asked for."""
    location = f"{target.uri}/{cargo.folder}"
    fingerprint = _check_files(target, cargo)
    if verify == "sizes":
        return Published(location=location, bytes_sent=0)
    _refuse_altered(
        read_back(target.store, cargo.folder, cargo.manifest, progress=progress), location
    )
    return Published(location=location, bytes_sent=0, fingerprint=fingerprint)


def _refuse_others_steps(target: Catalog, cargo: Cargo) -> None:
    """Nothing, if the place of a checkpoint is free, and of no run that goes on there."""
    target.refuse_existing(cargo.manifest.step)
    trainer = holder_of(target.store, TRAINER)
    if trainer is not None:
        raise UsageError(
            f"process {trainer.pid} on {trainer.host} saves checkpoints of its own there",
            target.uri,
            "nothing was changed",
            "name a place where no run saves",
        )


def _make(
    catalog: Catalog, cargo: Cargo, target: Catalog, *, verify: Proof, progress: Progress
) -> Published:
    origin = Origin(
        store=catalog.store,
        folder=cargo.folder,
        safe="nothing was published; what it was made from is untouched",
        do=cargo.cure,
    )
    entries = cargo.manifest.files
    attempt = f"publish-{uuid.uuid4().hex}"
    staging = target.commit.staging(attempt)
    try:
        target.commit.begin(cargo.folder)
        progress.begin(f"copies {cargo.title} to {target.uri}", cargo.manifest.total_bytes)
        left = copy_on_server(origin, entries, target.store, progress=progress)
        sent_bytes = sum(entry.size_bytes for entry in left)
        # at the destination itself, or on this host's disk on the way there
        expect_room(staging, sent_bytes, what=f"a copy of {cargo.title}")
        bring_all(origin, left, staging, progress=progress)
        progress.begin(f"sends {cargo.title} to {target.uri}", sent_bytes)
        target.commit.contribute(staging, cargo.folder, progress=progress)
        if verify == "digests":
            at_root = target.commit.is_staging_shared
            arrived = names.staging_dir(attempt) if at_root else cargo.folder
            _expect_equal(target, arrived, cargo.manifest, progress)
        target.commit_folder(staging, cargo.folder, cargo.manifest)
    except BaseException:
        target.commit.discard(staging)
        raise
    return Published(
        location=f"{target.uri}/{cargo.folder}",
        bytes_sent=sent_bytes,
        bytes_copied=cargo.manifest.total_bytes - sent_bytes,
    )


def _expect_equal(target: Catalog, folder: str, manifest: Manifest, progress: Progress) -> None:
    damage = read_back(target.store, folder, manifest, progress=progress)
    if damage:
        raise IntegrityError(
            f"what was read back is not what was sent: {'; '.join(damage)}",
            target.uri,
            "nothing of the copy is visible; what it was made from is untouched",
            "look at the disk or the store there; then ray-ckpt retry ROOT --kind publish",
        )


def _another(cargo: Cargo, location: str) -> ObjectExistsError:
    return ObjectExistsError(
        f"another {cargo.title} is there",
        location,
        "it is untouched",
        "publish to another place; an export also under another --name",
    )


def _check_files(target: Catalog, cargo: Cargo) -> str:
    """The copy's fingerprint, if every file is there in its size.

    Raises:
        IntegrityError: the store has lost something, or somebody has altered the copy.
    """
    infos = infos_in(target.store, cargo.folder)
    sizes = {name: info.size_bytes for name, info in infos.items()}
    damage = [text for entry in cargo.manifest.files if (text := size_damage(entry, sizes))]
    _refuse_altered(damage, f"{target.uri}/{cargo.folder}")
    return fingerprint_of(infos, cargo.manifest)


def _refuse_altered(damage: list[str], location: str) -> None:
    if damage:
        raise IntegrityError(
            f"the copy is not what left: {'; '.join(damage)}",
            location,
            "what it was made from is untouched",
            "look at it and remove it there, then publish again",
        )
