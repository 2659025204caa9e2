"""Whether a copy is still at its destination, as it was made. Looks only.

/path, s3://bucket/prefix     its manifest, then every byte of every file
hf://org/repo[@branch]        what the step's tag leads to: a commit never changes
"""

from dataclasses import dataclass
from enum import StrEnum

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import folder_of
from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import find_damage
from ray_ckpt.storage.hub import content_at_tag
from ray_ckpt.storage.listing import manifest_in


class CopyState(StrEnum):
    """What became of a copy."""

    PRESENT = "present"
    STALE = "stale"
    """Something else is there: it was altered, moved or replaced."""
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLook:
    """What was found, and where it differs."""

    state: CopyState
    why: str = ""


def look_at_copy(publish: Action, *, content_id: str) -> CopyLook:
    """What has become of the copy that `publish` made of what has this content.

    Raises:
        StorageError: nobody could look: not reached, not allowed.
    """
    assert publish.destination is not None, "a publish action names where it went"
    try:
        if names.is_repository(publish.destination):
            return _look_on_hub(publish, content_id)
        return _look_at_root(publish, content_id)
    except ObjectNotFoundError as error:
        return CopyLook(state=CopyState.GONE, why=error.what.partition("\n")[0])


def _look_on_hub(publish: Action, content_id: str) -> CopyLook:
    tag, found = names.step_dir(publish.step), content_at_tag(publish)
    if found is None:
        return CopyLook(state=CopyState.GONE, why=f"there is no tag {tag}")
    if content_id not in found:
        return CopyLook(state=CopyState.STALE, why=f"the tag {tag} leads to something else")
    return CopyLook(state=CopyState.PRESENT)


def _look_at_root(publish: Action, content_id: str) -> CopyLook:
    store, folder = open_catalog(str(publish.destination)).store, folder_of(publish)
    try:
        copy = manifest_in(store, folder)
    except IntegrityError as error:
        return CopyLook(state=CopyState.STALE, why=error.what)
    if copy is None:
        return CopyLook(state=CopyState.GONE, why="its manifest is not there")
    if copy.content_id != content_id:
        return CopyLook(state=CopyState.STALE, why="something else is there")
    damage = find_damage(store, folder, copy)
    state = CopyState.STALE if damage else CopyState.PRESENT
    return CopyLook(state=state, why="; ".join(damage))
