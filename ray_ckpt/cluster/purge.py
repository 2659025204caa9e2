"""A purge that a person asks for: the plan with its reasons, and carrying it out.

The plan takes for granted that checkpoints nobody has verified yet will verify; carrying it out
verifies the ones that are to stay, first, and decides again on what was found.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_ckpt.cluster.perform import ensure_verified
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import IntegrityError, PurgeRefusedError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.core.reconcile import decide_all, holds_of
from ray_ckpt.core.retention import Verdict
from ray_ckpt.core.wanted import purge_action
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.purging import purge_step
from ray_ckpt.storage.readers import readers_by_step


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


def apply_purge(catalog: Catalog, keep: KeepConfig | None) -> PurgePlan:
    """What went: each step is in the trash, from where `undo` brings it back.

    A step that must stay after all, because somebody reads it or has pinned it meanwhile, has a
    verdict that says so; the others go.

    Raises:
        IntegrityError: a checkpoint that was to stay is damaged; nothing was purged.
    """
    hopeful = _hopeful(catalog, keep)
    if not hopeful.doomed:
        return hopeful
    for verdict in hopeful.verdicts:
        if verdict.keep:
            _verify_kept(catalog, verdict.step)
    # decided again, on what is there now: a pin may have come between
    observed = _with_policy(catalog.observe().at(time.time()), keep)
    decided = _plan(observed)
    views = {view.step: view for view in observed.readable()}
    refused: dict[int, list[str]] = {}
    for step in decided.doomed:
        action = purge_action(views[step], grace_s=observed.policy.keep.trash_grace_s)
        try:
            _carry_out(catalog, action)
        except PurgeRefusedError as error:
            refused[step] = [error.what]
    return decided.without(refused)


def _carry_out(catalog: Catalog, action: Action) -> None:
    """The step is in the trash, and the record says when: from then on its grace time counts."""
    now = time.time()
    freed = purge_step(catalog, action, now=now)
    record = ActionRecord(action=action).started(now)
    catalog.records.write_action(record.succeeded({"bytes": freed}, now))


def _hopeful(catalog: Catalog, keep: KeepConfig | None) -> PurgePlan:
    """The plan, should every checkpoint verify."""
    observed = _with_policy(catalog.observe().at(time.time()), keep)
    views = tuple(
        replace(view, state=CheckpointState.VERIFIED)
        if view.state is CheckpointState.COMMITTED and view.problem is None
        else view
        for view in observed.checkpoints
    )
    return _plan(replace(observed, checkpoints=views))


def _verify_kept(catalog: Catalog, step: int) -> None:
    try:
        ensure_verified(catalog, catalog.checkpoint(step))
    except IntegrityError as error:
        raise IntegrityError(
            f"{error.what}; it was to be kept, so nothing is purged",
            error.where,
            error.safe,
            error.do,
        ) from error


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
