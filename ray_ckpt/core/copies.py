"""Copies at their destinations: which are there, and which of them their policy lets go.

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

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copy_policy import KeepCopies, Proof, PublishPolicy
from ray_ckpt.core.copy_states import is_retired, losses
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import Observation, Request
from ray_ckpt.core.retention import Candidate
from ray_ckpt.core.wanted import is_result


def retire_action(publish: Action) -> Action:
    """Remove at its destination what `publish` copied there."""
    return replace(publish, kind=ActionKind.RETIRE)


def folder_of(publish: Action) -> str:
    """Where what it copies lies, at the root as at the destination."""
    if publish.export is None:
        return names.step_dir(publish.step)
    return names.export_dir(publish.export.name, publish.step)


def is_copy_of(manifest: Manifest, publish: Action) -> bool:
    """Whether a folder with this manifest is what `publish` copies, as far as the action says."""
    if publish.export is None:
        return manifest.content_id == publish.source_id
    return is_result(manifest, publish)


def copies(observed: Observation) -> list[ActionRecord]:
    """Records of the copies that are elsewhere, as far as is known here."""
    return [
        record
        for record in observed.records.values()
        if record.action.kind is ActionKind.PUBLISH
        and record.state is ActionState.SUCCEEDED
        and not is_retired(record, observed.records)
    ]


def present_copies(observed: Observation) -> list[ActionRecord]:
    """The same without those that a look did not find as they were made."""
    lost, present = losses(observed.records), copies(observed)
    return [copy for copy in present if copy.action.key not in lost] if lost else present


def retirements(observed: Observation, promoted: Container[str]) -> Iterator[tuple[Action, str]]:
    """What to remove at destinations, each with the reason, oldest first at each place.

    `promoted` are the keys of the copies that a name leads to, or is to lead to.
    """
    present = present_copies(observed)
    for policy in observed.policy.publish:
        if policy.keep is not None:
            there = [copy.action for copy in present if is_at(copy.action, policy)]
            let_go = _let_go(sorted(there, key=lambda a: a.step), policy.keep, observed)
            yield from ((retire_action(c), why) for c, why in let_go if c.key not in promoted)


def is_at(copy: Action, policy: PublishPolicy) -> bool:
    """Whether the policy is about the place where this copy lies."""
    return (_name_in(copy), copy.destination) == (policy.export, policy.to)


def proof_of(action: Action, observed: Observation) -> Proof:
    """What is to say that a copy is whole, as policies and requests for it want: the most of it."""
    if action.kind is not ActionKind.PUBLISH:
        return "sizes"
    by_policy = [policy.verify for policy in observed.policy.publish if is_at(action, policy)]
    by_request = [
        request.verify
        for request in observed.requests
        if (request.step, request.export, request.destination)
        == (action.step, action.export, action.destination)
    ]
    return "digests" if "digests" in (*by_policy, *by_request) else "sizes"


def _let_go(
    there: list[Action], keep: KeepCopies, observed: Observation
) -> Iterator[tuple[Action, str]]:
    policies = keep.policies()
    steps = sorted({copy.step for copy in there})
    candidates = [Candidate(step=step, is_verified=True, metrics={}) for step in steps]
    kept = {step for policy in policies for step in policy.reasons(candidates)} | {*steps[-1:]}
    pinned = {view.step for view in observed.checkpoints if view.pins}
    asked = {(r.step, _name_in(r), r.destination) for r in observed.requests}
    for copy in there:
        if copy.step in kept | pinned or (copy.step, _name_in(copy), copy.destination) in asked:
            continue
        titles = ", ".join(policy.title for policy in policies)
        yield copy, f"at {copy.destination} kept by none of: {titles}"


def _name_in(about: Action | Request) -> str | None:
    """Of the export that it is about; None for the checkpoint itself."""
    return None if about.export is None else about.export.name
