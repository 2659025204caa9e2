"""Whether a step that a plan wants to purge may really go, at the moment of going. Pure.

A plan is made of an observation, which is old when it is carried out: pins are set, readers come,
steps are saved anew or found to be damaged meanwhile. What speaks for keeping the step is looked up
again and given to `reasons_to_stay`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_ckpt.core.actions import Action
from ray_ckpt.core.retention import FLOOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of a step right before it goes."""

    content_id: str
    """Of the manifest that lies in its place."""
    pins: Sequence[str]
    """Names of the pins that hold it."""
    readers: Sequence[str]
    """Sentences about who reads it."""
    holds: Sequence[str]
    """Sentences about unfinished work that needs it."""
    ways_back: Sequence[int]
    """The other steps that a run could go on from: in place, verified, healthy, whole."""


def reasons_to_stay(standing: Standing, action: Action) -> list[str]:
    """Why the purge must not take the step; empty if it may."""
    reasons = [f"it is pinned: {name}" for name in standing.pins]
    reasons += [f"it is being read: {reader}" for reader in standing.readers]
    reasons += standing.holds
    if standing.content_id != action.source_id:
        reasons.append("another save of the step is in its place")
    if len(standing.ways_back) < FLOOR:
        there = ", ".join(str(step) for step in standing.ways_back) or "none"
        reasons.append(f"two other verified checkpoints must remain, and there are: {there}")
    return reasons
