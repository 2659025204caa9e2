"""Whether a copy is still at its destination, as it was made. Looks only.

/path, s3://bucket/prefix     its manifest, the sizes of its files, and their versions: where the
                              store says that one was written anew, or the digests are asked for,
                              every byte of every file
hf://org/repo[@branch]        what the step's tag leads to: a commit never changes
"""

from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import folder_of
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.copy_states import CopyState
from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import size_damage
from ray_ckpt.storage.hub.repository import content_at_tag
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.read_back import read_back
from ray_ckpt.storage.versions import fingerprint_of, infos_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What is known of a copy that was made."""

    content_id: str
    fingerprint: str = ""
    """What `storage.versions` said when it was known to be whole; empty where nobody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLook:
    """What was found, and where it differs."""

    state: CopyState
    why: str = ""
    fingerprint: str = ""
    """Of a copy that is present, where the store says any."""
    was_read: bool = False
    """Whether every byte was."""


def look_at_copy(
    publish: Action, made: Made, *, verify: Proof, progress: Progress = UNTOLD
) -> CopyLook:
    """What has become of the copy that `publish` made.

    Raises:
        StorageError: nobody could look: not reached, not allowed.
    """
    assert publish.destination is not None, "a publish action names where it went"
    try:
        if names.is_repository(publish.destination):
            return _look_on_hub(publish, made.content_id)
        return _look_at_root(publish, made, verify, progress)
    except ObjectNotFoundError as error:
        return CopyLook(state=CopyState.GONE, why=error.what.partition("\n")[0])


def _look_on_hub(publish: Action, content_id: str) -> CopyLook:
    tag, found = names.step_dir(publish.step), content_at_tag(publish)
    if found is None:
        return CopyLook(state=CopyState.GONE, why=f"there is no tag {tag}")
    if content_id not in found:
        return CopyLook(state=CopyState.STALE, why=f"the tag {tag} leads to something else")
    return CopyLook(state=CopyState.PRESENT)


def _look_at_root(publish: Action, made: Made, verify: Proof, progress: Progress) -> CopyLook:
    store, folder = open_catalog(str(publish.destination)).store, folder_of(publish)
    try:
        copy = manifest_in(store, folder)
    except IntegrityError as error:
        return CopyLook(state=CopyState.STALE, why=error.what)
    if copy is None:
        return CopyLook(state=CopyState.GONE, why="its manifest is not there")
    if copy.content_id != made.content_id:
        return CopyLook(state=CopyState.STALE, why="something else is there")
    infos = infos_in(store, folder)
    sizes = {name: info.size_bytes for name, info in infos.items()}
    damage = [text for entry in copy.files if (text := size_damage(entry, sizes))]
    fingerprint = fingerprint_of(infos, copy)
    is_read = not damage and (verify == "digests" or fingerprint != made.fingerprint)
    if is_read:
        damage = read_back(store, folder, copy, progress=progress)
    if damage:
        return CopyLook(state=CopyState.STALE, why="; ".join(damage), was_read=is_read)
    return CopyLook(state=CopyState.PRESENT, fingerprint=fingerprint, was_read=is_read)
