"""What records are to say, once people or the course of things have overtaken them. Pure."""

from collections.abc import Collection

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.gathering import is_done, is_moot
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.wanted import is_result

_UNDER_WAY = ActionState.PENDING, ActionState.RUNNING
_WAITING = ActionState.PENDING, ActionState.RETRY_WAIT, ActionState.BLOCKED
_OF_DRAFTS = ActionKind.GATHER, ActionKind.COMMIT, ActionKind.FREE


def obeyed(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records as people's commands want them from now on.

    What succeeded stays so; a command for what is over already changes nothing.
    """
    found: list[ActionRecord] = []
    for command in observed.commands:
        record = observed.records.get(command.action.key, ActionRecord(action=command.action))
        if record.state is ActionState.SUCCEEDED:
            continue
        if command.verb == "retry" and record.state not in _UNDER_WAY:
            found.append(record.asked_again(now))
        if command.verb == "cancel" and record.state not in GIVEN_UP:
            found.append(record.cancelled(f"cancelled by {command.by}", now))
    return found


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
        if action.kind in _OF_DRAFTS:
            found.extend(_of_draft(record, observed, now))
            continue
        is_purged = action.kind is ActionKind.PURGE and source in trashed
        if is_purged or _is_exported(action, observed):
            found.append(record.started(now).succeeded({}, now))
        elif source not in present:
            found.append(record.cancelled("its checkpoint is not in place any more", now))
    return found


def _of_draft(record: ActionRecord, observed: Observation, now: float) -> list[ActionRecord]:
    """The waiting record of an action about a staged save, if there is nothing to wait for."""
    if is_done(record.action, observed):
        return [record.started(now).succeeded({}, now)]
    reason = is_moot(record.action, observed)
    return [] if reason is None else [record.cancelled(reason, now)]


def _is_exported(action: Action, observed: Observation) -> bool:
    if action.kind is not ActionKind.EXPORT:
        return False
    return any(is_result(export.manifest, action) for export in observed.exports)


def unfinished(
    observed: Observation, *, now: float, elsewhere: Collection[Action] = ()
) -> list[str]:
    """A sentence for everything that has begun, waits, or could begin now; empty when idle.

    Scrubs never end, and what only others can do is theirs: nobody waits for it here.
    """
    not_here = {action.key for action in elsewhere}
    begun = {
        key: f"{record.action.title} is {record.state}"
        for key, record in observed.records.items()
        if record.state is not ActionState.SUCCEEDED
        and record.state not in GIVEN_UP
        and record.action.kind is not ActionKind.SCRUB
        and key not in not_here
    }
    may_start = {
        action.key: f"{action.title} may start"
        for action in plan(observed, now=now).actions
        if action.kind is not ActionKind.SCRUB and action.key not in not_here
    }
    return list({**may_start, **begun}.values())


def _identity(view: CheckpointView) -> tuple[int, str]:
    return view.step, view.manifest.content_id if view.manifest else ""
