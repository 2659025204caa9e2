"""A folder of old checkpoints, one after the other: adopted, verified, exported, copied.

    foreign      adopted: every byte is read, none is changed
    committed    verified
    export       asked for, and waited for: whoever manages the root makes it, or else this process

What a step needs is read from storage each time, so whoever is killed anywhere goes on by beginning
again: what is there is left as it is. What is wrong with one step is told, and the next one comes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ray_ckpt.cluster.perform import is_done, verify_here
from ray_ckpt.core import names
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
from ray_ckpt.core.wanted import export_action, publish_action
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.tensors.adopt import adopt_step

_USABLE = READABLE | {CheckpointState.FOREIGN}
_ENDS_IT = AuthorizationError, TransientError, StorageFullError
"""Later steps would fare no better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """What is to become of every step."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was done with one step this time; nothing where all was there."""

    step: int
    size_bytes: int = 0
    did: tuple[str, ...] = ()
    error: RayCkptError | None = None
    """Why not all of it could be done; what was done stays."""


def backfill(
    catalog: Catalog, asked: Backfill, *, perform: Callable[[Catalog, Action], object]
) -> Iterator[Filled]:
    """Every step of the root, oldest first; `perform` returns once an action has its effect.

    Raises:
        AuthorizationError, TransientError, StorageFullError: the root or the destination cannot be
            used now. All that is done stays done.
    """
    for view in sorted(catalog.observe().checkpoints, key=lambda view: view.step):
        if view.state in _USABLE:
            yield _filled(catalog, view.step, asked, perform)
        elif view.state is not CheckpointState.TRASHED:
            yield Filled(step=view.step, error=_passed_over(catalog, view))


def strange_folders(catalog: Catalog) -> list[str]:
    """Folders of DCP checkpoints whose names are no step's: nobody can say which step they are."""
    return [
        name
        for name in catalog.store.list_folders("")
        if names.parse_step(name) is None
        and catalog.store.stat(f"{name}/{names.METADATA}") is not None
    ]


def _passed_over(catalog: Catalog, view: CheckpointView) -> RayCkptError:
    return UsageError(
        f"step-{view.step} is {view.state}: {view.problem or 'it is not used'}",
        catalog.uri,
        "it is as it was",
        f"ray-ckpt ls {catalog.uri}",
    )


def _filled(
    catalog: Catalog, step: int, asked: Backfill, perform: Callable[[Catalog, Action], object]
) -> Filled:
    did: list[str] = []
    size_bytes = 0
    try:
        if not catalog.is_in_place(step):
            adopt_step(catalog, step, family=asked.family, assets=asked.assets)
            did.append("adopted")
        view = catalog.checkpoint(step)
        size_bytes = view.manifest.total_bytes if view.manifest else 0
        if view.state is CheckpointState.COMMITTED:
            verify_here(catalog, view)
            did.append("verified")
        if asked.export is not None and step % asked.every_steps == 0:
            made = export_action(view, asked.export)
            if asked.destination is not None:
                made = publish_action(view, asked.export, asked.destination)
            if not is_done(catalog, made):
                perform(catalog, made)
                did.append("exported" if asked.destination is None else "published")
    except RayCkptError as error:
        if isinstance(error, _ENDS_IT):
            raise
        return Filled(step=step, size_bytes=size_bytes, did=tuple(did), error=error)
    return Filled(step=step, size_bytes=size_bytes, did=tuple(did))
