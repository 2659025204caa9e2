"""What records are to say, once people or the course of things have overtaken them. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.asked import asked_purge, asked_purges
from ray_ckpt.core.copy_states import is_retired
from ray_ckpt.core.errors import PurgeRefusedError
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.gathering import is_done, is_moot
from ray_ckpt.core.lifecycle import (
    GIVEN_UP,
    MERELY_LOOKS,
    WAITING,
    ActionKind,
    ActionState,
    CheckpointState,
)
from ray_ckpt.core.observation import CheckpointView, Command, Observation
from ray_ckpt.core.reconcile import plan, purge_guards
from ray_ckpt.core.wanted import export_of, is_result

_READS = ActionKind.VERIFY, ActionKind.SCRUB
_ABOUT_COPIES = ActionKind.PROMOTE, ActionKind.RETIRE, ActionKind.LOOK
_UNDER_WAY = ActionState.PENDING, ActionState.RUNNING
_OF_DRAFTS = ActionKind.GATHER, ActionKind.COMMIT, ActionKind.FREE


def obeyed(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records as people's commands want them from now on.

    What succeeded stays so; a command for what is over already changes nothing.
    """
    found: list[ActionRecord] = []
    for command in observed.commands:
        record = _record(command.action, observed)
        if command.verb == "purge":
            asked = asked_purge(command, observed, now)
            found.extend([asked] if asked else [])
            continue
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
    if command.action.kind is not ActionKind.PUBLISH or command.action.export is None:
        return []
    export = _record(export_of(command.action), observed)
    return [export.asked_again(command.by, now)] if export.state in GIVEN_UP else []


def overtaken(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Unfinished records of what was done, or cannot be done any more, as they are to be.

    An export that is there, and a purge whose step lies in the trash, were made by a manager that
    died before it said so. A copy may be promoted, retired or looked at after its checkpoint is
    gone, as long as it is there; for anything else whose checkpoint is not in place nothing is left
    to do.
    """
    present = {_identity(view) for view in observed.readable()}
    trashed = {_identity(v) for v in observed.checkpoints if v.state is CheckpointState.TRASHED}
    found: list[ActionRecord] = []
    for record in observed.records.values():
        action = record.action
        source = (action.step, action.source_id)
        is_waiting = record.state in WAITING
        if action.kind is ActionKind.LOOK and is_waiting and _has_no_copy(action, observed):
            found.append(record.cancelled("its copy was removed, or is made anew", now))
        if not is_waiting or action.kind in _ABOUT_COPIES:
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


def _has_no_copy(look: Action, observed: Observation) -> bool:
    copy = observed.records.get(replace(look, kind=ActionKind.PUBLISH).key)
    if copy is None or copy.state is not ActionState.SUCCEEDED:
        return True
    return is_retired(copy, observed.records)


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


def refused(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records of purges that people asked for and that must not be, as they are to be.

    What speaks against one is seen here, or was found right before the step went and is in the
    record. A purge whose step is being verified just now waits.
    """
    asked = asked_purges(observed)
    guards = purge_guards(observed) if asked else {}
    reading = {
        record.action.step
        for record in observed.records.values()
        if record.action.kind in _READS and record.state is ActionState.RUNNING
    }
    found: list[ActionRecord] = []
    for step, record in asked.items():
        if record.state is ActionState.BLOCKED and record.error_class is ErrorClass.HELD:
            found.append(record.refused(record.error or "", now))
        elif guards[step] and step not in reading:
            found.append(record.refused(str(_refusal(step, guards[step])), now))
    return found


def _refusal(step: int, guards: Sequence[str]) -> PurgeRefusedError:
    return PurgeRefusedError(
        f"step-{step} stays: {'; '.join(guards)}",
        safe="it was not touched",
        do=f"ray-ckpt show ROOT {step}; once nothing keeps it: ray-ckpt retry ROOT --step {step}",
    )


def unfinished(
    observed: Observation, *, now: float, elsewhere: Collection[Action] = ()
) -> list[str]:
    """A sentence for everything that runs, waits, or could begin now; empty when idle.

    Scrubs and looks never end, and what only others can do is theirs: nobody waits for it here. Nor
    for what was begun and nothing asks for any more.
    """
    not_here = {action.key for action in elsewhere}
    planned = plan(observed, now=now)
    asked = {each.action.key for each in planned.planned}
    begun = {
        key: f"{record.action.title} is {record.state}"
        for key, record in observed.records.items()
        if (record.state is ActionState.RUNNING or (record.state in WAITING and key in asked))
        and record.action.kind not in MERELY_LOOKS
        and key not in not_here
    }
    may_start = {
        action.key: f"{action.title} may start"
        for action in planned.actions
        if action.kind not in MERELY_LOOKS and action.key not in not_here
    }
    return list({**may_start, **begun}.values())


def _record(action: Action, observed: Observation) -> ActionRecord:
    return observed.records.get(action.key, ActionRecord(action=action))


def _identity(view: CheckpointView) -> tuple[int, str]:
    return view.step, view.manifest.content_id if view.manifest else ""
