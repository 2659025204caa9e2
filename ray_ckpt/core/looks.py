"""Which copies are looked at again: nobody tells when one is altered or removed at its place.

    every look_every_s     their sizes, and whether the store says that they were written anew
    every scrub_every_s    every byte of them

At each place one at a time, and only while there is nothing else to do. A place that does not
answer holds up its own looks alone. A copy that is gone is made again, if a policy still asks for
it; one that is another now is nobody's to write over: it waits for a person.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copies import copies, is_at, proof_of
from ray_ckpt.core.copy_policy import Proof, PublishPolicy
from ray_ckpt.core.copy_states import findings, look_action
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.scrub import utc


@dataclass(frozen=True, slots=True, kw_only=True)
class DueLook:
    """One copy that is to be looked at."""

    action: Action
    reason: str


def overdue_looks(observed: Observation, *, now: float) -> Mapping[str, list[DueLook]]:
    """By place, the looks that are due there; the copy that was looked at longest ago first."""
    due: dict[str, list[tuple[float, DueLook]]] = defaultdict(list)
    known = findings(observed.records)
    for copy, policy in _watched(observed):
        every_s = min(s for s in (policy.look_every_s, policy.scrub_every_s) if s is not None)
        found = known.get(copy.action.key)
        last = copy.changed_at if found is None else found.looked_at
        look = look_action(copy.action)
        if now - max(last, _given_up_at(look, observed)) >= every_s:
            reason = f"last looked at {utc(last)}, every {every_s:g} s"
            due[policy.to].append((last, DueLook(action=look, reason=reason)))
    return {
        place: [
            look for _, look in sorted(looks, key=lambda known: (known[0], known[1].action.step))
        ]
        for place, looks in due.items()
    }


def proof_needed(action: Action, observed: Observation, *, now: float) -> Proof:
    """What a publish or a look is to compare."""
    if action.kind is not ActionKind.LOOK:
        return proof_of(action, observed)
    for copy, policy in _watched(observed):
        if look_action(copy.action).key == action.key and policy.scrub_every_s is not None:
            found = findings(observed.records).get(copy.action.key)
            read_at = (found and found.read_at) or copy.changed_at
            return "digests" if now - read_at >= policy.scrub_every_s else "sizes"
    return "sizes"


def _watched(observed: Observation) -> Iterator[tuple[ActionRecord, PublishPolicy]]:
    """Copies at the places whose policies ask for looks."""
    policies = [p for p in observed.policy.publish if p.look_every_s or p.scrub_every_s]
    present = copies(observed) if policies else []
    for policy in policies:
        yield from ((copy, policy) for copy in present if is_at(copy.action, policy))


def _given_up_at(look: Action, observed: Observation) -> float:
    """When the last look ended that found nothing out: the next one is due all the same, later."""
    record = observed.records.get(look.key)
    return record.changed_at if record is not None and record.state in GIVEN_UP else 0.0
