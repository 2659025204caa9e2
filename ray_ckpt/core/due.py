"""Which exports the policy asks for, of which steps, and which of its lines says so.

A step that was among the best when it was exported stays asked for: its copies are still made and
still hold it. What is best is decided among the checkpoints that are here and the exports that
were made, so that purging the best one does not make the second best worth an export.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ray_ckpt.core.copy_policy import WhenBehind
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import ExportPolicy
from ray_ckpt.core.retention import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class DueExport:
    """One export that the policy asks for."""

    spec: ExportSpec
    reason: str
    is_periodic: bool
    """Whether `every_steps` alone asks for it."""
    when_behind: WhenBehind


def due_exports(observed: Observation) -> dict[int, list[DueExport]]:
    """For each readable step, what the policy wants exported; nothing of an unhealthy one."""
    best = {policy.name: _best(policy, observed) for policy in observed.policy.export}
    made = {(e.name, e.step): e.manifest for e in observed.exports}
    due: dict[int, list[DueExport]] = {}
    for checkpoint in observed.readable():
        due[checkpoint.step] = [
            DueExport(
                spec=spec_of(policy),
                reason=reasons[0],
                is_periodic=reasons == [_every(policy)],
                when_behind=policy.when_behind,
            )
            for policy in observed.policy.export
            if checkpoint.is_healthy
            and (reasons := _reasons(policy, checkpoint, best[policy.name], made))
        ]
    return due


def spec_of(policy: ExportPolicy) -> ExportSpec:
    """What the policy exports."""
    return ExportSpec(
        name=policy.name,
        dtype=policy.dtype,
        flavors=policy.flavors,
        format=policy.format,
        max_shard_bytes=policy.max_shard_bytes,
        device=policy.device,
        logits_within=policy.logits_within,
        license=policy.license,
    )


def is_export_of(manifest: Manifest, source_id: str, spec: ExportSpec) -> bool:
    """Whether an export with this manifest was made of that checkpoint, as `spec` says."""
    recipe = manifest.lineage.recipe
    if recipe.get("name") != spec.name or manifest.lineage.source_id != source_id:
        return False
    return spec.recipe == {key: value for key, value in recipe.items() if key != "family"}


def unreported_metrics(observed: Observation) -> Iterator[str]:
    """Sentences about rankings that never rank anything, because no step reports their metric."""
    trained = [c for c in observed.readable() if c.step > 0]
    reported = {name for c in trained if c.manifest for name in c.manifest.metrics}
    rankings = {f"export {p.name}": p.metric for p in observed.policy.export if p.best}
    for copy in observed.policy.publish:
        if copy.ranking is not None:
            rankings[f"{copy.promote} at {copy.to}"] = copy.metric
    if observed.policy.keep.best:
        rankings["keep"] = observed.policy.keep.best_metric
    for what, metric in rankings.items():
        if trained and metric not in reported:
            yield (
                f"{what}: best by {metric}, but none of {len(trained)} checkpoints reports it; "
                f"they report: {', '.join(sorted(reported)) or 'nothing'}"
            )


def _best(policy: ExportPolicy, observed: Observation) -> Mapping[int, str]:
    """Step to reason, for the best ones by this policy; none without `best`."""
    ranking = policy.ranking
    if ranking is None:
        return {}
    made = [e for e in observed.exports if e.name == policy.name and not e.manifest.non_finite]
    known = {export.step: export.manifest for export in made}
    here = {c.step: c.manifest for c in observed.readable() if c.is_healthy and not c.problem}
    metrics = {step: m.metrics for step, m in {**known, **here}.items() if m is not None}
    return ranking.reasons(
        [Candidate(step=s, is_verified=True, metrics=metrics[s]) for s in sorted(metrics)]
    )


def _reasons(
    policy: ExportPolicy,
    checkpoint: CheckpointView,
    best: Mapping[int, str],
    made: Mapping[tuple[str, int], Manifest],
) -> list[str]:
    """The lines of the policy that ask for this step; none if none does."""
    manifest, step = checkpoint.manifest, checkpoint.step
    assert manifest is not None, "a readable checkpoint has a manifest"
    lines = {
        _every(policy): policy.every_steps is not None and step % policy.every_steps == 0,
        "last step": policy.last_step and manifest.is_last_step,
        "named in steps": step in policy.steps,
        best.get(step, ""): step in best,
    }
    reasons = [line for line, asks in lines.items() if asks]
    exported = None if policy.best is None else made.get((policy.name, step))
    if not reasons and exported:
        is_same = is_export_of(exported, manifest.content_id, spec_of(policy))
        return ["among the best when it was exported"] if is_same else []
    return reasons


def _every(policy: ExportPolicy) -> str:
    return f"every {policy.every_steps} steps"
