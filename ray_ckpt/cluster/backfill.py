"""A folder of old checkpoints, one after the other: adopted, verified, exported, copied.

    other names  step-<n> leads to the same bytes as well
    foreign      adopted: every byte is read, none is changed
    committed    verified
    export       asked for, and waited for: whoever manages the root makes it, or else this process

What a step needs is read from storage each time, so whoever is killed anywhere goes on by beginning
again: what is there is left as it is. What is wrong with one step is told, and the next one comes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import ray

from ray_ckpt.cluster.nodes import options_of_helper
from ray_ckpt.cluster.perform import is_done, verify_here
from ray_ckpt.cluster.priority import giving_way
from ray_ckpt.cluster.ray_result import result_of
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import (
    AuthorizationError,
    RayCkptError,
    StorageFullError,
    TransientError,
    UsageError,
)
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import READABLE, CheckpointView
from ray_ckpt.core.pace import rest_s
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.foreign_folders import steps_of, take_folder
from ray_ckpt.tensors.adopt import adopt_step

_USABLE = READABLE | {CheckpointState.FOREIGN}
_ENDS_IT = AuthorizationError, TransientError, StorageFullError
"""Later steps would fare no better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """What is to become of every step."""

    folders: str | None = None
    """Which folders whose names are no step's are steps too, as in `checkpoint_*`."""
    family: str | None = None
    """Of the steps that are adopted."""
    assets: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Put beside them."""
    export: ExportSpec | None = None
    """None verifies alone."""
    destination: str | None = None
    """Where exports are copied to."""
    every_steps: int = 1
    """Only steps that are multiples of it are exported."""
    bytes_per_s: float | None = None
    """Checkpoint bytes at most, on average; None is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was done with one step this time; nothing where all was there."""

    step: int
    size_bytes: int = 0
    did: tuple[str, ...] = ()
    error: RayCkptError | None = None
    """Why not all of it could be done; what was done stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hands:
    """Who does it: this process, or a cluster."""

    take: Callable[[Catalog, int, Backfill], tuple[str, ...]]
    """A step is adopted and verified; returns which of both was still to do."""
    perform: Callable[[Catalog, Action], object]
    """Returns once an action has its effect."""


def backfill(catalog: Catalog, asked: Backfill, hands: Hands) -> Iterator[Filled]:
    """Every step of the root, oldest first.

    Rests after a step in which something was done, as long as the rate wants it.

    Raises:
        AuthorizationError, TransientError, StorageFullError: the root or the destination cannot be
            used now. All that is done stays done.
        ConfigError: a folder that is to be a step cannot be one.
    """
    folders = steps_of(catalog.store, asked.folders) if asked.folders else {}
    begun, num_bytes = time.monotonic(), 0
    for name, step in folders.items():
        take_folder(catalog.store, name, step)
    for view in sorted(catalog.observe().checkpoints, key=lambda view: view.step):
        if view.state in _USABLE:
            filled = _filled(catalog, view.step, asked, hands)
            yield filled
            num_bytes += filled.size_bytes if filled.did else 0
            time.sleep(rest_s(num_bytes, time.monotonic() - begun, bytes_per_s=asked.bytes_per_s))
        elif view.state is not CheckpointState.TRASHED:
            yield Filled(step=view.step, error=_passed_over(catalog, view))


def take_here(catalog: Catalog, step: int, asked: Backfill) -> tuple[str, ...]:
    """A step is ours, and every byte of it was read; returns what was still to do for that."""
    did: list[str] = []
    if not catalog.is_in_place(step):
        adopt_step(catalog, step, family=asked.family, assets=asked.assets)
        did.append("adopted")
    view = catalog.checkpoint(step)
    if view.state is CheckpointState.COMMITTED:
        verify_here(catalog, view)
        did.append("verified")
    return tuple(did)


def take_on_cluster(catalog: Catalog, step: int, asked: Backfill) -> tuple[str, ...]:
    """The same by a task of the cluster that this process is connected to, wherever is room."""
    task = ray.remote(_take_on_ray).options(name=f"backfill step-{step}", **options_of_helper())
    return result_of(task.remote(catalog.uri, step, asked))


def _take_on_ray(root: str, step: int, asked: Backfill) -> tuple[str, ...]:
    return giving_way(lambda: take_here(open_catalog(root), step, asked))


def _passed_over(catalog: Catalog, view: CheckpointView) -> RayCkptError:
    return UsageError(
        f"step-{view.step} is {view.state}: {view.problem or 'it is not used'}",
        catalog.uri,
        "it is as it was",
        f"ray-ckpt ls {catalog.uri}",
    )


def _filled(catalog: Catalog, step: int, asked: Backfill, hands: Hands) -> Filled:
    did: tuple[str, ...] = ()
    size_bytes = 0
    try:
        did = hands.take(catalog, step, asked)
        view = catalog.checkpoint(step)
        size_bytes = view.manifest.total_bytes if view.manifest else 0
        if asked.export is not None and step % asked.every_steps == 0:
            made = export_action(view, asked.export)
            if asked.destination is not None:
                made = publish_action(view, asked.export, asked.destination)
            if not is_done(catalog, made):
                hands.perform(catalog, made)
                did = (*did, "exported" if asked.destination is None else "published")
    except RayCkptError as error:
        if isinstance(error, _ENDS_IT):
            raise
        return Filled(step=step, size_bytes=size_bytes, did=did, error=error)
    return Filled(step=step, size_bytes=size_bytes, did=did)
