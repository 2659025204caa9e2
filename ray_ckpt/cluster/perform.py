"""An action that somebody asked for: done by the manager on a cluster, or in this process.

Both ways leave the same record under `.ray_ckpt/actions/`, so `ray-ckpt ls` and the next manager
know of it, and both are safe to interrupt and to repeat.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ray

from ray_ckpt.cluster.connect import start_manager_job
from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core import errors
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import RayCkptError, StorageError
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Request
from ray_ckpt.core.reconcile import is_result, verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog

POLL_S = 0.3
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
    """The export or publish is done, by the root's manager on the cluster at `address`.

    The request is on storage before the manager hears of it: whatever dies, it is not lost. What
    failed before gets a fresh start, and a copy that was made before is looked for again.

    Raises:
        RayCkptError: the action is DEAD, for the reason that its record names.
    """
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    catalog = open_catalog(root)
    if action.kind is ActionKind.EXPORT and _is_exported(catalog, action):
        return catalog.records.action(action)
    _start_afresh(catalog, action)
    return _wait(catalog, action, start_manager_job(root), told)


def _start_afresh(catalog: Catalog, action: Action) -> None:
    for record in _concerned(catalog, action):
        is_own = record.action.key == action.key
        if record.state.is_terminal and (is_own or record.state is not ActionState.SUCCEEDED):
            catalog.records.forget_action(record.action)


def _wait(catalog: Catalog, action: Action, manager: Any, told: Told) -> ActionRecord:
    assert action.export is not None, "only exports and copies are asked for"
    request = Request(step=action.step, export=action.export, destination=action.destination)
    said = ""
    while True:
        found = {record.action.key: record for record in _concerned(catalog, action)}
        record = found.get(action.key, ActionRecord(action=action))
        if record.state is ActionState.SUCCEEDED:
            return record
        _raise_if_dead(found.values())
        catalog.records.add_request(request)  # once more is not twice
        manager.wake.remote()
        sentence = f"{action.title}: {record.state}"
        if sentence != said:
            told(sentence)
            said = sentence
        time.sleep(POLL_S)


def _raise_if_dead(records: Iterable[ActionRecord]) -> None:
    """The error that a dead record tells of, of its own class where that is ours."""
    for record in records:
        if record.state is ActionState.DEAD:
            kind: Any = getattr(errors, record.error_kind or "", RayCkptError)
            raise kind(f"{record.action.title} failed: {record.error}")


def _is_exported(catalog: Catalog, action: Action) -> bool:
    return any(is_result(export.manifest, action) for export in catalog.observe().exports)


def _concerned(catalog: Catalog, action: Action) -> list[ActionRecord]:
    """Records of the action and of what must come before it: the verify, and the export."""
    before = (
        replace(action, kind=ActionKind.VERIFY, export=None, destination=None),
        replace(action, kind=ActionKind.EXPORT, destination=None),
    )
    keys = {needed.key for needed in (*before, action)}
    return [r for r in catalog.records.actions().values() if r.action.key in keys]
