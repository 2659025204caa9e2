"""What to do next, from what storage shows. Pure: no memory, no clock, no effect.

    verify ──► export ──► publish          purge: once retention lets the step go,
                                                  and nothing above still needs it

The plan is computed anew every round, so a lost event, a dead manager or a deleted record can
delay an action but never lose it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ray_ckpt.core.actions import Action, ActionRecord, ExportSpec
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.retention import Candidate, Verdict, decide

GIVEN_UP = ActionState.DEAD, ActionState.CANCELLED, ActionState.SUPERSEDED
"""What nobody waits for any more, unless a person asks for it again."""
_UNDER_WAY = ActionState.PENDING, ActionState.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a round does, and why it keeps what it keeps."""

    actions: tuple[Action, ...]
    """To start now, oldest step first."""
    verdicts: tuple[Verdict, ...]
    """One a readable checkpoint, oldest first."""
    settled: tuple[Request, ...]
    """Requests that need no further action: done, dead, or for a step that is not there."""
    problems: tuple[str, ...]
    """Requests that cannot be served, as sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Everything asked of one checkpoint, by policy or by request."""

    exports: tuple[Action, ...]
    publishes: tuple[Action, ...]
    required: frozenset[str]
    """Keys of the publishes without which the checkpoint may not go."""


def plan(observed: Observation, *, now: float) -> Plan:
    """The next round's actions, given everything that storage shows."""
    observed = observed.at(now)
    readable = observed.readable()
    wanted = {c.step: _wanted(c, observed) for c in readable}
    verdicts = decide_all(observed, holds={step: _holds(w, observed) for step, w in wanted.items()})
    doomed = {verdict.step for verdict in verdicts if not verdict.keep}
    actions: list[Action] = []
    for checkpoint in readable:
        if checkpoint.step in doomed:
            actions.append(purge_action(checkpoint, grace_s=observed.policy.keep.trash_grace_s))
        else:
            actions.extend(_next_steps(checkpoint, wanted[checkpoint.step], observed))
    return Plan(
        actions=tuple(action for action in actions if _may_start(action, observed, now)),
        verdicts=tuple(verdicts),
        settled=tuple(request for request in observed.requests if _is_settled(request, observed)),
        problems=tuple(_problems(observed)),
    )


