"""What became of a copy since it was made, as the last look at it says.

The record of a look says at which copy: one that was made anew is another one, and nothing is known
of it. What was found counts until the next look has ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.lifecycle import ActionKind, ActionState

COPIED_AT = "copied_at"
"""In the result of a retire and of a look: when its copy was made, by the publish's record."""
STATE, WHY = "state", "why"
LOOKED_AT, READ_AT = "looked_at", "read_at"
"""When the copy was looked at last, and when every byte of it was read and equal."""
FINGERPRINT = "fingerprint"
"""Also of a publish: what the store said of the files' versions then; empty where it says none."""


class CopyState(StrEnum):
    """What became of a copy."""

    PRESENT = "present"
    STALE = "stale"
    """Something else is there: it was altered, moved or replaced."""
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a look has found."""

    state: CopyState
    why: str
    looked_at: float
    read_at: float | None


def look_action(publish: Action) -> Action:
    """Look whether the copy that `publish` made is still as it was."""
    return replace(publish, kind=ActionKind.LOOK)


def findings(records: Mapping[str, ActionRecord]) -> dict[str, Finding]:
    """By the key of its publish, what was found of each copy that was looked at since it was made.

    Nothing of one that was retired since.
    """
    found: dict[str, Finding] = {}
    for look in records.values():
        if look.action.kind is ActionKind.LOOK and STATE in look.result:
            copy = records.get(replace(look.action, kind=ActionKind.PUBLISH).key)
            if copy is not None and _is_about(look, copy) and not is_retired(copy, records):
                found[copy.action.key] = _finding(look)
    return found


def losses(records: Mapping[str, ActionRecord]) -> dict[str, Finding]:
    """Those of them that say that the copy is not what it was."""
    found = findings(records)
    return {key: f for key, f in found.items() if f.state is not CopyState.PRESENT}


def is_retired(copy: ActionRecord, records: Mapping[str, ActionRecord]) -> bool:
    """Whether this very copy was removed; one that was made anew since was not."""
    retire = records.get(replace(copy.action, kind=ActionKind.RETIRE).key)
    if retire is None or retire.state is not ActionState.SUCCEEDED:
        return False
    return retire.result.get(COPIED_AT) == copy.changed_at


def _is_about(look: ActionRecord, copy: ActionRecord) -> bool:
    is_there = copy.state is ActionState.SUCCEEDED
    return is_there and look.result.get(COPIED_AT) == copy.changed_at


def _finding(look: ActionRecord) -> Finding:
    return Finding(
        state=CopyState(look.result[STATE]),
        why=look.result.get(WHY, ""),
        looked_at=look.result[LOOKED_AT],
        read_at=look.result.get(READ_AT),
    )
