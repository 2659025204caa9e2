"""Which step a run resumes from, why, and why the newer ones are passed over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import READABLE, CheckpointView

_SILENT = frozenset({CheckpointState.TRASHED, CheckpointState.PURGED})


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """The same plan that `load` follows."""

    step: int | None
    """The step to load; None starts from scratch, unless there is a refusal."""
    reason: str
    refusal: str | None
    """Why a run may neither start from scratch here nor choose a step by itself."""
    skipped: tuple[tuple[int, str], ...]
    """Newer steps that are not used, newest first, each with the reason."""


def plan_resume(checkpoints: Sequence[CheckpointView], *, run_id: str | None = None) -> ResumePlan:
    """The newest checkpoint that can be used.

    Where it is of another run than `run_id`, and that one has checkpoints here too, nobody guesses.
    """
    planned = _newest(checkpoints)
    strange = _of_another_run(checkpoints, planned, run_id)
    return planned if strange is None else replace(planned, step=None, refusal=strange)


def _of_another_run(
    checkpoints: Sequence[CheckpointView], planned: ResumePlan, run_id: str | None
) -> str | None:
    """Why the newest one is not taken for the run's own, if it is not; None if nobody can tell."""
    usable = [c for c in checkpoints if c.state in READABLE and why_unusable(c) is None]
    lineages = {c.step: c.manifest.lineage for c in usable if c.manifest}
    # whoever adopts a step has said that it is the run's
    run_of = {step: run_id if ln.adopted else ln.run_id for step, ln in lineages.items()}
    own = [step for step, other in run_of.items() if other == run_id]
    if planned.step not in run_of or run_of[planned.step] == run_id or not own:
        return None
    return (
        f"step-{planned.step} was saved by run {run_of[planned.step]}, but this root is of run "
        f"{run_id}, whose newest is step-{max(own)}: say which one, load(step=...)"
    )


def _newest(checkpoints: Sequence[CheckpointView]) -> ResumePlan:
    skipped: list[tuple[int, str]] = []
    for checkpoint in sorted(checkpoints, key=lambda c: -c.step):
        if checkpoint.state in READABLE and why_unusable(checkpoint) is None:
            return ResumePlan(
                step=checkpoint.step,
                reason="seed checkpoint"
                if checkpoint.step == 0
                else f"newest {checkpoint.state} checkpoint",
                refusal=None,
                skipped=tuple(skipped),
            )
        if checkpoint.state not in _SILENT:
            skipped.append((checkpoint.step, _why_not(checkpoint)))
    lost = sorted(view.step for view in checkpoints if _holds_work(view))
    return ResumePlan(
        step=None,
        reason="no committed checkpoint is here",
        refusal=f"steps {', '.join(map(str, lost))} are here and cannot be used" if lost else None,
        skipped=tuple(skipped),
    )


def _holds_work(checkpoint: CheckpointView) -> bool:
    """Whether starting from scratch beside it would throw away somebody's training."""
    is_unusable = checkpoint.state in READABLE and why_unusable(checkpoint) is not None
    return is_unusable or checkpoint.state in (CheckpointState.FOREIGN, CheckpointState.QUARANTINED)


def why_unusable(checkpoint: CheckpointView) -> str | None:
    """Why nobody resumes from a committed checkpoint; None if one can."""
    if checkpoint.problem is not None:
        return checkpoint.problem
    if not checkpoint.is_resumable:
        return "it holds the model only; start from it with FromWeights"
    if checkpoint.manifest is not None and not checkpoint.is_healthy:
        broken = checkpoint.manifest.non_finite
        return f"NaN or Inf in {len(broken)} tensors, first {broken[0]}"
    return None


def _why_not(checkpoint: CheckpointView) -> str:
    reason = why_unusable(checkpoint)
    return str(checkpoint.state) if reason is None else f"{checkpoint.state}: {reason}"
