"""Observations as storage would show them: literal records, and what an action's end changes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copy_states import COPIED_AT
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.manifest import FileEntry, Lineage, Manifest
from ray_ckpt.core.observation import CheckpointView, ExportView, Observation, Request
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.policy import ExportPolicy, KeepConfig, LifecyclePolicy, PublishPolicy
from ray_ckpt.core.reconcile import plan

COMMITTED, VERIFIED = CheckpointState.COMMITTED, CheckpointState.VERIFIED
HF = ExportSpec(name="hf")
EXPORT_ALL = (ExportPolicy(name="hf", every_steps=1),)
COPY = PublishPolicy(export="hf", to="/copies")
COPY_EACH = LifecyclePolicy(export=EXPORT_ALL, publish=(COPY,))
KEEP_TWO = KeepConfig(latest=2, trash_grace_s=60.0)


def manifest(step: int, *, is_last_step: bool = False, **metrics: float) -> Manifest:
    return Manifest(
        step=step,
        save_id=f"save{step}",
        created_at="",
        lineage=Lineage(run_id="run"),
        files=(FileEntry(path="f", size_bytes=step, digest=f"sha256:{step:02x}"),),
        is_last_step=is_last_step,
        metrics=metrics,
    )


def view(
    step: int, state: CheckpointState = VERIFIED, *pins: str, **metrics: float
) -> CheckpointView:
    held = tuple(Pin(name=name) for name in pins)
    return CheckpointView(step=step, state=state, manifest=manifest(step, **metrics), pins=held)


def observe(
    *checkpoints: CheckpointView,
    policy: LifecyclePolicy | None = None,
    requests: tuple[Request, ...] = (),
) -> Observation:
    return Observation(
        run_id="run",
        policy=policy or LifecyclePolicy(),
        checkpoints=checkpoints,
        requests=requests,
    )


def with_record(
    observed: Observation,
    action: Action,
    state: ActionState,
    *,
    next_attempt_at: float | None = None,
    changed_at: float = 0.0,
    result: Mapping[str, Any] | None = None,
) -> Observation:
    record = ActionRecord(
        action=action,
        state=state,
        next_attempt_at=next_attempt_at,
        changed_at=changed_at,
        result=result or {},
    )
    return replace(observed, records={**observed.records, action.key: record})


def with_export(observed: Observation, checkpoint: CheckpointView, name: str) -> Observation:
    assert checkpoint.manifest is not None
    recipe = {"name": name, "dtype": "bfloat16"}
    lineage = Lineage(run_id="run", source_id=checkpoint.manifest.content_id, recipe=recipe)
    made = replace(checkpoint.manifest, lineage=lineage)
    export = ExportView(name=name, step=checkpoint.step, manifest=made)
    return replace(observed, exports=(*observed.exports, export))


def after_success(observed: Observation, action: Action) -> Observation:
    """What storage shows once `action` has ended well."""
    if action.kind is ActionKind.RETIRE:
        made = observed.records[replace(action, kind=ActionKind.PUBLISH).key]
        copied_at = {COPIED_AT: made.changed_at}
        return with_record(observed, action, ActionState.SUCCEEDED, result=copied_at)
    if action.kind is ActionKind.PROMOTE:
        last = max(record.changed_at for record in observed.records.values())
        return with_record(observed, action, ActionState.SUCCEEDED, changed_at=last + 1.0)
    observed = with_record(observed, action, ActionState.SUCCEEDED)
    checkpoint = next(c for c in observed.readable() if c.step == action.step)
    if action.kind is ActionKind.EXPORT:
        assert action.export is not None
        return with_export(observed, checkpoint, action.export.name)
    moved = {
        ActionKind.VERIFY: replace(checkpoint, state=VERIFIED),
        ActionKind.PURGE: replace(checkpoint, state=CheckpointState.TRASHED),
    }.get(action.kind, checkpoint)
    others = tuple(c for c in observed.checkpoints if c is not checkpoint)
    return replace(observed, checkpoints=(*others, moved))


def titles(observed: Observation, *, now: float = 0.0) -> list[str]:
    """What would start now, in order."""
    return [action.title for action in plan(observed, now=now).actions]
