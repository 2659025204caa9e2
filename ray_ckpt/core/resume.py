"""Which step a run resumes from, why, and why the newer ones are passed over."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Why a run may not start from scratch here, although no step can be used."""
    skipped: tuple[tuple[int, str], ...]
    """Newer steps that are not used, newest first, each with the reason."""


def plan_resume(checkpoints: Sequence[CheckpointView]) -> ResumePlan:
    """The newest checkpoint that can be used."""
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
