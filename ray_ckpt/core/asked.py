"""Purges that people ask for, by step. Pure.

A person overrules policies: a step they name goes though a policy keeps it. Nobody overrules what
nothing may purge: the newest two verified steps and newer ones, pinned ones, held ones. A purge
that meets one of these ends at once, and its record says which (`core.settling`).
"""

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import WAITING, ActionKind, ActionState
from ray_ckpt.core.observation import Command, Observation


def asked_purge(command: Command, observed: Observation, now: float) -> ActionRecord | None:
    """The record of a purge that somebody asks for now; None if it is done, or being done."""
    record = observed.records.get(command.action.key)
    state = record.state if record else None
    is_gone = not observed.holds_content(command.action)
    if state is ActionState.RUNNING or (state is ActionState.SUCCEEDED and is_gone):
        return None
    return ActionRecord(action=command.action, asked_by=command.by, changed_at=now)


def asked_purges(observed: Observation) -> dict[int, ActionRecord]:
    """By step, the record of each purge that a person asked for and that has not ended."""
    return {
        record.action.step: record
        for record in observed.records.values()
        if record.action.kind is ActionKind.PURGE and record.asked_by
        if record.state in WAITING and observed.holds_content(record.action)
    }
