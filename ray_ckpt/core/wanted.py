"""What is wanted of each checkpoint: the actions that policies and requests ask for, and why."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ray_ckpt.core.actions import Action, ExportSpec
from ray_ckpt.core.due import DueExport, due_exports, is_export_of
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import PublishPolicy

_ASKED = "asked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAction:
    """An export or a copy that somebody or something asks for."""

    action: Action
    reason: str
    """The line of the policy, or that somebody asked."""
    is_required: bool = False
    """For a copy: the checkpoint may not go without it."""
    is_exported: bool
    """Whether the export that it makes or copies is on storage; no record is asked."""
    state: ActionState | None
    """Of its record; None if it was never started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Every export and copy asked of one checkpoint, each once."""

    exports: tuple[WantedAction, ...]
    publishes: tuple[WantedAction, ...]


def all_wanted(observed: Observation) -> dict[int, Wanted]:
    """For each readable step, all that is asked of it, by policy and by request."""
    due = due_exports(observed)
    made: dict[int, list[Manifest]] = defaultdict(list)
    for export in observed.exports:
        made[export.step].append(export.manifest)
    return {
        c.step: Wanted(
            exports=_known(_exports(c, due[c.step], observed), made[c.step], observed),
            publishes=_known(_publishes(c, due[c.step], observed), made[c.step], observed),
        )
        for c in observed.readable()
    }


_Asked = tuple[Action, str, bool]
"""An action, why, and whether the checkpoint may not go without it."""


def _exports(
    checkpoint: CheckpointView, due: list[DueExport], observed: Observation
) -> Iterator[_Asked]:
    for export in due:
        yield export_action(checkpoint, export.spec), export.reason, False
    for request in observed.requests:
        if request.step == checkpoint.step:
            yield export_action(checkpoint, request.export), _ASKED, False


def _publishes(
    checkpoint: CheckpointView, due: list[DueExport], observed: Observation
) -> Iterator[_Asked]:
    specs = {export.spec.name: export.spec for export in due}
    for policy in observed.policy.publish:
        if policy.export in specs:
            publish = publish_action(checkpoint, specs[policy.export], policy.to)
            yield publish, _line(policy), policy.required
    for request in observed.requests:
        if request.step == checkpoint.step and request.destination is not None:
            yield publish_action(checkpoint, request.export, request.destination), _ASKED, True


def _known(
    asked: Iterable[_Asked], made: Iterable[Manifest], observed: Observation
) -> tuple[WantedAction, ...]:
    """Each once, the first reason counts; with what storage shows of it and the step's exports."""
    known: dict[str, WantedAction] = {}
    for action, reason, is_required in asked:
        key = action.key
        record = observed.records.get(key)
        first = known.get(key)
        known[key] = WantedAction(
            action=action,
            reason=first.reason if first else reason,
            is_required=is_required or (first is not None and first.is_required),
            is_exported=any(is_result(manifest, action) for manifest in made),
            state=record.state if record else None,
        )
    return tuple(known.values())


def _line(policy: PublishPolicy) -> str:
    return f"every {policy.export} is copied there{', required' if policy.required else ''}"


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


def publish_action(checkpoint: CheckpointView, export: ExportSpec, destination: str) -> Action:
    """Copy one export of the checkpoint to `destination`."""
    return _action(ActionKind.PUBLISH, checkpoint, export=export, destination=destination)


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
