"""Every byte of a root's steps and exports, compared with their manifests. A person is looking.

Unlike the manager's own verify this never moves a damaged step. Here one after the other, or on a
cluster as a Ray task each, on whichever nodes have room.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import ray

from ray_ckpt.cluster.nodes import options_of_helper
from ray_ckpt.cluster.perform import record_verified
from ray_ckpt.cluster.priority import giving_way
from ray_ckpt.cluster.ray_result import result_of
from ray_ckpt.core import names
from ray_ckpt.core.errors import StepNotFoundError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import find_damage

_AT_ONCE = 64
"""Tasks that are asked for: Ray runs as many as there is room for."""
Found = Literal["verified", "corrupt", "foreign"]
_UNREADABLE: dict[CheckpointState, Found] = {
    CheckpointState.FOREIGN: "foreign",
    CheckpointState.QUARANTINED: "corrupt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was found of one step, or of one export of it."""

    step: int
    export: str | None = None
    """None for the step itself."""
    result: Found = "verified"
    damage: tuple[str, ...] = ()
    """A sentence for every file that differs."""

    @property
    def what(self) -> str:
        """Its folder."""
        return names.export_dir(self.export, self.step) if self.export else f"step-{self.step}"


def check_here(catalog: Catalog, step: int | None = None) -> Iterator[Checked]:
    """All of the root, or of one step; told as it goes.

    Raises:
        StepNotFoundError: there is nothing to check.
    """
    observed = _observed(catalog)
    yield from (_checked(catalog, each) for each in _to_check(catalog, observed, step))
    yield from _unreadable(observed) if step is None else ()


def check_on_cluster(catalog: Catalog, step: int | None = None) -> Iterator[Checked]:
    """The same by tasks of the cluster that this process is connected to; as they end.

    Raises:
        StepNotFoundError: there is nothing to check.
        TransientError: a node was lost, and Ray has tried that task several times.
    """
    observed = _observed(catalog)
    left, running = list(_to_check(catalog, observed, step)), list[ray.ObjectRef]()
    options = options_of_helper()
    while left or running:
        while left and len(running) < _AT_ONCE:
            each = left.pop(0)
            task = ray.remote(_check_on_ray).options(name=f"check {each.what}", **options)
            running.append(task.remote(catalog.uri, each))
        ended, running = ray.wait(running)
        yield from map(result_of, ended)
    yield from _unreadable(observed) if step is None else ()


def _check_on_ray(root: str, what: Checked) -> Checked:
    return giving_way(lambda: _checked(open_catalog(root), what))


def _observed(catalog: Catalog) -> Observation:
    """Whoever has misspelt a prefix of a bucket is not told that all is well."""
    observed = catalog.observe()
    if not observed.checkpoints and not observed.exports:
        raise StepNotFoundError(
            "no checkpoint and no export is here", catalog.uri, do="check the spelling of the root"
        )
    return observed


def _to_check(catalog: Catalog, observed: Observation, step: int | None) -> Iterator[Checked]:
    views = observed.readable() if step is None else [catalog.checkpoint(step)]
    yield from (Checked(step=view.step) for view in views)
    for export in observed.exports:
        if step in (None, export.step):
            yield Checked(step=export.step, export=export.name)


def _checked(catalog: Catalog, what: Checked) -> Checked:
    if what.export is None:
        damage = catalog.damage(what.step)
        if not damage:
            record_verified(catalog, catalog.checkpoint(what.step))
    else:
        manifest = catalog.export(what.export, what.step).manifest
        damage = find_damage(catalog.store, what.what, manifest)
    return replace(what, result="corrupt", damage=tuple(damage)) if damage else what


def _unreadable(observed: Observation) -> Iterator[Checked]:
    """Steps that cannot be verified, so that none is passed over in silence."""
    for view in observed.checkpoints:
        if view.state in _UNREADABLE:
            damage = (view.problem or "it is in quarantine",)
            yield Checked(step=view.step, result=_UNREADABLE[view.state], damage=damage)
