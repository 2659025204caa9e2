"""Which verified step is read again next: bytes rot, and nobody looks at an old step.

A scrub is an action of its own, whose one record is written anew each round: a round that fails
for a passing reason does not take back that the step was verified. Damage quarantines the step.
"""

from collections.abc import Iterator
from datetime import UTC, datetime

from ray_ckpt.core.actions import Action
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.wanted import manifest_of, scrub_action


def overdue_scrubs(observed: Observation, *, now: float) -> Iterator[tuple[Action, str]]:
    """Scrubs that are due by policy, each with the reason; the longest unread step first."""
    every_s = observed.policy.verify.scrub_every_s
    if every_s is None:
        return
    read_at = _read_at(observed)
    verified = (
        (read_at.get((c.step, manifest_of(c).content_id), 0.0), c.step, c)
        for c in observed.readable()
        if c.state is CheckpointState.VERIFIED
    )
    for last, _, checkpoint in sorted(verified, key=lambda known: known[:2]):
        if now - last >= every_s:
            reason = f"last verified {utc(last)}, verify.scrub_every_s is {every_s:g}"
            yield scrub_action(checkpoint), reason


def _read_at(observed: Observation) -> dict[tuple[int, str], float]:
    """When every byte of a checkpoint was last found to be as its manifest says."""
    read_at: dict[tuple[int, str], float] = {}
    for record in observed.records.values():
        is_look = record.action.kind in (ActionKind.VERIFY, ActionKind.SCRUB)
        if is_look and record.state is ActionState.SUCCEEDED:
            content = (record.action.step, record.action.source_id)
            read_at[content] = max(read_at.get(content, 0.0), record.changed_at)
    return read_at


def utc(seconds: float) -> str:
    """A moment as a person writes it: `2026-11-22T15:45:40+00:00`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