def overtaken(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Unfinished records whose checkpoint is not in place any more, as they are to be from now on.

    A purge whose step lies in the trash was carried out by a manager that died before it said so;
    for anything else there is nothing left to do.
    """
    present = {_identity(view) for view in observed.readable()}
    trashed = {_identity(v) for v in observed.checkpoints if v.state is CheckpointState.TRASHED}
    waiting = ActionState.PENDING, ActionState.RETRY_WAIT, ActionState.BLOCKED
    found: list[ActionRecord] = []
    for record in observed.records.values():
        source = (record.action.step, record.action.source_id)
        if record.state not in waiting or source in present:
            continue
        if record.action.kind is ActionKind.PURGE and source in trashed:
            found.append(record.started(now).succeeded({}, now))
        else:
            found.append(record.cancelled("its checkpoint is not in place any more", now))
    return found


def obeyed(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records as people's commands want them from now on.

    What succeeded stays so; a command for what is over already changes nothing.
    """
    found: list[ActionRecord] = []
    for command in observed.commands:
        record = observed.records.get(command.action.key, ActionRecord(action=command.action))
        if record.state is ActionState.SUCCEEDED:
            continue
        if command.verb == "retry" and record.state not in _UNDER_WAY:
            found.append(record.asked_again(now))
        if command.verb == "cancel" and record.state not in GIVEN_UP:
            found.append(record.cancelled(f"cancelled by {command.by}", now))
    return found


def _identity(view: CheckpointView) -> tuple[int, str]:
    return view.step, view.manifest.content_id if view.manifest else ""


def unfinished(observed: Observation, *, now: float) -> list[str]:
    """A sentence for everything that has begun, waits, or could begin now; empty when idle."""
    begun = {
        key: f"{record.action.title} is {record.state}"
        for key, record in observed.records.items()
        if record.state is not ActionState.SUCCEEDED and record.state not in GIVEN_UP
    }
    planned = plan(observed, now=now)
    may_start = {action.key: f"{action.title} may start" for action in planned.actions}
    return list({**may_start, **begun}.values())


def decide_all(observed: Observation, *, holds: dict[int, tuple[str, ...]]) -> list[Verdict]:
    """The retention verdict on every readable checkpoint, `holds` and every pin included."""
    candidates = [
        Candidate(
            step=checkpoint.step,
            is_verified=checkpoint.is_way_back,
            metrics=_manifest(checkpoint).metrics if checkpoint.is_healthy else {},
            pins=tuple(pin.title for pin in checkpoint.pins),
            holds=holds.get(checkpoint.step, ()),
        )
        for checkpoint in observed.readable()
    ]
    return decide(candidates, observed.policy.keep.policies())


def holds_of(observed: Observation) -> dict[int, tuple[str, ...]]:
    """For each readable step, sentences about unfinished work that still needs it."""
    return {c.step: _holds(_wanted(c, observed), observed) for c in observed.readable()}


def verify_action(checkpoint: CheckpointView) -> Action:
    """Recompute every digest of the checkpoint."""
    return _action(ActionKind.VERIFY, checkpoint)


def purge_action(checkpoint: CheckpointView, *, grace_s: float) -> Action:
    """Move the checkpoint to the trash, where it stays for `grace_s` seconds."""
    return Action(
        kind=ActionKind.PURGE,
        step=checkpoint.step,
        source_id=_manifest(checkpoint).content_id,
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
    source_id = _manifest(checkpoint).content_id
    return Action(
        kind=kind, step=checkpoint.step, source_id=source_id, export=export, destination=destination
    )


def _manifest(checkpoint: CheckpointView) -> Manifest:
    assert checkpoint.manifest is not None, "a readable checkpoint has a manifest"
    return checkpoint.manifest


def _wanted(checkpoint: CheckpointView, observed: Observation) -> _Wanted:
    """Policies and requests alike, without repeats."""
    due = _due_by_policy(checkpoint, observed)
    exports = [export_action(checkpoint, spec) for spec in due.values()]
    publishes: list[Action] = []
    required: set[str] = set()
    for policy in observed.policy.publish:
        if policy.export in due:
            publishes.append(publish_action(checkpoint, due[policy.export], policy.to))
            required |= {publishes[-1].key} if policy.required else set()
    for request in observed.requests:
        if request.step == checkpoint.step:
            exports.append(export_action(checkpoint, request.export))
            if request.destination is not None:
                publishes.append(publish_action(checkpoint, request.export, request.destination))
                required.add(publishes[-1].key)
    return _Wanted(
        exports=tuple({a.key: a for a in exports}.values()),
        publishes=tuple({a.key: a for a in publishes}.values()),
        required=frozenset(required),
    )


def _due_by_policy(checkpoint: CheckpointView, observed: Observation) -> dict[str, ExportSpec]:
    due: dict[str, ExportSpec] = {}
    if not checkpoint.is_healthy:
        return due
    for policy in observed.policy.export:
        is_last = policy.last_step and _manifest(checkpoint).is_last_step
        is_multiple = policy.every_steps is not None and checkpoint.step % policy.every_steps == 0
        if is_last or is_multiple:
            due[policy.name] = ExportSpec(
                name=policy.name, dtype=policy.dtype, flavors=policy.flavors
            )
    return due


def _next_steps(
    checkpoint: CheckpointView, wanted: _Wanted, observed: Observation
) -> Iterable[Action]:
    """Actions whose dependencies are met: verify first, then exports, then what needs these."""
    if checkpoint.state is not CheckpointState.VERIFIED:
        yield verify_action(checkpoint)
        return
    for export in wanted.exports:
        if not _is_exported(export, observed):
            yield export
    for publish in wanted.publishes:
        if _is_exported(publish, observed):
            yield publish


def _is_exported(action: Action, observed: Observation) -> bool:
    """Whether the export that `action` makes or copies is on storage; no record is asked."""
    return any(is_result(export.manifest, action) for export in observed.exports)


def is_result(manifest: Manifest, action: Action) -> bool:
    """Whether an export with this manifest is what `action` makes or copies."""
    recipe, spec = manifest.lineage.recipe, action.export
    if spec is None or manifest.lineage.source_id != action.source_id:
        return False
    flavors = {f"flavor.{name}": flavor for name, flavor in spec.flavors.items()}
    wanted = {"name": spec.name, "dtype": spec.dtype, **flavors}
    return wanted == {key: value for key, value in recipe.items() if key != "family"}


def _holds(wanted: _Wanted, observed: Observation) -> tuple[str, ...]:
    """Unfinished exports hold a step until they end; required copies until they exist."""
    running = [
        action
        for action in wanted.exports
        if not _is_exported(action, observed) and observed.state_of(action) not in GIVEN_UP
    ]
    missing = [
        action
        for action in wanted.publishes
        if observed.state_of(action) is not ActionState.SUCCEEDED
        and (action.key in wanted.required or observed.state_of(action) not in GIVEN_UP)
    ]
    return tuple(f"not done yet: {action.title}" for action in (*running, *missing))


def _may_start(action: Action, observed: Observation, now: float) -> bool:
    """Whether the action's record lets it run now.

    A record of success proves only what storage here cannot show: a copy elsewhere. The others
    are planned because their effect is not there, whatever was recorded before.
    """
    record = observed.records.get(action.key)
    if record is None or record.state is ActionState.PENDING:
        return True
    if record.state is ActionState.SUCCEEDED:
        return action.kind is not ActionKind.PUBLISH
    due = record.next_attempt_at is not None and now >= record.next_attempt_at
    return record.state in (ActionState.RETRY_WAIT, ActionState.BLOCKED) and due


def _is_settled(request: Request, observed: Observation) -> bool:
    checkpoint = next((c for c in observed.readable() if c.step == request.step), None)
    if checkpoint is None:
        return True
    export = export_action(checkpoint, request.export)
    is_given_up = observed.state_of(export) in GIVEN_UP
    if request.destination is None:
        return is_given_up or _is_exported(export, observed)
    publish = publish_action(checkpoint, request.export, request.destination)
    return is_given_up or observed.state_of(publish) in (ActionState.SUCCEEDED, *GIVEN_UP)


def _problems(observed: Observation) -> Iterable[str]:
    readable = {checkpoint.step for checkpoint in observed.readable()}
    for request in observed.requests:
        if request.step not in readable:
            yield f"{request.title} was asked for, but that step is not there"
