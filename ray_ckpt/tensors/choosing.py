"""Which step is loaded: by what can be told before its shards are read.

Sizes and small files are compared here; the shards are digested by the load itself, while they come
into place (`proof`). A step that turns out damaged then is set aside, and another one is chosen.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ray_ckpt.core.errors import IntegrityError, UsageError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import READABLE
from ray_ckpt.core.resume import ResumePlan, plan_resume
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.step_errors import corrupt
from ray_ckpt.tensors.ranks import Ranks

log = logging.getLogger("ray_ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A step of the run, or none, and why."""

    manifest: Manifest | None
    reason: str
    skipped: tuple[tuple[int, str], ...] = ()
    """Newer steps that were passed over, newest first, each with the reason."""

    @property
    def step(self) -> int | None:
        """Its number."""
        return None if self.manifest is None else self.manifest.step


Hold = Callable[[int], None]
"""From now on no purge takes the step; called on rank 0, before a byte of it is read."""


def choose(catalog: Catalog, ranks: Ranks, step: int, *, hold: Hold) -> Choice:
    """The very step, all of which is there, as far as its files' sizes tell.

    Raises:
        StepNotFoundError: it is not there.
        UsageError: it holds the model only.
        IntegrityError: it is damaged; storage is not touched.
    """
    ranks.on_coordinator(lambda: hold(step))
    manifest = ranks.together(lambda: catalog.manifest(step, read=Manifest.without_tensors))
    damage = _damage(catalog, ranks, manifest)
    if damage:
        raise corrupt(catalog.uri, step, damage)
    if step > 0 and manifest.holds == "model":
        raise UsageError(
            f"step-{step} holds the model only: training cannot go on from it",
            catalog.uri,
            "nothing was loaded",
            f"start a run from it: LoadConfig(start=FromWeights(path='{catalog.uri}/step-{step}'))",
        )
    return Choice(manifest=manifest, reason="asked for by number")


def choose_newest(
    catalog: Catalog,
    ranks: Ranks,
    config: LoadConfig,
    *,
    hold: Hold,
    damaged: dict[int, str],
) -> Choice:
    """The newest step all of which is there; those that visibly are not are set aside.

    `damaged` are steps that were set aside before; those that are now are added.

    Raises:
        IntegrityError: steps are here and none can be used: a run that started from scratch
            beside them would throw them away. Or one is damaged and the config says `raise`.
    """
    while True:
        plan, visibly_damaged = ranks.on_coordinator(lambda: _plan(catalog, hold))
        if plan.refusal is not None:
            raise _refused(catalog, plan)
        manifest = None
        if plan.step is not None and not visibly_damaged:
            manifest = ranks.together(functools.partial(catalog.manifest, plan.step))
            damage = _damage(catalog, ranks, manifest)
            visibly_damaged = {plan.step: "; ".join(damage)} if damage else {}
        if not visibly_damaged:
            skipped = {**dict(plan.skipped), **damaged}
            return Choice(
                manifest=manifest,
                reason=plan.reason,
                skipped=tuple(sorted(skipped.items(), reverse=True)),
            )
        for step, why in visibly_damaged.items():
            if config.on_damage == "raise":
                raise corrupt(catalog.uri, step, [why])
            set_aside(catalog, ranks, step, why)
        damaged.update(visibly_damaged)


def _plan(catalog: Catalog, hold: Hold) -> tuple[ResumePlan, dict[int, str]]:
    """What to resume from, and newer steps in place whose sizes or manifest alone show damage.

    These must go out of the way: the run that goes on from an older step will save them again.
    """
    observed = catalog.observe()
    views = observed.checkpoints
    plan = plan_resume(views, run_id=observed.run_id)
    if plan.step is not None:
        hold(plan.step)
    at_risk = {*READABLE, CheckpointState.QUARANTINED}
    newer = (view for view in views if view.step > (plan.step or 0) and view.state in at_risk)
    damaged = {view.step: view.problem for view in newer if view.problem is not None}
    return plan, {step: why for step, why in damaged.items() if _must_go(catalog, step)}


def _must_go(catalog: Catalog, step: int) -> bool:
    """Whether a damaged step is in the way; what a newer version wrote is not ours to judge."""
    return catalog.is_in_place(step) and not catalog.is_of_another_version(step)


def _refused(catalog: Catalog, plan: ResumePlan) -> IntegrityError:
    reasons = "; ".join(f"step-{step}: {why}" for step, why in plan.skipped)
    return IntegrityError(
        f"no checkpoint can be loaded: {plan.refusal} ({reasons})",
        catalog.uri,
        "nothing was loaded, and training did not start from scratch",
        f"ray-ckpt adopt {catalog.uri} (foreign folders), or give this run a root of its own",
    )


def _damage(catalog: Catalog, ranks: Ranks, manifest: Manifest) -> list[str]:
    """Each rank looks at its share of the files; all hear of all damage."""
    part = slice(ranks.rank, None, ranks.size)
    shares = ranks.each(lambda: catalog.damage_before_reading(manifest, part=part))
    return [sentence for share in shares for sentence in share]


def set_aside(catalog: Catalog, ranks: Ranks, step: int, damage: str) -> None:
    """The damaged step is in quarantine. Collective."""

    def quarantine() -> None:
        catalog.quarantine(step)
        log.warning("step-%d is damaged and was moved to quarantine: %s", step, damage)

    ranks.on_coordinator(quarantine)
