"""Checkpoint folders whose names are no step's: `step-<n>` leads to the same bytes as well.

By hard links on a disk, by copies of the service's own on an object store. The folder itself stays
as it is, for whoever else knows it by its name: Ray Train must find what it has listed. A note says
that it was taken, so that a step that was purged since is not made of it once more.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError, ConflictError, ObjectNotFoundError
from ray_ckpt.core.foreign_names import SNAPSHOT, step_in_name, steps_in_snapshot
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.disk.posix import make_folder, sync_folder
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.listing import sizes_in


def strange_folders(store: Store) -> list[str]:
    """Folders of DCP checkpoints whose names are no step's."""
    return [
        name
        for name in store.list_folders("")
        if names.parse_step(name) is None and store.stat(f"{name}/{names.METADATA}") is not None
    ]


def steps_of(store: Store, pattern: str) -> dict[str, int]:
    """Strange folder to step, of those that match `checkpoint_*`.

    Raises:
        ConfigError: none matches, nobody can say which step one is, or two would be the same.
    """
    folders = [name for name in strange_folders(store) if fnmatchcase(name, pattern)]
    listed = _listed(store)
    found = {name: listed.get(name, step_in_name(name)) for name in folders}
    if not found:
        raise _refused(store, f"no folder of a DCP checkpoint is called {pattern}")
    untold = [name for name, step in found.items() if step is None]
    if untold:
        raise _refused(store, f"nobody can say which step {untold[0]} is")
    steps = {name: step for name, step in found.items() if step is not None}
    for name, step in steps.items():
        others = [other for other in steps if other != name and steps[other] == step]
        if others:
            raise _refused(store, f"{name} and {others[0]} would both be step-{step}")
    return steps


def take_folder(store: Store, folder: str, step: int) -> bool:
    """Whether it was still to do that all of the folder's files lie in `step-<n>` as well.

    Again after a kill it goes on; `.metadata` comes last, without which nobody takes the step for
    a checkpoint, and after it the note that it was taken.

    Raises:
        ConflictError: another checkpoint is that step.
    """
    target = names.step_dir(step)
    wanted, present = sizes_in(store, folder), sizes_in(store, target)
    if names.METADATA in present:
        if any(present.get(name) != size for name, size in wanted.items()):
            raise ConflictError(
                f"{target} is there, and is not {folder}",
                store.uri,
                "both are as they were",
                f"move one of them to another root, or give {folder} another number",
            )
        _note(store, folder, step)
        return False
    for name in sorted(wanted, key=lambda name: name == names.METADATA):
        _lead_to(store, f"{folder}/{name}", f"{target}/{name}")
    _note(store, folder, step)
    return True


def was_taken(store: Store, folder: str) -> bool:
    """Whether the folder has become a step once, which may be gone since."""
    return store.stat(names.taken_key(folder)) is not None


def _note(store: Store, folder: str, step: int) -> None:
    if not was_taken(store, folder):
        store.write(names.taken_key(folder), f'{{"step": {step}}}\n'.encode())


def _lead_to(store: Store, source: str, target: str) -> None:
    """The same bytes under another key."""
    if isinstance(store, LocalStore):
        with contextlib.suppress(OSError):  # not every file system has links, nor across its ends
            _link(store, source, target)
            return
    store.copy(source, target)


def _link(store: LocalStore, source: str, target: str) -> None:
    path = store.path(target)
    make_folder(path.parent)
    path.unlink(missing_ok=True)
    os.link(store.path(source), path)
    sync_folder(path.parent)


def _listed(store: Store) -> Mapping[str, int]:
    try:
        return steps_in_snapshot(json.loads(store.read(SNAPSHOT)))
    except (ObjectNotFoundError, ValueError):
        return {}


def _refused(store: Store, what: str) -> ConfigError:
    return ConfigError(
        what,
        f"{store.uri}, --folders",
        "nothing was changed",
        "choose others with --folders, or rename each to step-<n> yourself",
    )
