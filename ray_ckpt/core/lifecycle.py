"""States of a checkpoint and of an action, and the one table of legal moves for each.

Checkpoint                                        Action

  SAVING ──► COMMITTED ──► VERIFIED                 PENDING ──► RUNNING ──► SUCCEEDED
     │        ▲  │  │ ╲      │  │                      ▲  ▲        │
     ▼        │  │  ▼  ╲     ▼  │                      │  └──── RETRY_WAIT
 ABANDONED    │  │ QUARANTINED  │                    (retry)       │
              │  ▼              ▼                      └───────── DEAD
  FOREIGN ────┴ TRASHED ──► PURGED   (MISSING: a person took it away)

An export or a copy is a record of its own, never a state of the checkpoint.
"""

from collections.abc import Mapping
from enum import StrEnum

from ray_ckpt.core.errors import TransitionError


class CheckpointState(StrEnum):
    """What is known about one checkpoint."""

    SAVING = "saving"
    """Ranks are writing; nothing may read it."""
    COMMITTED = "committed"
    """Its manifest is there; the digests have not been recomputed since."""
    VERIFIED = "verified"
    """Every digest was recomputed from storage and equals the manifest."""
    FOREIGN = "foreign"
    """A step folder without a manifest: never used, counted or deleted until it is adopted."""
    ABANDONED = "abandoned"
    """A save that will never finish; swept after a grace time."""
    QUARANTINED = "quarantined"
    """Its bytes differ from its manifest; set aside for a person to look at."""
    MISSING = "missing"
    """It was committed and somebody else removed it."""
    TRASHED = "trashed"
    """Purged, and back with one command until the grace time is over."""
    PURGED = "purged"
    """Its bytes are gone."""


class ActionKind(StrEnum):
    """What can be done to a checkpoint, or to a save that is to become one."""

    VERIFY = "verify"
    EXPORT = "export"
    PUBLISH = "publish"
    PROMOTE = "promote"
    """Let a name at a destination lead to one of the copies there."""
    PURGE = "purge"
    RETIRE = "retire"
    """Remove a copy at its destination."""
    SCRUB = "scrub"
    """Verify once more what was verified long ago."""
    LOOK = "look"
    """Look whether a copy is still as it was made."""
    GATHER = "gather"
    """Bring to the root what one node holds of a staged save."""
    COMMIT = "commit"
    """Make a checkpoint of a staged save, all of which was brought."""
    FREE = "free"
    """Remove from one node what it holds of a staged save that has ended."""


class ActionState(StrEnum):
    """How far one action has come."""

    PENDING = "pending"
    """Waits for what it depends on, or for room."""
    RUNNING = "running"
    RETRY_WAIT = "retry_wait"
    """Failed in a way that may pass; runs again at `next_attempt_at`."""
    BLOCKED = "blocked"
    """Cannot run until something outside changes (space, a breaker)."""
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    """Failed for good; the record says why and what to type."""
    SUPERSEDED = "superseded"
    """A newer step made it needless."""
    CANCELLED = "cancelled"
    """A person stopped it, or its checkpoint is gone."""

    @property
    def is_terminal(self) -> bool:
        """Whether no further move happens without a person."""
        return not (ACTION_MOVES[self] - {ActionState.PENDING})


MERELY_LOOKS = frozenset({ActionKind.SCRUB, ActionKind.LOOK})
"""What never ends, waits for all else, and is waited for by nobody."""
WAITING = ActionState.PENDING, ActionState.RETRY_WAIT, ActionState.BLOCKED
"""What has neither ended nor begun another try."""
GIVEN_UP = ActionState.DEAD, ActionState.CANCELLED, ActionState.SUPERSEDED
"""What nobody waits for any more, unless a person asks for it again."""

CHECKPOINT_MOVES: Mapping[CheckpointState, frozenset[CheckpointState]] = {
    CheckpointState.SAVING: frozenset({CheckpointState.COMMITTED, CheckpointState.ABANDONED}),
    CheckpointState.COMMITTED: frozenset(
        {
            CheckpointState.VERIFIED,
            CheckpointState.QUARANTINED,
            CheckpointState.TRASHED,
            CheckpointState.MISSING,
        }
    ),
    CheckpointState.VERIFIED: frozenset(
        {CheckpointState.QUARANTINED, CheckpointState.TRASHED, CheckpointState.MISSING}
    ),
    CheckpointState.FOREIGN: frozenset({CheckpointState.COMMITTED, CheckpointState.MISSING}),
    CheckpointState.ABANDONED: frozenset({CheckpointState.PURGED}),
    CheckpointState.QUARANTINED: frozenset(
        {CheckpointState.COMMITTED, CheckpointState.PURGED, CheckpointState.MISSING}
    ),
    CheckpointState.MISSING: frozenset({CheckpointState.COMMITTED}),
    CheckpointState.TRASHED: frozenset({CheckpointState.COMMITTED, CheckpointState.PURGED}),
    CheckpointState.PURGED: frozenset(),
}

ACTION_MOVES: Mapping[ActionState, frozenset[ActionState]] = {
    ActionState.PENDING: frozenset(
        {
            ActionState.RUNNING,
            ActionState.BLOCKED,
            ActionState.SUPERSEDED,
            ActionState.CANCELLED,
            ActionState.DEAD,
        }
    ),
    ActionState.RUNNING: frozenset(
        {
            ActionState.SUCCEEDED,
            ActionState.RETRY_WAIT,
            ActionState.BLOCKED,
            ActionState.DEAD,
            ActionState.CANCELLED,
            ActionState.PENDING,
        }
    ),
    ActionState.RETRY_WAIT: frozenset(
        {
            ActionState.RUNNING,
            ActionState.PENDING,
            ActionState.CANCELLED,
            ActionState.SUPERSEDED,
            ActionState.DEAD,
        }
    ),
    ActionState.BLOCKED: frozenset(
        {
            ActionState.RUNNING,
            ActionState.PENDING,
            ActionState.CANCELLED,
            ActionState.SUPERSEDED,
            ActionState.DEAD,
        }
    ),
    ActionState.SUCCEEDED: frozenset(),
    ActionState.DEAD: frozenset({ActionState.PENDING}),
    ActionState.SUPERSEDED: frozenset({ActionState.PENDING}),
    ActionState.CANCELLED: frozenset({ActionState.PENDING}),
}


def move_checkpoint(current: CheckpointState, to: CheckpointState) -> CheckpointState:
    """`to`, or TransitionError if a checkpoint in `current` may not go there."""
    if to not in CHECKPOINT_MOVES[current]:
        raise _illegal("a checkpoint", current, to, CHECKPOINT_MOVES[current])
    return to


def move_action(current: ActionState, to: ActionState) -> ActionState:
    """`to`, or TransitionError if an action in `current` may not go there."""
    if to not in ACTION_MOVES[current]:
        raise _illegal("an action", current, to, ACTION_MOVES[current])
    return to


def _illegal(what: str, current: str, to: str, allowed: frozenset[str]) -> TransitionError:
    moves = ", ".join(sorted(allowed)) or "none: it is final"
    return TransitionError(
        f"{what} that is {current} cannot become {to}",
        safe="nothing was changed",
        do=f"possible: {moves}",
    )
