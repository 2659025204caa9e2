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


def finding_of(copy: ActionRecord, records: Mapping[str, ActionRecord]) -> Finding | None:
    """What was found of this very copy; None if nobody has looked since it was made."""
    look = records.get(look_action(copy.action).key)
    if look is None or copy.state is not ActionState.SUCCEEDED:
        return None
    found = look.result
    if STATE not in found or found.get(COPIED_AT) != copy.changed_at:
        return None
    return Finding(
        state=CopyState(found[STATE]),
        why=found.get(WHY, ""),
        looked_at=found[LOOKED_AT],
        read_at=found.get(READ_AT),
    )


def loss_of(copy: ActionRecord, records: Mapping[str, ActionRecord]) -> Finding | None:
    """The same if it says that the copy is not what it was."""
    found = finding_of(copy, records)
    return None if found is None or found.state is CopyState.PRESENT else found
