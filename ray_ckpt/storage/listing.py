"""What one folder holds, and what that makes of it. Looks only, and decides nothing."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import size_damage
from ray_ckpt.storage.drafts import drafts_at
from ray_ckpt.storage.pins import read_pins

ASIDE = {
    names.TRASH: CheckpointState.TRASHED,
    names.QUARANTINE: CheckpointState.QUARANTINED,
}
Told: TypeAlias = Manifest | IntegrityError | None
"""What a folder's manifest says: the error where it cannot be read, None where there is none."""


def manifest_in(
    store: Store, folder: str, *, read: Callable[[bytes, str], Manifest] = Manifest.from_json
) -> Manifest | None:
    """The manifest of a folder, or None; one read. `read` makes it of its text and place.

    Raises:
        IntegrityError: there is one, and it cannot be read.
    """
    key = names.manifest_key(folder)
    try:
        return read(store.read(key), f"{store.uri}/{key}")
    except ObjectNotFoundError:
        return None


def newest_step(store: Store) -> int | None:
    """The newest step that is committed; a listing, and a look at the newest folders."""
    steps = filter(None, map(names.parse_step, store.list_folders("")))
    for step in sorted(steps, reverse=True):
        if store.stat(names.manifest_key(names.step_dir(step))) is not None:
            return step
    return None


def told_in(store: Store, folder: str) -> Told:
    """What the folder's manifest says; one read."""
    try:
        return manifest_in(store, folder)
    except IntegrityError as error:
        return error


def look_at_step(store: Store, step: int) -> CheckpointView | None:
    """The step in its own place, as it is now; None if nothing is there that is anybody's."""
    aside = [
        view_aside(store, step, folder)
        for parent in ASIDE
        for found, folder in aside_folders(store, parent)
        if found == step
    ]
    aside += [draft_view(manifest) for manifest in drafts_at(store, step)]
    folder = names.step_dir(step)
    sizes = sizes_in(store, folder)
    view = view_in_place(
        step,
        told_in(store, folder),
        sizes,
        has_begun=store.stat(names.begun_key(folder)) is not None,
        aside=aside,
    )
    if view is None or view.state is not CheckpointState.COMMITTED:
        return view
    return replace(view, pins=read_pins(store, folder, sizes))


def view_in_place(
    step: int,
    told: Told,
    sizes: Mapping[str, int],
    *,
    has_begun: bool,
    aside: Iterable[CheckpointView],
) -> CheckpointView | None:
    """A step in its own folder, from its manifest and the sizes of its files; pins are left out.

    `has_begun` says whether there is a note that a save has begun, `aside` what lies of the same
    step in the trash and the quarantine, and drafts of it.
    """
    if isinstance(told, IntegrityError):
        return CheckpointView(step=step, state=CheckpointState.QUARANTINED, problem=told.what)
    if told is None:
        remains = _are_remains(sizes, step, aside)
        return None if remains else _not_ours_yet(step, has_begun=has_begun)
    damage = [text for entry in told.files if (text := size_damage(entry, sizes))]
    return CheckpointView(
        step=step,
        state=CheckpointState.COMMITTED,
        manifest=told,
        problem="; ".join(damage) or None,
    )


def draft_view(manifest: Manifest) -> CheckpointView:
    """A save that lies on its nodes, some of it here."""
    return CheckpointView(step=manifest.step, state=CheckpointState.SAVING, manifest=manifest)


def view_aside(store: Store, step: int, folder: str) -> CheckpointView:
    """One save in the trash or the quarantine; one that cannot be read says why."""
    return told_aside(step, folder, told_in(store, folder))


def told_aside(step: int, folder: str, told: Told) -> CheckpointView:
    """The same, from what its manifest says."""
    state = ASIDE[folder.rpartition("/")[0]]
    if isinstance(told, IntegrityError):
        return CheckpointView(step=step, state=state, problem=told.what)
    return CheckpointView(step=step, state=state, manifest=told)


def aside_folders(store: Store, parent: str) -> list[tuple[int, str]]:
    """Step and folder of each save in the trash or the quarantine."""
    parsed = [(names.parse_set_aside(name), name) for name in store.list_folders(parent)]
    return [(found[0], f"{parent}/{name}") for found, name in parsed if found is not None]


def sizes_in(store: Store, folder: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its name there; one listing."""
    return {i.key.removeprefix(f"{folder}/"): i.size_bytes for i in store.list_objects(folder)}


def _not_ours_yet(step: int, *, has_begun: bool) -> CheckpointView:
    """A save in flight or dead, where a note says that one has begun; else somebody else's."""
    if has_begun:
        text = "a save has begun and has not committed it"
        return CheckpointView(step=step, state=CheckpointState.SAVING, problem=text)
    text = "the folder holds no manifest"
    return CheckpointView(step=step, state=CheckpointState.FOREIGN, problem=text)


def _are_remains(sizes: Mapping[str, int], step: int, aside: Iterable[CheckpointView]) -> bool:
    """Whether nothing in place is anybody's.

    A folder without files (object stores list prefixes that are
    just gone), or the objects and pins of a trashed step, which stay in place on an object store,
    or what was brought there of a draft.
    """
    known = {
        e.path for view in aside if view.step == step and view.manifest for e in view.manifest.files
    }
    own = {name for name in sizes if names.parse_pin(name) or name == names.MANIFEST}
    return sizes.keys() - own <= known
