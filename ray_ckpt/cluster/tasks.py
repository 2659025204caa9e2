"""One plain function that carries out an action; Ray runs it as a task, a command line as it is.

Every action may run twice: its effect is looked for first, attempts work in private folders, and
what becomes visible does so in one step.
"""

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copies import COPIED_AT
from ray_ckpt.core.errors import IntegrityError, StorageError
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.promoting import EPOCH, METRICS, NON_FINITE, publish_of
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.gathering import Guard, commit_draft, free, gather
from ray_ckpt.storage.lease import MANAGER, LeaseGuard
from ray_ckpt.storage.promote import promote_copy
from ray_ckpt.storage.publish import publish_export
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.retire import retire_copy

Result = dict[str, Any]
"""What a record keeps of a finished action; plain JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try to carry out an action: a small record, so that nothing large travels through Ray."""

    action: Action
    number: int
    epoch: int
    """The manager's that planned it: what moves a checkpoint is refused under a later one."""


def run_action(root: str, attempt: Attempt) -> Result:
    """The action's effect is there; returns what its record says about it.

    What an attempt that failed said lies under `.ray_ckpt/logs/` then.
    """
    action = attempt.action
    started = time.perf_counter()
    catalog = open_catalog(root)
    guard = LeaseGuard(store=catalog.store, role=MANAGER, epoch=attempt.epoch)
    try:
        result = _RUNNERS[action.kind](catalog, action, guard)
    except Exception:
        _keep_log(catalog, attempt, traceback.format_exc())
        raise
    return {**result, "seconds": round(time.perf_counter() - started, 3), EPOCH: attempt.epoch}


def _keep_log(catalog: Catalog, attempt: Attempt, text: str) -> None:
    host = f"{socket.gethostname()} process {os.getpid()}"
    head = f"{attempt.action.title}, attempt {attempt.number} on {host}\n"
    with contextlib.suppress(StorageError):  # the error itself is what matters
        catalog.store.write(
            names.log_key(attempt.action.key, attempt.number), (head + text).encode()
        )


def _verify(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Reads every byte. Damage moves the step out of every reader's way."""
    try:
        return _read(catalog, action)
    except IntegrityError:
        guard()
        catalog.quarantine(action.step)
        raise


def _read(catalog: Catalog, action: Action) -> Result:
    manifest = catalog.verify(action.step)
    return {"bytes": manifest.total_bytes, "files": len(manifest.files)}


def _export(catalog: Catalog, action: Action, _: Guard) -> Result:
    """The engine returns an export that is there already as it is."""
    from ray_ckpt.tensors.export import export_step  # torch, which the manager never needs

    assert action.export is not None, "an export action names its export"
    manifest = export_step(catalog, catalog.manifest(action.step), action.export)
    return {"bytes": manifest.total_bytes, "content_id": manifest.content_id}


def _publish(catalog: Catalog, action: Action, _: Guard) -> Result:
    """Looks at the destination first; the same content there means nothing is sent."""
    assert action.export is not None, "a publish action names its export"
    assert action.destination is not None, "and where it goes"
    export = catalog.export(action.export.name, action.step)
    published = publish_export(catalog, export, action.destination)
    return {
        "location": published.location,
        "bytes": published.bytes_sent,
        "content_id": export.manifest.content_id,
        METRICS: dict(export.manifest.metrics),
        NON_FINITE: len(export.manifest.non_finite),
    }


def _promote(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Lets a name lead to a copy; a repeated run finds that it does."""
    assert action.pointer is not None, "a promote action says which name"
    publish = publish_of(action)
    content_id = str(catalog.records.action(publish).result.get("content_id"))
    location = promote_copy(publish, action.pointer, content_id=content_id, guard=guard)
    return {"location": location, "step": action.step}


def _purge(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Looks once more whether the step may go; a repeated run finds it gone and says 0 bytes."""
    guard()
    return {"bytes": purge_step(catalog, action, now=time.time())}


def _retire(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Removes one copy at its destination; a repeated run finds it gone."""
    publish = replace(action, kind=ActionKind.PUBLISH)
    made = catalog.records.action(publish)  # must be read first: a copy made anew is another one
    guard()
    retired = retire_copy(catalog.uri, publish, content_id=made.result.get("content_id"))
    return {
        "place": retired.place,
        "bytes": retired.bytes_freed,
        COPIED_AT: made.changed_at,
    }


def _gather(catalog: Catalog, action: Action, _: Guard) -> Result:
    """Sends what has not arrived yet, to a private place."""
    assert action.node is not None, "a gather names its node"
    return {"bytes": gather(catalog, action.source_id, action.node), **_here()}


def _commit(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Makes the step visible; a repeated run finds it committed and says so."""
    manifest = commit_draft(catalog, action.source_id, guard, now=time.time())
    return {"bytes": manifest.total_bytes, "content_id": manifest.content_id}


def _free(catalog: Catalog, action: Action, _: Guard) -> Result:
    """Removes the save's folder on its node; a repeated run finds it gone and says 0 bytes."""
    assert action.node is not None, "and so does what is freed"
    return {"bytes": free(catalog, action.source_id, action.node), **_here()}


def _here() -> Result:
    """Where this runs, for who wonders whether it was the right node."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    return {"host": socket.gethostname(), "node": node}


def _scrub(catalog: Catalog, action: Action, guard: Guard) -> Result:
    """Reads every byte once more. Of a damaged step nothing says any longer that it is verified."""
    try:
        return _read(catalog, action)
    except IntegrityError:
        guard()
        catalog.records.forget_action(replace(action, kind=ActionKind.VERIFY))
        catalog.quarantine(action.step)
        raise


_RUNNERS: dict[ActionKind, Callable[[Catalog, Action, Guard], Result]] = {
    ActionKind.VERIFY: _verify,
    ActionKind.EXPORT: _export,
    ActionKind.PUBLISH: _publish,
    ActionKind.PROMOTE: _promote,
    ActionKind.PURGE: _purge,
    ActionKind.RETIRE: _retire,
    ActionKind.SCRUB: _scrub,
    ActionKind.GATHER: _gather,
    ActionKind.COMMIT: _commit,
    ActionKind.FREE: _free,
}
