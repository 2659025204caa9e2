"""One step goes to the trash, if at that very moment nothing speaks for keeping it."""

from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import PurgeRefusedError, StepNotFoundError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.purging import Standing, reasons_to_stay
from ray_ckpt.core.reconcile import holds_of
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import Guard
from ray_ckpt.storage.readers import living_readers, readers_by_step


def purge_step(catalog: Catalog, action: Action, *, now: float, guard: Guard = lambda: None) -> int:
    """Bytes of the step, which lies in the trash now; 0 if it was gone already.

    `now` decides which pins hold, in seconds since the epoch; `guard`, called last, says whether
    the caller still counts. A second run is harmless: it finds nothing in place.

    Raises:
        LeaseHeldError: from `guard`; the step is untouched.
        PurgeRefusedError: something speaks for keeping it; it is untouched.
        UsageError: its folder, or the trash, is a symbolic link.
    """
    if not catalog.is_in_place(action.step):
        return 0
    living_readers(catalog.store, action.step)  # the dead are gone after this, which takes time
    observed = catalog.observe().at(now)
    try:
        manifest = catalog.manifest(action.step)
        reasons = reasons_to_stay(_standing(catalog, manifest, observed, now), action)
        if reasons:
            raise _refused(catalog, action.step, reasons)
        guard()  # must come last: the looks before it take as long as a silent reader may
        catalog.trash(action.step)
    except StepNotFoundError:
        return 0  # somebody else took it meanwhile
    return manifest.total_bytes


def _standing(catalog: Catalog, manifest: Manifest, observed: Observation, now: float) -> Standing:
    """What changes quickly is looked up last, right before the step goes."""
    step = manifest.step
    others = (view for view in observed.readable() if view.step != step)
    return Standing(
        content_id=manifest.content_id,
        holds=holds_of(observed).get(step, ()),
        ways_back=[view.step for view in others if view.is_way_back and view.problem is None],
        pins=[pin.title for pin in catalog.pins(step) if pin.holds(now)],
        readers=readers_by_step(catalog.store).get(step, ()),
    )


def _refused(catalog: Catalog, step: int, reasons: list[str]) -> PurgeRefusedError:
    return PurgeRefusedError(
        f"step-{step} stays: {'; '.join(reasons)}",
        catalog.uri,
        "it was not touched",
        f"ray-ckpt show {catalog.uri} {step}",
    )
