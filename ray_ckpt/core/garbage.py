"""What of a run nobody needs any more. Pure: ages and observations come in as arguments.

    an attempt             its files have not changed for `ABANDONED_AFTER_S`; a trainer's for
                           `GRACE_S`, where no trainer writes to the root
    a record, its logs     its checkpoint is nowhere any more, and no copy of it was made
    anything else of ours  nobody has touched it for `GRACE_S`

Times are compared that two clocks have told: they may differ by less than `GRACE_S`.
"""

from ray_ckpt.core import names
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import Observation

GRACE_S = 1800.0
"""Nothing is garbage that was touched within this time."""
ABANDONED_AFTER_S = 6 * 3600.0
"""A save or an export whose files have not changed for so long is given up."""


def why_dead(attempt: str, idle_s: float, *, trainer: str | None) -> str | None:
    """Why an attempt that has been idle for so long will never end; None if it may.

    `trainer` is who writes to the root, as far as anybody can tell.
    """
    if idle_s >= ABANDONED_AFTER_S:
        return f"untouched for {duration(idle_s)}"
    if names.is_save(attempt) and trainer is None and idle_s >= GRACE_S:
        return f"untouched for {duration(idle_s)}, and no trainer writes here"
    return None


def spent_records(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records of what is over, for checkpoints of which nothing is left anywhere.

    Where a copy was made of a checkpoint, or an export of its step is here, its records are what
    is known of them, and stay.
    """
    known = {(v.step, v.manifest.content_id) for v in observed.checkpoints if v.manifest}
    unknown = {view.step for view in observed.checkpoints if view.manifest is None}
    exported = {export.step for export in observed.exports}
    copied = {
        (r.action.step, r.action.source_id)
        for r in observed.records.values()
        if r.action.kind is ActionKind.PUBLISH and r.state is ActionState.SUCCEEDED
    }
    return [
        record
        for record in observed.records.values()
        if record.state.is_terminal
        and now - record.changed_at >= GRACE_S
        and record.action.step not in unknown | exported
        and (record.action.step, record.action.source_id) not in known | copied
    ]


def duration(seconds: float) -> str:
    """A length of time as a person says it.

    >>> duration(90), duration(7200), duration(200000)
    ('2 min', '2.0 h', '2.3 d')
    """
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
