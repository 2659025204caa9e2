"""What a run's charts and alerts are drawn from: names, labels, and values. Pure.

    now      what is so at this moment: steps, ages, backlog, room       `gauges`
    total    what somebody has watched happen since it began to watch    `counted`, `counted_save`

A total begins at 0 with every manager. What happened before is on storage, but would be counted
twice by whoever adds up rates over a restart. Labels are few by construction: kinds, states,
phases, and destinations that a policy names; what a person asks for by hand is `other`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.core.reconcile import Plan, seconds_of

Kind = Literal["now", "total"]
SAVES = "committed", "staged", "failed", "skipped"
PHASES = "wait", "stage", "write", "commit"
OTHER = "other"
_GAPS = 5
"""The interval between two saves is the median of the last so many."""
_UNDER_WAY = frozenset({CheckpointState.SAVING, CheckpointState.ABANDONED})
_GONE = frozenset({CheckpointState.TRASHED, CheckpointState.PURGED})


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table in `infra/README.md`."""

    name: str
    """Ray puts `ray_` in front."""
    kind: Kind
    labels: tuple[str, ...]
    """Beside `run`."""
    says: str


METRICS = (
    Metric("ckpt_last_committed_step", "now", (), "the newest step that is committed"),
    Metric("ckpt_last_committed_age_seconds", "now", (), "since its commit"),
    Metric("ckpt_last_verified_step", "now", (), "the newest step whose every byte was verified"),
    Metric("ckpt_last_verified_age_seconds", "now", (), "since its commit"),
    Metric("ckpt_save_interval_seconds", "now", (), "between two commits, median of the last five"),
    Metric("ckpt_run_ended", "now", (), "1 once the trainer has ended well or saved its last step"),
    Metric("ckpt_checkpoints", "now", ("state",), "steps in this state"),
    Metric("ckpt_checkpoint_bytes", "now", (), "size of the newest checkpoint"),
    Metric("ckpt_free_bytes", "now", (), "what can still be written to a root on a disk"),
    Metric("ckpt_actions", "now", ("kind", "state"), "actions whose record says so"),
    Metric("ckpt_bytes_per_second", "now", ("kind",), "speed of the actions that run"),
    Metric("ckpt_eta_seconds", "now", ("kind",), "until the last of those that run is done"),
    Metric("ckpt_backlog", "now", ("destination",), "copies that are to be made there"),
    Metric("ckpt_backlog_bytes", "now", ("destination",), "and their size, as far as it is known"),
    Metric("ckpt_backlog_eta_seconds", "now", ("destination",), "at the speed of those that run"),
    Metric("ckpt_problems", "now", (), "sentences that `ray-ckpt plan` says about the run"),
    Metric("ckpt_lease_epoch", "now", (), "how often the root's manager has changed"),
    Metric("ckpt_saves_total", "total", ("state",), "saves by how they ended"),
    Metric("ckpt_save_seconds_total", "total", ("phase",), "what saves took on rank 0"),
    Metric("ckpt_train_blocked_seconds_total", "total", (), "how long training stood still"),
    Metric("ckpt_saved_bytes_total", "total", (), "bytes of committed checkpoints"),
    Metric("ckpt_attempts_total", "total", ("kind",), "attempts that have begun"),
    Metric("ckpt_retries_total", "total", ("kind",), "of these, all but the first of an action"),
    Metric("ckpt_action_seconds_total", "total", ("kind",), "what actions took that succeeded"),
    Metric("ckpt_upload_bytes_total", "total", ("destination",), "bytes of copies that were made"),
    Metric("ckpt_purged_bytes_total", "total", (), "bytes of checkpoints moved to the trash"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value; `labels` in the order of the metric's own."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """How far one running action is."""

    action: Action
    done_bytes: int
    bytes_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that one round of a manager has seen."""

    observed: Observation
    planned: Plan
    moving: tuple[Moving, ...]
    num_problems: int
    epoch: int
    has_ended: bool
    """Whether the last trainer has said its last word."""


def gauges(world: World, *, now: float) -> Iterator[Sample]:
    """Everything that is so at this moment. What nobody knows is left out."""
    yield from _steps(world, now)
    yield from _actions(world)
    yield from _speeds(world.moving)
    yield from _backlogs(world)
    yield Sample("ckpt_problems", world.num_problems)
    yield Sample("ckpt_lease_epoch", world.epoch)


def zeros(policy: LifecyclePolicy) -> Iterator[Sample]:
    """Every total that may ever grow, before it does: a rate misses the first value of a series."""
    values = {
        "state": SAVES,
        "phase": PHASES,
        "kind": tuple(str(kind) for kind in ActionKind),
        "destination": _destinations(policy),
    }
    for metric in METRICS:
        if metric.kind == "total":
            label = metric.labels[0] if metric.labels else None
            yield from (Sample(metric.name, 0.0, (v,)) for v in values.get(label or "", ()))
            if label is None:
                yield Sample(metric.name, 0.0)


def counted_save(event: SaveEvent) -> Iterator[Sample]:
    """What one save adds to the totals."""
    yield Sample("ckpt_saves_total", 1, (event.kind,))
    yield Sample("ckpt_train_blocked_seconds_total", event.blocked_s)
    for phase, seconds in event.phases.items():
        yield Sample("ckpt_save_seconds_total", seconds, (phase,))


def counted(before: Observation, after: Observation) -> Iterator[Sample]:
    """What has happened between two looks adds to the totals."""
    known = {_save(view) for view in before.checkpoints if view.state not in _UNDER_WAY}
    for view in after.readable():
        if view.manifest is not None and _save(view) not in known:
            yield Sample("ckpt_saved_bytes_total", view.manifest.total_bytes)
    for key, record in after.records.items():
        old = before.records.get(key)
        if old is not record and old != record:
            yield from _counted_record(old, record, after.policy)


def place_of(action: Action, policy: LifecyclePolicy) -> str:
    """The destination as a label: as the policy writes it, without what may be secret there."""
    written = action.destination or ""
    return _label(written) if any(written == p.to for p in policy.publish) else OTHER


# ---- what is so now ----


def _steps(world: World, now: float) -> Iterator[Sample]:
    observed = world.observed
    committed = [view for view in observed.readable() if view.manifest is not None]
    verified = [view for view in committed if view.state is CheckpointState.VERIFIED]
    for word, views in (("committed", committed), ("verified", verified)):
        if views:
            yield Sample(f"ckpt_last_{word}_step", views[-1].step)
            at = _committed_at(views[-1])
            if at is not None:
                yield Sample(f"ckpt_last_{word}_age_seconds", max(0.0, now - at))
    interval_s = save_interval_s(observed.checkpoints)
    if interval_s is not None:
        yield Sample("ckpt_save_interval_seconds", interval_s)
    if committed and committed[-1].manifest is not None:
        yield Sample("ckpt_checkpoint_bytes", committed[-1].manifest.total_bytes)
    if observed.free_bytes is not None:
        yield Sample("ckpt_free_bytes", observed.free_bytes)
    yield Sample("ckpt_run_ended", float(world.has_ended or _is_at_its_end(committed)))
    states = Counter(view.state for view in observed.checkpoints)
    yield from (Sample("ckpt_checkpoints", states[s], (str(s),)) for s in CheckpointState)


def save_interval_s(views: Iterable[CheckpointView]) -> float | None:
    """The usual time between two commits of a run; None before the second. Trash counts as well."""
    moments = sorted(at for view in views if (at := _committed_at(view)) is not None)
    gaps = [after - before for before, after in pairwise(moments)]
    return median(gaps[-_GAPS:]) if gaps else None


def _committed_at(view: CheckpointView) -> float | None:
    """Seconds since the epoch; None for what says no time, and for a save that is under way."""
    if view.manifest is None or view.state in _UNDER_WAY:
        return None
    return seconds_of(view.manifest.created_at)


def _is_at_its_end(committed: list[CheckpointView]) -> bool:
    return any(view.manifest is not None and view.manifest.is_last_step for view in committed[-1:])


def _actions(world: World) -> Iterator[Sample]:
    """Of what failed for good only what still matters: its step is here."""
    here = {view.step for view in world.observed.checkpoints if view.state not in _GONE}
    numbers = Counter(
        (str(record.action.kind), str(record.state))
        for record in world.observed.records.values()
        if record.state is not ActionState.DEAD or record.action.step in here
    )
    waiting = Counter(
        (str(p.action.kind), str(ActionState.PENDING))
        for p in world.planned.planned
        if p.action.key not in world.observed.records
    )
    # a dead action that somebody has retried must end its alert at once, not once it is forgotten
    dead = {(str(kind), str(ActionState.DEAD)): 0 for kind in ActionKind}
    for labels, number in {**dead, **(numbers + waiting)}.items():
        yield Sample("ckpt_actions", number, labels)


def _speeds(moving: Iterable[Moving]) -> Iterator[Sample]:
    by_kind: dict[ActionKind, list[Moving]] = {}
    for each in moving:
        by_kind.setdefault(each.action.kind, []).append(each)
    for kind, each in by_kind.items():
        speeds = [m.bytes_per_s for m in each if m.bytes_per_s is not None]
        etas = [m.eta_s for m in each if m.eta_s is not None]
        if speeds:
            yield Sample("ckpt_bytes_per_second", sum(speeds), (str(kind),))
        if etas:
            yield Sample("ckpt_eta_seconds", max(etas), (str(kind),))


def _backlogs(world: World) -> Iterator[Sample]:
    """Of each destination that a policy names, and of all others together."""
    observed = world.observed
    numbers = Counter(dict.fromkeys(_destinations(observed.policy), 0))
    sizes, speeds = Counter(numbers), dict.fromkeys(numbers, 0.0)
    done = {each.action.key: each for each in world.moving}
    for action in (p.action for p in world.planned.planned):
        if action.kind is not ActionKind.PUBLISH or observed.state_of(action) in GIVEN_UP:
            continue
        place = place_of(action, observed.policy)
        numbers[place] += 1
        sizes[place] += _size_of_copy(action, observed)
        if action.key in done:
            sizes[place] -= min(done[action.key].done_bytes, _size_of_copy(action, observed))
            speeds[place] += done[action.key].bytes_per_s or 0.0
    for place, number in numbers.items():
        yield Sample("ckpt_backlog", number, (place,))
        yield Sample("ckpt_backlog_bytes", sizes[place], (place,))
        if speeds[place]:
            yield Sample("ckpt_backlog_eta_seconds", sizes[place] / speeds[place], (place,))


def _size_of_copy(publish: Action, observed: Observation) -> int:
    """Of its export, or of the newest other step's of that name; 0 before there is any."""
    name = publish.export.name if publish.export else ""
    of_name = {e.step: e.manifest.total_bytes for e in observed.exports if e.name == name}
    return of_name.get(publish.step, of_name[max(of_name)] if of_name else 0)


def _destinations(policy: LifecyclePolicy) -> tuple[str, ...]:
    return (*dict.fromkeys(_label(publish.to) for publish in policy.publish), OTHER)


def _label(destination: str) -> str:
    """Without a user's name and key, and without what follows a question mark."""
    scheme, separator, rest = destination.partition("?")[0].rpartition("://")
    host, slash, path = rest.partition("/")
    is_signed = bool(separator) and ":" in host.rpartition("@")[0]
    host = host.rpartition("@")[2] if is_signed else host
    return f"{scheme}{separator}{host}{slash}{path}"


# ---- what has happened ----


def _save(view: CheckpointView) -> tuple[int, str]:
    """What makes a save the one it is; one that comes back from the trash is none that is new."""
    return view.step, view.manifest.save_id if view.manifest else ""


def _counted_record(
    old: ActionRecord | None, new: ActionRecord, policy: LifecyclePolicy
) -> Iterator[Sample]:
    kind = (str(new.action.kind),)
    # one that was begun anew, or forgotten, counts its attempts from one again
    known = old.attempts if old is not None and old.attempts <= new.attempts else 0
    begun = new.attempts - known
    if begun:
        yield Sample("ckpt_attempts_total", begun, kind)
        yield Sample("ckpt_retries_total", begun if known else begun - 1, kind)
    is_new = old is None or old.state is not new.state or old.changed_at != new.changed_at
    if new.state is ActionState.SUCCEEDED and is_new:
        yield Sample("ckpt_action_seconds_total", float(new.result.get("seconds", 0.0)), kind)
        yield from _counted_bytes(new, policy)


def _counted_bytes(done: ActionRecord, policy: LifecyclePolicy) -> Iterator[Sample]:
    size_bytes = float(done.result.get("bytes", 0))
    if done.action.kind is ActionKind.PUBLISH:
        place = place_of(done.action, policy)
        yield Sample("ckpt_upload_bytes_total", size_bytes, (place,))
    if done.action.kind is ActionKind.PURGE:
        yield Sample("ckpt_purged_bytes_total", size_bytes)
