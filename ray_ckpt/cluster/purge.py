"""A purge that a person asks for: the plan with its reasons, and having it carried out.

    plan     takes for granted that checkpoints nobody has verified yet will verify
    apply    those that are to stay are verified first, and it is decided again on what was found;
             then one command a step asks whoever manages the root: the live manager, or else this
             process under the manager's lease

So one process at most moves steps and writes records, and what is asked for outlives whoever asked.
"""

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_ckpt.cluster.drain import Told, work_on
from ray_ckpt.cluster.reconciler import Round
from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.errors import error_called
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Command, Observation
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.core.reconcile import decide_all, holds_of
from ray_ckpt.core.retention import Verdict
from ray_ckpt.core.wanted import purge_action, verify_action
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.readers import readers_by_step
from ray_ckpt.storage.records import who_asks

_NEWLY = "not part of the first plan: something has changed meanwhile; ask again"
_UNDER_WAY = ActionState.PENDING, ActionState.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class PurgePlan:
    """One verdict a checkpoint, oldest first, and how many bytes each holds."""

    verdicts: tuple[Verdict, ...]
    sizes: dict[int, int]

    @property
    def doomed(self) -> list[int]:
        """Steps that go, oldest first."""
        return [verdict.step for verdict in self.verdicts if not verdict.keep]

    def without(self, reasons: Mapping[int, Sequence[str]]) -> "PurgePlan":
        """The plan with further reasons, by step, for keeping what it names."""
        verdicts = (
            replace(v, reasons=(*v.reasons, *reasons.get(v.step, ()))) for v in self.verdicts
        )
        return replace(self, verdicts=tuple(verdicts))

    def summary(self, *, applied: bool, root: str) -> str:
        """One sentence with the next command."""
        freed = f"{sum(self.sizes[step] for step in self.doomed) / 1e6:.1f} MB"
        if not self.doomed:
            return "nothing to purge"
        if applied:
            steps = f"ray-ckpt undo {root} STEP"
            return f"{len(self.doomed)} moved to the trash ({freed}); back with: {steps}"
        return f"{len(self.doomed)} would go ({freed}); nothing was changed. Do it: add --apply"

    def to_document(self, *, applied: bool) -> dict[str, Any]:
        """For `--json`."""
        return {
            "applied": applied,
            "keep": [{"step": v.step, "reasons": list(v.reasons)} for v in self.verdicts if v.keep],
            "purge": [
                {"step": v.step, "bytes": self.sizes[v.step], "reasons": [v.why_not]}
                for v in self.verdicts
                if not v.keep
            ],
        }


def plan_purge(catalog: Catalog, keep: KeepConfig | None) -> PurgePlan:
    """What would go, by `keep` or else by the run's own policy; changes nothing."""
    plan, readers = _hopeful(catalog, keep), readers_by_step(catalog.store)
    return plan.without({s: [f"it is being read: {r}" for r in readers[s]] for s in readers})


def apply_purge(
    catalog: Catalog, keep: KeepConfig | None, *, told: Told = lambda _: None
) -> PurgePlan:
    """What went: each step is in the trash, from where `undo` brings it back.

    A step that must stay after all, because somebody reads it or has pinned it meanwhile, has a
    verdict that says so; the others go. Interrupted, what was asked for already is still asked.

    Raises:
        IntegrityError: a checkpoint that was to stay is damaged; nothing was purged.
        RayCkptError: one could not be verified; nothing was purged.
    """
    hopeful = _hopeful(catalog, keep)
    if not hopeful.doomed:
        return hopeful
    _wait_until_verified(catalog, hopeful, told)
    # decided again, on what is there now: a pin may have come between
    decided = _hopeful(catalog, keep)
    newly = {step: [_NEWLY] for step in decided.doomed if step not in hopeful.doomed}
    decided = decided.without(newly)
    refused = _refused_of(catalog, decided.doomed, told)
    return decided.without(refused)


