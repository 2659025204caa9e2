"""What is wanted of each checkpoint: the actions that policies and requests ask for, and why."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ray_ckpt.core.actions import Action
from ray_ckpt.core.copy_policy import CopiedSteps, PublishPolicy
from ray_ckpt.core.copy_states import Finding, losses
from ray_ckpt.core.due import DueExport, due_exports, is_export_of
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, Observation, Request

_ASKED = "asked for"
_MADE = ActionKind.EXPORT, ActionKind.PUBLISH


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAction:
    """An export or a copy that somebody or something asks for."""

    action: Action
    reason: str
    """The line of the policy, or that somebody asked."""
    is_required: bool
    """For a copy: the checkpoint may not go without it."""
    is_due: bool
    """Whether a policy asks for it, whoever else does."""
    is_skippable: bool
    """Whether a newer step may make it needless; see `core.coalescing`."""
    is_exported: bool
    """Whether the export that it makes or copies is on storage; no record is asked. A checkpoint
    that is copied itself needs none."""
    state: ActionState | None
    """Of its record; None if it was never started."""
    loss: Finding | None
    """What a look has found of a copy that is not what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Every export and copy asked of one checkpoint, each once."""

    exports: tuple[WantedAction, ...]
    publishes: tuple[WantedAction, ...]


def all_wanted(observed: Observation) -> dict[int, Wanted]:
    """For each readable step, all that is asked of it, by policy and by request."""
    due = due_exports(observed)
    asked = _asked_for(observed)
    made: dict[int, list[Manifest]] = defaultdict(list)
    for export in observed.exports:
        made[export.step].append(export.manifest)
    return {
        c.step: Wanted(
            exports=_known(_exports(c, due[c.step], asked[c.step]), made[c.step], observed),
            publishes=_known(
                _publishes(c, due[c.step], asked[c.step], observed.policy.publish),
                made[c.step],
                observed,
            ),
        )
        for c in observed.readable()
    }


def _asked_for(observed: Observation) -> dict[int, list[Request]]:
    """By step, what people want: what they have asked for, and what they have retried."""
    asked: dict[int, list[Request]] = defaultdict(list)
    for request in observed.requests:
        asked[request.step].append(request)
    for record in observed.records.values():
        action = record.action
        is_open = record.asked_by and not record.state.is_terminal
        if is_open and action.kind in _MADE:
            again = Request(step=action.step, export=action.export, destination=action.destination)
            asked[action.step].append(again)
    return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One line of a policy, or one request, that asks for an action; as in `WantedAction`."""

    action: Action
    reason: str
    is_required: bool = False
    is_due: bool = False
    is_skippable: bool = False


def _exports(
    checkpoint: CheckpointView, due: Iterable[DueExport], asked: Iterable[Request]
) -> Iterator[_Asked]:
    for export in due:
        yield _Asked(
            action=export_action(checkpoint, export.spec),
            reason=export.reason,
            is_due=True,
            is_skippable=export.is_periodic and export.when_behind == "newest",
        )
    for request in asked:
        if request.export is not None:
            yield _Asked(action=export_action(checkpoint, request.export), reason=_ASKED)


def _publishes(
    checkpoint: CheckpointView,
    due: Iterable[DueExport],
    asked: Iterable[Request],
    policies: Iterable[PublishPolicy],
) -> Iterator[_Asked]:
    exports = {export.spec.name: export for export in due}
    for policy in policies:
        if policy.checkpoint is not None:
            yield from _as_it_is(checkpoint, policy, policy.checkpoint)
        export = exports.get(policy.export or "")
        if export is not None:
            yield _Asked(
                action=publish_action(checkpoint, export.spec, policy.to),
                reason=_line(policy),
                is_required=policy.required,
                is_due=True,
                is_skippable=export.is_periodic and policy.when_behind == "newest",
            )
    for request in asked:
        if request.destination is not None:
            publish = publish_action(checkpoint, request.export, request.destination)
            yield _Asked(action=publish, reason=_ASKED, is_required=True)


