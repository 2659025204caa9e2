"""One plain function that carries out an action; Ray runs it as a task, a command line as it is.

Every action may run twice: its effect is looked for first, attempts work in private folders, and
what becomes visible does so in one step.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import COPIED_AT
from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.publish import publish_export
from ray_ckpt.storage.retire import retire_copy

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
        return _read(catalog, action)
    except IntegrityError:
        catalog.quarantine(action.step)
        raise


def _read(catalog: Catalog, action: Action) -> Result:
    manifest = catalog.verify(action.step)
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
    return {
        "location": published.location,
        "bytes": published.bytes_sent,
        "content_id": export.manifest.content_id,
    }


def _purge(catalog: Catalog, action: Action) -> Result:
    """One step, which a repeated run finds in the trash and leaves there."""
    manifest = catalog.manifest(action.step)
    catalog.trash(action.step)
    return {"bytes": manifest.total_bytes}


def _retire(catalog: Catalog, action: Action) -> Result:
    """Removes one copy at its destination; a repeated run finds it gone."""
    publish = replace(action, kind=ActionKind.PUBLISH)
    made = catalog.records.action(publish)  # must be read first: a copy made anew is another one
    retired = retire_copy(catalog.uri, publish, content_id=made.result.get("content_id"))
    return {
        "place": retired.place,
        "bytes": retired.bytes_freed,
        COPIED_AT: made.changed_at,
    }


def _scrub(catalog: Catalog, action: Action) -> Result:
    """Reads every byte once more. Of a damaged step nothing says any longer that it is verified."""
    try:
        return _read(catalog, action)
    except IntegrityError:
        catalog.records.forget_action(replace(action, kind=ActionKind.VERIFY))
        catalog.quarantine(action.step)
        raise


_RUNNERS: dict[ActionKind, Callable[[Catalog, Action], Result]] = {
    ActionKind.VERIFY: _verify,
    ActionKind.EXPORT: _export,
    ActionKind.PUBLISH: _publish,
    ActionKind.PURGE: _purge,
    ActionKind.RETIRE: _retire,
    ActionKind.SCRUB: _scrub,
}
