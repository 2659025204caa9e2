"""What one root holds, read from storage each time. Looks only, and decides nothing."""

import logging
from collections.abc import Iterator

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, ExportView
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import size_damage
from ray_ckpt.storage.pins import read_pins

log = logging.getLogger("ray_ckpt")

_ASIDE = {
    names.TRASH: CheckpointState.TRASHED,
    names.QUARANTINE: CheckpointState.QUARANTINED,
}


def manifest_in(store: Store, folder: str) -> Manifest | None:
    """The manifest of a folder, or None; one read.

    Raises:
        IntegrityError: there is one, and it cannot be read.
    """
    key = names.manifest_key(folder)
    try:
        return Manifest.from_json(store.read(key), f"{store.uri}/{key}")
    except ObjectNotFoundError:
        return None


def list_checkpoints(store: Store) -> list[CheckpointView]:
    """Every step: in place (committed or foreign), in the trash, in quarantine."""
    aside = [
        view
        for parent in _ASIDE
        for step, folder in aside_folders(store, parent)
        if (view := view_aside(store, step, folder)).manifest or view.problem
    ]
    return [*_in_place(store, aside), *aside]


def view_aside(store: Store, step: int, folder: str) -> CheckpointView:
    """One save in the trash or the quarantine; one that cannot be read says why."""
    state = _ASIDE[folder.rpartition("/")[0]]
    try:
        return CheckpointView(step=step, state=state, manifest=manifest_in(store, folder))
    except IntegrityError as error:
        return CheckpointView(step=step, state=state, problem=error.what)


def list_exports(store: Store) -> Iterator[ExportView]:
    """Every finished export; one whose manifest cannot be read is left out, with a warning."""
    for name in store.list_folders(names.EXPORTS):
        for folder in store.list_folders(f"{names.EXPORTS}/{name}"):
            step = names.parse_step(folder)
            manifest = None if step is None else _readable_export(store, name, step)
            if step is not None and manifest is not None:
                yield ExportView(name=name, step=step, manifest=manifest)


def _readable_export(store: Store, name: str, step: int) -> Manifest | None:
    try:
        return manifest_in(store, names.export_dir(name, step))
    except IntegrityError as error:
        log.warning("the export %s of step-%d does not count: %s", name, step, error)
        return None


def aside_folders(store: Store, parent: str) -> Iterator[tuple[int, str]]:
    """Step and folder of each save in the trash or the quarantine."""
    for name in store.list_folders(parent):
        parsed = names.parse_set_aside(name)
        if parsed is not None:
            yield parsed[0], f"{parent}/{name}"


def sizes_in(store: Store, folder: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its name there; one listing."""
    return {i.key.removeprefix(f"{folder}/"): i.size_bytes for i in store.list_objects(folder)}


def _in_place(store: Store, aside: list[CheckpointView]) -> Iterator[CheckpointView]:
    for name in store.list_folders(""):
        step = names.parse_step(name)
        view = None if step is None else _view(store, step, aside)
        if view is not None:
            yield view


def _view(store: Store, step: int, aside: list[CheckpointView]) -> CheckpointView | None:
    folder = names.step_dir(step)
    try:
        manifest = manifest_in(store, folder)
    except IntegrityError as error:
        return CheckpointView(step=step, state=CheckpointState.QUARANTINED, problem=error.what)
    sizes = sizes_in(store, folder)
    if manifest is None:
        return None if _are_remains(sizes, step, aside) else _not_ours_yet(store, step)
    damage = [text for entry in manifest.files if (text := size_damage(entry, sizes))]
    return CheckpointView(
        step=step,
        state=CheckpointState.COMMITTED,
        manifest=manifest,
        pins=read_pins(store, step, sizes),
        problem="; ".join(damage) or None,
    )


def _not_ours_yet(store: Store, step: int) -> CheckpointView:
    """A save in flight or dead, where a note says that one has begun; else somebody else's."""
    if store.stat(names.begun_key(names.step_dir(step))) is not None:
        text = "a save has begun and has not committed it"
        return CheckpointView(step=step, state=CheckpointState.SAVING, problem=text)
    text = "the folder holds no manifest"
    return CheckpointView(step=step, state=CheckpointState.FOREIGN, problem=text)


def _are_remains(sizes: dict[str, int], step: int, aside: list[CheckpointView]) -> bool:
    """Whether nothing in place is anybody's.

    A folder without files (object stores list prefixes that are
    just gone), or the objects and pins of a trashed step, which stay in place on an object store.
    """
    known = {
        e.path for view in aside if view.step == step and view.manifest for e in view.manifest.files
    }
    return {name for name in sizes if names.parse_pin(name) is None} <= known
