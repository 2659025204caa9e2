"""A copy is gone from its destination, and nothing else is.

    <destination>/exports/<name>/step-<n>/            the manifest first: from then on no reader
                                                      counts the copy; then the files it lists
    .ray_ckpt/staging/exports/<name>/step-<n>.retired the manifest, while files are left

    <destination>/step-<n>/                           the same for a copy of a checkpoint, unless
    .ray_ckpt/staging/step-<n>.retired                somebody has pinned it there, or reads it

Whoever finds such a note, another attempt or the next copy to that place, ends what was begun.
"""

import time
from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import folder_of, is_copy_of
from ray_ckpt.core.errors import ObjectNotFoundError, PurgeRefusedError, UsageError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.listing import manifest_in, sizes_in
from ray_ckpt.storage.pins import read_pins
from ray_ckpt.storage.readers import readers_by_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """What was removed where."""

    place: str
    bytes_freed: int
    """0 if it was gone already."""


def retire_copy(root: str, publish: Action, *, content_id: str | None) -> Retired:
    """The copy that `publish` made is gone from its destination. Twice is harmless.

    `content_id` is the copy's own, by the record of the publish; None for a record that does not
    say: then the copy is known by the checkpoint it was made from and its recipe.

    Raises:
        UsageError: the destination is the run's own root, something else is there, or no newer
            copy of this run is; nothing was removed.
        PurgeRefusedError: somebody has pinned the checkpoint there, or reads it.
    """
    assert publish.destination is not None, "a publish action names where it went"
    store = open_catalog(publish.destination).store
    folder = folder_of(publish)
    freed = finish_retiring(store, folder)
    copy = manifest_in(store, folder)
    if copy is not None:
        if store.uri == open_catalog(root).uri:
            raise _refused("the destination is the run's own root", store, folder)
        if not is_copy_of(copy, publish) or content_id not in (None, copy.content_id):
            raise _refused("something else than was copied is there", store, folder)
        _refuse_the_newest(store, folder, copy)
        if publish.export is None:
            _refuse_the_needed(store, folder, copy.step)
        store.write(names.retired_key(folder), copy.to_json())
        store.delete([names.manifest_key(folder)])
        freed += finish_retiring(store, folder)
    return Retired(place=f"{store.uri}/{folder}", bytes_freed=freed)


def finish_retiring(store: Store, folder: str) -> int:
    """Bytes freed: nothing is left of a copy that somebody began to remove from `folder`."""
    note = names.retired_key(folder)
    try:
        manifest = Manifest.from_json(store.read(note), f"{store.uri}/{note}")
    except ObjectNotFoundError:
        return 0
    is_hidden = store.stat(names.manifest_key(folder)) is None
    if is_hidden:
        store.delete([f"{folder}/{entry.path}" for entry in manifest.files])
    store.delete([note])
    return manifest.total_bytes if is_hidden else 0


def _refuse_the_newest(store: Store, folder: str, copy: Manifest) -> None:
    """Nothing, if a newer copy of the same run is there in truth; looks at the newest first."""
    parent, slash, _ = folder.rpartition("/")
    found = {names.parse_step(name) for name in store.list_folders(parent)}
    if copy.step not in found:
        raise _refused("its folder is a symbolic link", store, folder)
    for step in sorted((s for s in found if s is not None and s > copy.step), reverse=True):
        newer = manifest_in(store, f"{parent}{slash}{names.step_dir(step)}")
        if newer is not None and newer.lineage.run_id == copy.lineage.run_id:
            return
    raise _refused("no newer copy of this run is there", store, folder)


def _refuse_the_needed(store: Store, folder: str, step: int) -> None:
    """Nothing, if nobody has pinned the copied checkpoint at its place, and nobody reads it."""
    now, pins = time.time(), read_pins(store, folder, sizes_in(store, folder))
    reasons = [
        *(f"it is pinned there: {pin.title}" for pin in pins if pin.holds(now)),
        *(f"it is read there: {who}" for who in readers_by_step(store).get(step, ())),
    ]
    if reasons:
        raise PurgeRefusedError(
            f"the copy is not removed: {'; '.join(reasons)}",
            f"{store.uri}/{folder}",
            "it was not touched",
            f"nothing, it goes later; or ray-ckpt unpin {store.uri} {step}",
        )


def _refused(why: str, store: Store, folder: str) -> UsageError:
    return UsageError(
        f"the copy is not removed: {why}",
        f"{store.uri}/{folder}",
        "nothing was removed",
        "look at what is there; remove it by hand, or take keep out of this [[publish]] entry",
    )
