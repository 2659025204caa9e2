"""An action that somebody asked for: done by the root's manager, or by this process in its place.

Either way it is a request on storage first and a record at the end: whatever dies in between, the
next manager finishes it. All of it is safe to interrupt and to repeat.
"""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ray_ckpt.cluster.connect import start_manager_job
from ray_ckpt.cluster.drain import POLL_S, Told, work_on
from ray_ckpt.cluster.reach import connect
from ray_ckpt.cluster.reconciler import Round
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.errors import StorageError, error_called
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import CheckpointView, Request
from ray_ckpt.core.wanted import is_result, manifest_of, verify_action
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.copies.publish import refuse_no_place


def perform_here(
    catalog: Catalog,
    action: Action,
    *,
    verify: Proof = "sizes",
    told: Told = lambda _: None,
) -> ActionRecord:
    """The action is done, and what must come before it: by this process, or by the live manager.

    `verify` says what is to prove that a copy is whole.

    Raises:
        UsageError: nothing can be copied to such a destination; nothing is asked for.
        RayCkptError: it failed, for the reason that its record names. If that may pass, it is still
            asked for.
    """
    _refuse_no_place(action)
    _start_afresh(catalog, action)
    _ask(catalog, action, verify)
    concerned = {needed.key for needed in _chain(action)}

    def is_over(done: Round) -> bool:
        records = [r for key, r in done.observed.records.items() if key in concerned]
        if done.standing_by is None:
            _raise_if(records, ActionState.DEAD, ActionState.RETRY_WAIT)
        _raise_if(records, ActionState.DEAD)
        return is_done(catalog, action)

    work_on(catalog, concerned, until=is_over, told=told)
    return catalog.records.action(action)


def verify_here(catalog: Catalog, checkpoint: CheckpointView) -> ActionRecord:
    """Every byte of the checkpoint was read and is as the manifest says; the record says so.

    Unlike the manager's own verify action this never moves a damaged step: a person is looking.

    Raises:
        IntegrityError: names each damaged file; storage is not touched.
    """
    catalog.verify(checkpoint.step)
    return record_verified(catalog, checkpoint)


def record_verified(catalog: Catalog, checkpoint: CheckpointView) -> ActionRecord:
    """The record says that every byte of the checkpoint has just been read and was as it should be.

    Nothing is written to a root that may only be read: it can be verified all the same.
    """
    num_bytes = manifest_of(checkpoint).total_bytes
    record = ActionRecord(action=verify_action(checkpoint)).started(time.time())
    record = record.succeeded({"bytes": num_bytes}, time.time())
    with contextlib.suppress(StorageError):
        catalog.records.write_action(record)
    return record


def perform_on_cluster(
    root: str,
    action: Action,
    *,
    address: str,
    verify: Proof = "sizes",
    told: Told = lambda _: None,
) -> ActionRecord:
    """The export or publish is done, by the root's manager on the cluster at `address`.

    What failed before gets a fresh start, and a copy that was made before is looked for again.

    Raises:
        UsageError: nothing can be copied to such a destination; nothing is asked for.
        RayCkptError: the action is DEAD, for the reason that its record names.
    """
    _refuse_no_place(action)
    connect(address)
    catalog = open_catalog(root)
    if action.kind is ActionKind.EXPORT and is_done(catalog, action):
        return catalog.records.action(action)
    _start_afresh(catalog, action)
    return _wait(catalog, action, verify, start_manager_job(root), told)


def _wait(
    catalog: Catalog, action: Action, verify: Proof, manager: Any, told: Told
) -> ActionRecord:
    said: dict[str, ActionState] = {}
    while not is_done(catalog, action):
        found = _concerned(catalog, action)
        _raise_if(found, ActionState.DEAD)
        _ask(catalog, action, verify)  # once more is not twice
        manager.wake.remote()
        states = {action.title: ActionState.PENDING} | {r.action.title: r.state for r in found}
        for title, state in states.items():
            if said.get(title) is not state:
                told(f"{title}: {state}")
        said = states
        time.sleep(POLL_S)
    return catalog.records.action(action)


def _refuse_no_place(action: Action) -> None:
    if action.destination is not None:
        refuse_no_place(action.destination)


def _ask(catalog: Catalog, action: Action, verify: Proof) -> None:
    """The request is on storage before anybody hears of it."""
    request = Request(
        step=action.step, export=action.export, destination=action.destination, verify=verify
    )
    catalog.records.add_request(request)


def _start_afresh(catalog: Catalog, action: Action) -> None:
    for record in _concerned(catalog, action):
        is_own = record.action.key == action.key
        if record.state.is_terminal and (is_own or record.state is not ActionState.SUCCEEDED):
            catalog.records.forget_action(record.action)


def is_done(catalog: Catalog, action: Action) -> bool:
    """By its effect where storage shows it and nobody is at work on it, else by its record."""
    state = catalog.records.action(action).state
    if action.kind is not ActionKind.EXPORT:
        return state is ActionState.SUCCEEDED
    exports = catalog.observe().exports
    is_there = any(is_result(export.manifest, action) for export in exports)
    return is_there and state is not ActionState.RUNNING


def _raise_if(records: Iterable[ActionRecord], *states: ActionState) -> None:
    """The error that a record in one of these states tells of, of its own class if it is ours."""
    for record in records:
        if record.state in states:
            raise error_called(record.error_kind)(f"{record.action.title} failed: {record.error}")


def _concerned(catalog: Catalog, action: Action) -> list[ActionRecord]:
    keys = {needed.key for needed in _chain(action)}
    return [r for r in catalog.records.actions().values() if r.action.key in keys]


def _chain(action: Action) -> tuple[Action, ...]:
    """The verify and the export that must come before it, and the action itself."""
    verify = replace(action, kind=ActionKind.VERIFY, export=None, destination=None)
    if action.export is None:
        return verify, action
    return verify, replace(action, kind=ActionKind.EXPORT, destination=None), action
