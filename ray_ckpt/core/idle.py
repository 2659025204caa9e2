"""What is done when there is nothing else to do: old steps are read, copies are looked at. Pure.

One scrub at a time, and beside it one look at each place that has copies: a place that does not
answer holds up its own looks alone.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState
from ray_ckpt.core.looks import overdue_looks
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.scrub import overdue_scrubs, utc


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleAction:
    """One thing to do when all other work is done."""

    action: Action
    reason: str
    not_yet: str | None
    """Why its record does not let it begin; None if it does."""


def idle_actions(
    observed: Observation, *, going: Container[int], now: float
) -> Iterator[IdleAction]:
    """The next of each kind and place: what runs, else the first that may; no step that goes."""
    scrubs = [s for s in overdue_scrubs(observed, now=now) if s[0].step not in going]
    looks = overdue_looks(observed, now=now)
    lanes = [scrubs, *([(look.action, look.reason) for look in at] for at in looks.values())]
    for lane in lanes:
        for action, reason in _next_of(lane, observed, now):
            waits = not_yet(_open_record(action, observed), now)
            yield IdleAction(action=action, reason=reason, not_yet=waits)


def _next_of(
    lane: Sequence[tuple[Action, str]], observed: Observation, now: float
) -> Sequence[tuple[Action, str]]:
    """One of them at most; none if all have failed and wait."""
    running = [each for each in lane if observed.state_of(each[0]) is ActionState.RUNNING]
    ready = [each for each in lane if not_yet(_open_record(each[0], observed), now) is None]
    return (running or ready)[:1]


def _open_record(action: Action, observed: Observation) -> ActionRecord | None:
    """Its record; of a look that was given up none: it is due anew."""
    record = observed.records.get(action.key)
    is_over = record is not None and record.state in GIVEN_UP
    return None if is_over and action.kind is ActionKind.LOOK else record


def not_yet(record: ActionRecord | None, now: float) -> str | None:
    """Why an action's record does not let it run now; None if it may.

    Success recorded before does not count: what is planned is what storage shows to be undone.
    """
    if record is None or record.state in (ActionState.PENDING, ActionState.SUCCEEDED):
        return None
    if record.is_refusal:
        return None  # of what a person asked for, at that time
    error = (record.error or "").partition("\n")[0]
    if record.state in (ActionState.RETRY_WAIT, ActionState.BLOCKED):
        due = record.next_attempt_at
        if due is not None and now >= due:
            return None
        when = "nobody knows when" if due is None else utc(due)
        return f"attempt {record.attempts + 1} at {when}; the last one: {error}"
    if record.state is ActionState.RUNNING:
        return f"running since {utc(record.changed_at)}, attempt {record.attempts}"
    tried = f" after {record.attempts} attempts" if record.attempts else ""
    return f"{record.state}{tried}: {error}"
