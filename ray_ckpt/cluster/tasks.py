"""One plain function that carries out an action; Ray runs it as a task, a command line as it is.

Every action may run twice: its effect is looked for first, attempts work in private folders, and
what becomes visible does so in one step.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.publish import publish_export
from ray_ckpt.storage.purging import purge_step

Result = dict[str, Any]
"""What a record keeps of a finished action; plain JSON values."""


def run_action(root: str, document: Mapping[str, Any]) -> Result:
    """The action's effect is there; returns what its record says about it.

    Takes and returns plain values only, so that nothing large ever travels through Ray.
    """
    action = Action.from_document(document)
    started = time.perf_counter()
    result = _RUNNERS[action.kind](open_catalog(root), action)
    return {**result, "seconds": round(time.perf_counter() - started, 3)}


def _verify(catalog: Catalog, action: Action) -> Result:
    """Reads every byte. Damage moves the step out of every reader's way."""
    try:
        manifest = catalog.verify(action.step)
    except IntegrityError:
        catalog.quarantine(action.step)
        raise
    return {"bytes": manifest.total_bytes, "files": len(manifest.files)}


def _export(catalog: Catalog, action: Action) -> Result:
    """The engine returns an export that is there already as it is."""
    from ray_ckpt.tensors.export import export_step  # torch, which the manager never needs

    assert action.export is not None, "an export action names its export"
    manifest = export_step(catalog, catalog.manifest(action.step), action.export)
    return {"bytes": manifest.total_bytes, "content_id": manifest.content_id}


def _publish(catalog: Catalog, action: Action) -> Result:
    """Looks at the destination first; the same content there means nothing is sent."""
    assert action.export is not None, "a publish action names its export"
    assert action.destination is not None, "and where it goes"
    export = catalog.export(action.export.name, action.step)
    published = publish_export(catalog, export, action.destination)
    return {"location": published.location, "bytes": published.bytes_sent}


def _purge(catalog: Catalog, action: Action) -> Result:
    """Looks once more whether the step may go; a repeated run finds it gone and says 0 bytes."""
    return {"bytes": purge_step(catalog, action, now=time.time())}


_RUNNERS: dict[ActionKind, Callable[[Catalog, Action], Result]] = {
    ActionKind.VERIFY: _verify,
    ActionKind.EXPORT: _export,
    ActionKind.PUBLISH: _publish,
    ActionKind.PURGE: _purge,
}
