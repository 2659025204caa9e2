"""What records are to say, once people or the course of things have overtaken them. Pure."""

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Command, Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import export_of, is_result

_UNDER_WAY = ActionState.PENDING, ActionState.RUNNING
_WAITING = ActionState.PENDING, ActionState.RETRY_WAIT, ActionState.BLOCKED


def obeyed(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records as people's commands want them from now on.

    What succeeded stays so; a command for what is over already changes nothing.
    """
    found: list[ActionRecord] = []
    for command in observed.commands:
        record = _record(command.action, observed)
        if record.state is ActionState.SUCCEEDED:
            continue
        if command.verb == "retry" and record.state not in _UNDER_WAY:
            found.append(record.asked_again(command.by, now))
            found.extend(_export_again(command, observed, now))
        if command.verb == "cancel" and record.state not in GIVEN_UP:
            found.append(record.cancelled(f"cancelled by {command.by}", now))
    return found


def _export_again(command: Command, observed: Observation, now: float) -> list[ActionRecord]:
    """A copy that is tried again needs its export, should that have been given up."""
    if command.action.kind is not ActionKind.PUBLISH:
        return []
    export = _record(export_of(command.action), observed)
    return [export.asked_again(command.by, now)] if export.state in GIVEN_UP else []


def overtaken(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Unfinished records of what was done, or cannot be done any more, as they are to be.

    An export that is there, and a purge whose step lies in the trash, were made by a manager that
    died before it said so. A copy may be retired after its checkpoint is gone; for anything else
    whose checkpoint is not in place nothing is left to do.
    """
    present = {_identity(view) for view in observed.readable()}
    trashed = {_identity(v) for v in observed.checkpoints if v.state is CheckpointState.TRASHED}
    found: list[ActionRecord] = []
    for record in observed.records.values():
        action = record.action
        source = (action.step, action.source_id)
        if record.state not in _WAITING or action.kind is ActionKind.RETIRE:
            continue
        is_purged = action.kind is ActionKind.PURGE and source in trashed
        if is_purged or _is_exported(action, observed):
            found.append(record.started(now).succeeded({}, now))
        elif source not in present:
            found.append(record.cancelled("its checkpoint is not in place any more", now))
    return found


def _is_exported(action: Action, observed: Observation) -> bool:
    if action.kind is not ActionKind.EXPORT:
        return False
    return any(is_result(export.manifest, action) for export in observed.exports)


def unfinished(observed: Observation, *, now: float) -> list[str]:
    """A sentence for everything that runs, waits, or could begin now; empty when idle.

    Scrubs never end: nobody waits for them. Nor for what was begun and nothing asks for any more.
    """
    planned = plan(observed, now=now)
    asked = {each.action.key for each in planned.planned}
    begun = {
        key: f"{record.action.title} is {record.state}"
        for key, record in observed.records.items()
        if (record.state is ActionState.RUNNING or (record.state in _WAITING and key in asked))
        and record.action.kind is not ActionKind.SCRUB
    }
    may_start = {
        action.key: f"{action.title} may start"
        for action in planned.actions
        if action.kind is not ActionKind.SCRUB
    }
    return list({**may_start, **begun}.values())


def _record(action: Action, observed: Observation) -> ActionRecord:
    return observed.records.get(action.key, ActionRecord(action=action))


def _identity(view: CheckpointView) -> tuple[int, str]:
    return view.step, view.manifest.content_id if view.manifest else ""