def _wait_until_verified(catalog: Catalog, hopeful: PurgePlan, told: Told) -> None:
    """Whoever manages the root has verified what is to stay, and reads nothing that is to go."""
    kept = {verdict.step for verdict in hopeful.verdicts if verdict.keep}
    verifies = {view.step: verify_action(view) for view in catalog.observe().readable()}
    keys = {verifies[step].key for step in kept & verifies.keys()}

    def is_over(done: Round) -> bool:
        may_pass = () if done.standing_by else (ActionState.RETRY_WAIT,)
        for key in keys & done.observed.records.keys():
            _raise_if_failed(done.observed.records[key], (*GIVEN_UP, *may_pass))
        going = {a.step for a in done.planned.actions if a.kind is ActionKind.PURGE}
        waiting = [v for v in done.observed.readable() if v.step in kept and not _is_verified(v)]
        is_reading = any(
            done.observed.state_of(verify) is ActionState.RUNNING for verify in verifies.values()
        )
        # what the run's own policy lets go all the same is verified by nobody
        return {view.step for view in waiting} <= going and not is_reading

    work_on(catalog, keys, until=is_over, told=told)


def _raise_if_failed(record: ActionRecord, failed: Container[ActionState]) -> None:
    if record.state in failed:
        raise error_called(record.error_kind)(
            f"{record.action.title} ended {record.state}: {_line(record)}; it was to be kept, so "
            "nothing is purged",
            safe="no step was purged",
            do=f"ray-ckpt retry ROOT --step {record.action.step}, or pin what must stay",
        )


def _refused_of(catalog: Catalog, steps: Sequence[int], told: Told) -> dict[int, list[str]]:
    """Why steps are still there, once whoever manages the root has obeyed; the others are gone."""
    observed = catalog.observe()
    grace_s = observed.policy.keep.trash_grace_s
    views = [view for view in observed.readable() if view.step in steps]
    purges = {purge.key: purge for purge in (purge_action(v, grace_s=grace_s) for v in views)}
    for purge in purges.values():
        catalog.records.add_command(Command(verb="purge", action=purge, by=who_asks()))

    def is_over(done: Round) -> bool:
        not_obeyed = {command.action.key for command in done.observed.commands}
        ended = {key for key, record in done.observed.records.items() if _has_ended(record)}
        return purges.keys() <= ended - not_obeyed

    last = work_on(catalog, purges, until=is_over, told=told).observed.records
    return {
        purge.step: [_line(last[key])]
        for key, purge in purges.items()
        if last[key].state is not ActionState.SUCCEEDED
    }


def _is_verified(view: CheckpointView) -> bool:
    return view.state is CheckpointState.VERIFIED


def _has_ended(record: ActionRecord) -> bool:
    """Whether nothing more happens to a purge soon; one that was refused is about to say so."""
    if record.state is ActionState.BLOCKED:
        return not record.asked_by or record.error_class is not ErrorClass.HELD
    return record.state not in _UNDER_WAY


def _line(record: ActionRecord) -> str:
    return (record.error or str(record.state)).partition("\n")[0]


def _hopeful(catalog: Catalog, keep: KeepConfig | None) -> PurgePlan:
    """The plan, should every checkpoint verify."""
    observed = _with_policy(catalog.observe().at(time.time()), keep)
    views = tuple(
        replace(view, state=CheckpointState.VERIFIED)
        if view.state is CheckpointState.COMMITTED and view.problem is None
        else view
        for view in observed.checkpoints
    )
    records = {
        key: record
        for key, record in observed.records.items()
        if record.action.kind is not ActionKind.VERIFY
    }  # one that is read just now is held by that for a moment only
    return _plan(replace(observed, checkpoints=views, records=records))


def _with_policy(observed: Observation, keep: KeepConfig | None) -> Observation:
    if keep is None:
        return observed
    kept = replace(keep, trash_grace_s=observed.policy.keep.trash_grace_s)
    return replace(observed, policy=replace(observed.policy, keep=kept))


def _plan(observed: Observation) -> PurgePlan:
    return PurgePlan(
        verdicts=tuple(decide_all(observed, holds=holds_of(observed), now=time.time())),
        sizes={v.step: v.manifest.total_bytes for v in observed.readable() if v.manifest},
    )
