"""An action that somebody asked for: done by the manager on a cluster, or in this process.

Both ways leave the same record under `.ray_ckpt/actions/`, so `ray-ckpt ls` and the next manager
know of it, and both are safe to interrupt and to repeat.
"""

import time
from collections.abc import Callable
from typing import Any

import ray

from ray_ckpt.cluster.connect import start_manager_job
from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core import errors
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import RayCkptError, StorageError
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Request
from ray_ckpt.core.reconcile import verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog

Told = Callable[[str], None]
"""Called with a sentence whenever there is something new to say."""


def perform_here(catalog: Catalog, action: Action) -> ActionRecord:
    """The action is done, in this process.

    Raises:
        RayCkptError: it failed; the record says so too.
    """
    records = catalog.records
    record = ActionRecord(action=action).started(time.time())
    records.write_action(record)
    try:
        result = run_action(catalog.uri, action.to_document())
    except Exception as error:
        records.write_action(record.failed(error, time.time()))
        raise
    record = record.succeeded(result, time.time())
    records.write_action(record)
    return record


def verify_here(catalog: Catalog, checkpoint: CheckpointView) -> ActionRecord:
    """Every byte of the checkpoint was read and is as the manifest says; the record says so.

    Unlike the manager's own verify action this never moves a damaged step: a person is looking.

    Raises:
        IntegrityError: names each damaged file; storage is not touched.
    """
    action = verify_action(checkpoint)
    manifest = catalog.verify(checkpoint.step)
    record = ActionRecord(action=action).started(time.time())
    record = record.succeeded({"bytes": manifest.total_bytes}, time.time())
    try:
        catalog.records.write_action(record)
    except StorageError:
        return record  # a root that may only be read can be verified all the same
    return record


def ensure_verified(catalog: Catalog, checkpoint: CheckpointView) -> None:
    """The checkpoint was verified, before or just now."""
    if checkpoint.state is not CheckpointState.VERIFIED:
        verify_here(catalog, checkpoint)


def perform_on_cluster(
    root: str, action: Action, *, address: str, told: Told = lambda _: None
) -> ActionRecord:
    """The action is done, by the root's manager on the cluster at `address`.

    The request is on storage before the manager hears of it: whatever dies, it is not lost.

    Raises:
        RayCkptError: the action is DEAD, for the reason that its record names.
    """
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    catalog = open_catalog(root)
    _forget_dead(catalog, action)
    catalog.records.add_request(
        Request(
            kind=action.kind, step=action.step, export=action.export, destination=action.destination
        )
    )
    manager = start_manager_job(root)
    manager.wake.remote()
    return _wait(catalog, action, told)


def _forget_dead(catalog: Catalog, action: Action) -> None:
    """Asking again is a fresh start for whatever failed before."""
    for record in catalog.records.actions().values():
        same_export = record.action.export == action.export and record.action.step == action.step
        if record.state is ActionState.DEAD and same_export:
            catalog.records.forget_action(record.action)


def _wait(catalog: Catalog, action: Action, told: Told) -> ActionRecord:
    said = ""
    while True:
        record = catalog.records.action(action)
        if record.state is ActionState.SUCCEEDED:
            return record
        for other in catalog.records.actions().values():
            concerned = other.action.step == action.step and other.action.kind in _NEEDED_BEFORE
            if other.state is ActionState.DEAD and (concerned or other.action.key == action.key):
                raise _error_of(other)
        sentence = f"{action.title}: {record.state}"
        if sentence != said:
            told(sentence)
            said = sentence
        time.sleep(0.3)


_NEEDED_BEFORE = frozenset({"verify", "export"})


def _error_of(record: ActionRecord) -> RayCkptError:
    """The error that the record tells of, of its own class where that is ours."""
    kind: Any = getattr(errors, record.error_kind or "", RayCkptError)
    return kind(f"{record.action.title} failed: {record.error}")
