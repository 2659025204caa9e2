"""Which copy a name at a destination leads to: the newest there, or the best. Pure.

    <destination>/exports/hf/step-300/
    <destination>/exports/hf/step-400/
    <destination>/exports/hf/latest  ──► step-400

What it leads to now is what the last promote that succeeded says. It may go back to an older copy,
as the best one changes. Never chosen are copies of steps with NaN or Inf in their weights, exports
that were made although they might have some, and copies that somebody removes.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copies import is_at, present_copies, retire_action
from ray_ckpt.core.copy_policy import PublishPolicy
from ray_ckpt.core.lifecycle import WAITING, ActionKind, ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.retention import Candidate

METRICS, NON_FINITE = "metrics", "non_finite"
"""In the result of a publish: the step's metrics, and how many tensors hold NaN or Inf."""
EPOCH = "epoch"
"""In every result: of the manager that had it done. Clocks of two managers may differ."""
_Place = tuple[str, str | None, str | None]
"""Export, destination and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotions:
    """What names lead to, and what is to change."""

    planned: tuple[tuple[Action, str], ...]
    """Promotes to carry out, each with its reason."""
    copies: frozenset[str]
    """Keys of the publishes whose copies names lead to, or are to lead to: they stay."""


def promote_action(publish: Action, pointer: str) -> Action:
    """The name leads to what `publish` copied."""
    return replace(publish, kind=ActionKind.PROMOTE, pointer=pointer)


def publish_of(promote: Action) -> Action:
    """What made the copy that `promote` lets a name lead to."""
    return replace(promote, kind=ActionKind.PUBLISH, pointer=None)


def promotions(observed: Observation) -> Promotions:
    """Where names lead now, and where policies want them to."""
    current = _current(observed)
    wanted = list(_wanted(observed))
    planned = [(promote, why) for promote, why in wanted if current.get(_place(promote)) != promote]
    kept = (*current.values(), *(promote for promote, _ in wanted))
    return Promotions(
        planned=tuple(planned), copies=frozenset(publish_of(promote).key for promote in kept)
    )


def _current(observed: Observation) -> dict[_Place, Action]:
    """The last promote of each name that succeeded."""
    done: dict[_Place, list[ActionRecord]] = defaultdict(list)
    for record in observed.records.values():
        is_promote = record.action.kind is ActionKind.PROMOTE
        if is_promote and record.state is ActionState.SUCCEEDED:
            done[_place(record.action)].append(record)
    return {place: max(records, key=_when).action for place, records in done.items()}


def _when(record: ActionRecord) -> tuple[int, float]:
    return record.result.get(EPOCH, 0), record.changed_at


def _place(promote: Action) -> _Place:
    assert promote.export is not None, "a promote names its export"
    return promote.export.name, promote.destination, promote.pointer


def _wanted(observed: Observation) -> Iterator[tuple[Action, str]]:
    """For each name, the promote that lets it lead where its policy wants."""
    policies = [policy for policy in observed.policy.publish if policy.promote is not None]
    present = present_copies(observed) if policies else []
    sick = {v.manifest.content_id for v in observed.checkpoints if v.manifest and not v.is_healthy}
    for policy in policies:
        there = [
            copy
            for copy in present
            if is_at(copy.action, policy)
            and copy.action.source_id not in sick
            and _is_worthy(copy, observed)
        ]
        chosen = _chosen(policy, there)
        if policy.promote is not None and chosen is not None:
            by = f"best by {policy.metric} ({policy.order})" if policy.ranking else "newest"
            yield promote_action(chosen.action, policy.promote), f"the {by} copy there"


def _is_worthy(copy: ActionRecord, observed: Observation) -> bool:
    """Whether a name may lead to it: healthy as far as is known, and nobody removes it."""
    spec = copy.action.export
    removal = observed.state_of(retire_action(copy.action))
    is_going = removal is ActionState.RUNNING or removal in WAITING
    is_forced = spec is None or spec.allow_non_finite
    return not (is_forced or is_going or copy.result.get(NON_FINITE))


def _chosen(policy: PublishPolicy, there: list[ActionRecord]) -> ActionRecord | None:
    """The copy that the policy's name is to lead to; None if there is none."""
    by_step = {c.action.step: c for c in sorted(there, key=lambda c: c.changed_at)}
    if policy.ranking is None:
        return by_step[max(by_step)] if by_step else None
    candidates = [
        Candidate(step=step, is_verified=True, metrics=by_step[step].result.get(METRICS, {}))
        for step in sorted(by_step)
    ]
    return next((by_step[step] for step in policy.ranking.reasons(candidates)), None)
