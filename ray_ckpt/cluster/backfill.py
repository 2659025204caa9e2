"""A folder of old checkpoints, one after the other: adopted, verified, exported, copied.

    other names  step-<n> leads to the same bytes as well
    foreign      adopted: every byte is read, none is changed
    committed    verified
    export       asked for, and waited for: whoever manages the root makes it, or else this process

What a step needs is read from storage each time, so whoever is killed anywhere goes on by beginning
again: what is there is left as it is, and what was taken and purged since is left alone. What is
wrong with one step is told, and the next one comes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import ray

from ray_ckpt.cluster.nodes import options_of_helper
from ray_ckpt.cluster.perform import is_done, verify_here
from ray_ckpt.cluster.priority import giving_way
from ray_ckpt.cluster.ray_result import result_of
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
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
from ray_ckpt.storage.foreign_folders import steps_of, take_folder, was_taken
from ray_ckpt.tensors.adopt import adopt_step

_USABLE = READABLE | {CheckpointState.FOREIGN}
_OF_ROOT = TransientError, StorageFullError
"""Of these errors the other steps would hear as well; rights may differ from folder to folder."""
_OF_DESTINATION = AuthorizationError, TransientError, StorageFullError
"""There rights are the same for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """What is to become of every step."""

    folders: str | None = None
    """Which folders whose names are no step's are steps too, as in `checkpoint_*`."""
    again: bool = False
    """Of these also the ones that were taken before and whose step is gone since."""
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
    left: str | None = None
    """Why it was left alone, where that is as it should be: it was purged."""

    def __str__(self) -> str:
        told = filter(None, (", ".join(self.did), self.left, str(self.error or "")))
        return f"step-{self.step}: {'; '.join(told) or 'nothing to do'}"


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
        ConfigError: nobody can say which steps the folders are.
    """
    folders = steps_of(catalog.store, asked.folders) if asked.folders else {}
    begun, num_bytes = time.monotonic(), 0
    refused = _take(catalog, folders, again=asked.again)
    views = _by_step(catalog)
    for step in sorted({*views, *folders.values()}):
        view = views.get(step)
        if view is not None and view.state in _USABLE:
            filled = _filled(catalog, step, asked, hands)
            yield replace(filled, error=filled.error or refused.get(step))
            num_bytes += filled.size_bytes if filled.did else 0
            time.sleep(rest_s(num_bytes, time.monotonic() - begun, bytes_per_s=asked.bytes_per_s))
        elif step in refused:
            yield Filled(step=step, error=refused[step])
        elif view is None or view.state is CheckpointState.TRASHED:
            yield Filled(step=step, left=_why_left(catalog, step, view))
        else:
            yield Filled(step=step, error=_passed_over(catalog, view))


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


def _take(catalog: Catalog, folders: Mapping[str, int], *, again: bool) -> dict[int, RayCkptError]:
    """By step, why a folder could not become it; the others have, or had before."""
    in_place = {step for step, view in _by_step(catalog).items() if view.state in _USABLE}
    refused: dict[int, RayCkptError] = {}
    for name, step in folders.items():
        if step not in in_place and not again and was_taken(catalog.store, name):
            continue  # it was purged since, and would be there again
        try:
            take_folder(catalog.store, name, step)
        except RayCkptError as error:
            _raise_if(error, _OF_ROOT)
            refused[step] = error
    return refused


def _by_step(catalog: Catalog) -> dict[int, CheckpointView]:
    """What there is of each step: in its place, else wherever it lies."""
    views = catalog.observe().checkpoints
    return {v.step: v for v in sorted(views, key=lambda v: v.state in _USABLE)}


def _why_left(catalog: Catalog, step: int, view: CheckpointView | None) -> str:
    if view is not None:
        return f"it is in the trash; ray-ckpt undo {catalog.uri} {step} brings it back"
    return "it was taken before and purged since; with --again it is taken once more"


def _raise_if(error: RayCkptError, kinds: tuple[type[RayCkptError], ...]) -> None:
    """The error, if it is one of these; a conflict is about one step alone."""
    if isinstance(error, kinds) and not isinstance(error, ConflictError):
        raise error


def _passed_over(catalog: Catalog, view: CheckpointView) -> RayCkptError:
    return UsageError(
        f"step-{view.step} is {view.state}: {view.problem or 'it is not used'}",
        catalog.uri,
        "it is as it was",
        f"ray-ckpt ls {catalog.uri}",
    )


def _filled(catalog: Catalog, step: int, asked: Backfill, hands: Hands) -> Filled:
    try:
        did = hands.take(catalog, step, asked)
        view = catalog.checkpoint(step)
    except RayCkptError as error:
        _raise_if(error, _OF_ROOT)
        return Filled(step=step, error=error)
    size_bytes = view.manifest.total_bytes if view.manifest else 0
    try:
        did = (*did, *_exported(catalog, view, asked, hands))
    except RayCkptError as error:
        _raise_if(error, _OF_DESTINATION)
        return Filled(step=step, size_bytes=size_bytes, did=did, error=error)
    return Filled(step=step, size_bytes=size_bytes, did=did)


def _exported(
    catalog: Catalog, view: CheckpointView, asked: Backfill, hands: Hands
) -> tuple[str, ...]:
    """What was still to do for the export that is asked of the step, if one is."""
    if asked.export is None or view.step % asked.every_steps != 0:
        return ()
    made = export_action(view, asked.export)
    if asked.destination is not None:
        made = publish_action(view, asked.export, asked.destination)
    if is_done(catalog, made):
        return ()
    hands.perform(catalog, made)
    return ("exported" if asked.destination is None else "published",)