def _as_it_is(
    checkpoint: CheckpointView, policy: PublishPolicy, which: CopiedSteps
) -> Iterator[_Asked]:
    """The copy of the checkpoint itself, if the policy asks for it; never of an unhealthy one."""
    step, every = checkpoint.step, f"every {which.every_steps} steps"
    lines = {
        every: which.every_steps is not None and step % which.every_steps == 0,
        "last step": which.last_step and manifest_of(checkpoint).is_last_step,
        "named in steps": step in which.steps,
    }
    reasons = [line for line, asks in lines.items() if asks]
    if reasons and checkpoint.is_healthy:
        yield _Asked(
            action=publish_action(checkpoint, None, policy.to),
            reason=f"{reasons[0]}: the checkpoint is copied there{_if_required(policy)}",
            is_required=policy.required,
            is_due=True,
            is_skippable=reasons == [every] and policy.when_behind == "newest",
        )


def _known(
    asked: Iterable[_Asked], made: Iterable[Manifest], observed: Observation
) -> tuple[WantedAction, ...]:
    """Each once, the first reason counts; with what storage shows of it and the step's exports."""
    lost = losses(observed.records)
    by_key: dict[str, list[_Asked]] = defaultdict(list)
    for each in asked:
        by_key[each.action.key].append(each)
    return tuple(
        WantedAction(
            action=same[0].action,
            reason=same[0].reason,
            is_required=any(each.is_required for each in same),
            is_due=any(each.is_due for each in same),
            is_skippable=all(each.is_skippable for each in same),
            is_exported=same[0].action.export is None
            or any(is_result(manifest, same[0].action) for manifest in made),
            state=observed.records[key].state if key in observed.records else None,
            loss=lost.get(key),
        )
        for key, same in by_key.items()
    )


def _line(policy: PublishPolicy) -> str:
    return f"every {policy.export} is copied there{_if_required(policy)}"


def _if_required(policy: PublishPolicy) -> str:
    return ", required" if policy.required else ""


def is_result(manifest: Manifest, action: Action) -> bool:
    """Whether an export with this manifest is what `action` makes or copies."""
    spec = action.export
    return spec is not None and is_export_of(manifest, action.source_id, spec)


def verify_action(checkpoint: CheckpointView) -> Action:
    """Recompute every digest of the checkpoint."""
    return _action(ActionKind.VERIFY, checkpoint)


def scrub_action(checkpoint: CheckpointView) -> Action:
    """Recompute every digest of a checkpoint that was verified before."""
    return _action(ActionKind.SCRUB, checkpoint)


def purge_action(checkpoint: CheckpointView, *, grace_s: float) -> Action:
    """Move the checkpoint to the trash, where it stays for `grace_s` seconds."""
    return Action(
        kind=ActionKind.PURGE,
        step=checkpoint.step,
        source_id=manifest_of(checkpoint).content_id,
        grace_s=grace_s,
    )


def export_action(checkpoint: CheckpointView, export: ExportSpec) -> Action:
    """Make one export of the checkpoint."""
    return _action(ActionKind.EXPORT, checkpoint, export=export)


def publish_action(
    checkpoint: CheckpointView, export: ExportSpec | None, destination: str
) -> Action:
    """Copy one export of the checkpoint to `destination`, or the checkpoint itself."""
    return _action(ActionKind.PUBLISH, checkpoint, export=export, destination=destination)


def export_of(publish: Action) -> Action:
    """What makes the export that `publish` copies."""
    return replace(publish, kind=ActionKind.EXPORT, destination=None)


def places_after(action: Action, observed: Observation) -> tuple[str, ...]:
    """Where an export is to be copied to once it is made, each once; nowhere after another kind."""
    spec = action.export
    if action.kind is not ActionKind.EXPORT or spec is None:
        return ()
    by_policy = [policy.to for policy in observed.policy.publish if policy.export == spec.name]
    asked = [
        request.destination
        for request in observed.requests
        if (request.step, request.export) == (action.step, spec) and request.destination
    ]
    return tuple(dict.fromkeys([*by_policy, *asked]))


def _action(
    kind: ActionKind,
    checkpoint: CheckpointView,
    *,
    export: ExportSpec | None = None,
    destination: str | None = None,
) -> Action:
    source_id = manifest_of(checkpoint).content_id
    return Action(
        kind=kind, step=checkpoint.step, source_id=source_id, export=export, destination=destination
    )


def manifest_of(checkpoint: CheckpointView) -> Manifest:
    """The manifest, which every readable checkpoint has."""
    assert checkpoint.manifest is not None, "a readable checkpoint has a manifest"
    return checkpoint.manifest
