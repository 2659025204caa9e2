"""Copies of exports at their destinations: which are there, and which their policy lets go.

What is there is known from records: a copy was made, and was not retired since. The rule for
retiring one, that is removing it at its destination:

    its destination's `keep` does not keep it, and
    it is not the newest copy recorded there, and
    no name there leads to it, or is to lead to it, and
    nobody has pinned its step or asks for this copy now.

Whoever carries it out looks at the destination first, and refuses unless a newer copy of the same
run is there in truth. A copy that went this way counts as made: it lets its checkpoint be purged,
and is not made again. So a step is gone everywhere only once two policies have let it go, one at
each place, while newer steps are at both.
"""

from collections.abc import Container, Iterator
from dataclasses import replace

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import KeepCopies, PublishPolicy
from ray_ckpt.core.retention import Candidate

COPIED_AT = "copied_at"
"""In the result of a retire: when the copy was made that it removed, by the publish's record."""


def retire_action(publish: Action) -> Action:
    """Remove at its destination what `publish` copied there."""
    return replace(publish, kind=ActionKind.RETIRE)


def copies(observed: Observation) -> list[ActionRecord]:
    """Records of the copies that are elsewhere, as far as is known here."""
    return [
        record
        for record in observed.records.values()
        if record.action.kind is ActionKind.PUBLISH
        and record.state is ActionState.SUCCEEDED
        and not _is_retired(record, observed)
    ]


def _is_retired(copy: ActionRecord, observed: Observation) -> bool:
    """Whether this very copy was removed; one that was made anew since was not."""
    record = observed.records.get(retire_action(copy.action).key)
    if record is None or record.state is not ActionState.SUCCEEDED:
        return False
    return record.result.get(COPIED_AT) == copy.changed_at


def retirements(observed: Observation, promoted: Container[str]) -> Iterator[tuple[Action, str]]:
    """What to remove at destinations, each with the reason, oldest first at each place.

    `promoted` are the keys of the copies that a name leads to, or is to lead to.
    """
    present = copies(observed)
    for policy in observed.policy.publish:
        if policy.keep is not None:
            there = [copy.action for copy in present if is_at(copy.action, policy)]
            let_go = _let_go(sorted(there, key=lambda a: a.step), policy.keep, observed)
            yield from ((retire_action(c), why) for c, why in let_go if c.key not in promoted)


def is_at(copy: Action, policy: PublishPolicy) -> bool:
    """Whether the policy is about the place where this copy lies."""
    name = copy.export.name if copy.export else None
    return (name, copy.destination) == (policy.export, policy.to)


def _let_go(
    there: list[Action], keep: KeepCopies, observed: Observation
) -> Iterator[tuple[Action, str]]:
    policies = keep.policies()
    steps = sorted({copy.step for copy in there})
    candidates = [Candidate(step=step, is_verified=True, metrics={}) for step in steps]
    kept = {step for policy in policies for step in policy.reasons(candidates)} | {*steps[-1:]}
    pinned = {view.step for view in observed.checkpoints if view.pins}
    asked = {(r.step, r.export.name, r.destination) for r in observed.requests}
    for copy in there:
        name = copy.export.name if copy.export else ""
        if copy.step in kept | pinned or (copy.step, name, copy.destination) in asked:
            continue
        titles = ", ".join(policy.title for policy in policies)
        yield copy, f"at {copy.destination} kept by none of: {titles}"
