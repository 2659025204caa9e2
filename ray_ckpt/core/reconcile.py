"""What to do next, from what storage shows. Pure: no memory, no clock, no effect.

    verify ──► export ──► publish ──► promote     purge: once retention lets the step go,
                             │                           and nothing above still needs it
                             └──► retire          scrub, look: once there is nothing else to do

The plan is computed anew every round, so a lost event, a dead manager or a deleted record can
delay an action but never lose it.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ray_ckpt.core.actions import Action
from ray_ckpt.core.asked import asked_purges
from ray_ckpt.core.coalescing import coalesced
from ray_ckpt.core.copies import retire_action, retirements
from ray_ckpt.core.copy_states import CopyState
from ray_ckpt.core.due import unreported_metrics
from ray_ckpt.core.gathering import draft_actions
from ray_ckpt.core.idle import idle_actions, not_yet
from ray_ckpt.core.lifecycle import (
    GIVEN_UP,
    MERELY_LOOKS,
    ActionKind,
    ActionState,
    CheckpointState,
)
from ray_ckpt.core.observation import CheckpointView, Observation, Request
from ray_ckpt.core.promoting import promotions
from ray_ckpt.core.retention import Candidate, Verdict, decide, guards_of, quota_problem
from ray_ckpt.core.room import room_problem
from ray_ckpt.core.wanted import (
    Wanted,
    WantedAction,
    all_wanted,
    export_action,
    export_of,
    is_result,
    manifest_of,
    publish_action,
    purge_action,
    scrub_action,
    verify_action,
)

_ORDER = (
    ActionKind.COMMIT,
    ActionKind.GATHER,
    ActionKind.VERIFY,
    ActionKind.PUBLISH,
    ActionKind.PROMOTE,
    ActionKind.EXPORT,
    ActionKind.PURGE,
    ActionKind.RETIRE,
    ActionKind.FREE,
    ActionKind.LOOK,
    ActionKind.SCRUB,
)
"""What goes first: what makes a checkpoint safe, then what frees room, then what merely looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedAction:
    """One thing that is wanted and not done yet."""

    action: Action
    reason: str
    """The line of the policy, or the request, that asks for it."""
    not_now: str | None = None
    """Why it does not start now: what comes first, or how far it is; None starts now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a round does, and why it keeps what it keeps."""

    planned: tuple[PlannedAction, ...]
    """All that is wanted and not done: by kind, and the oldest step first."""
    verdicts: tuple[Verdict, ...]
    """One a readable checkpoint, oldest first."""
    settled: tuple[Request, ...]
    """Requests that need no further action: done, dead, or for a step that is not there."""
    problems: tuple[str, ...]
    """What cannot be as somebody wished, as sentences."""

    @property
    def actions(self) -> tuple[Action, ...]:
        """To start now, in this order."""
        return tuple(p.action for p in self.planned if p.not_now is None)


def plan(observed: Observation, *, now: float) -> Plan:
    """The next round's actions, given everything that storage shows; expired pins do not count."""
    observed = coalesced(observed.at(now), now=now)
    wanted = all_wanted(observed)
    held = _held(wanted, observed)
    verdicts = decide_all(observed, holds=held, now=now)
    purges = _purges(observed, verdicts, guards_of(_candidates(observed, held)))
    going = {step: purge.reason for step, purge in purges.items() if purge.not_now is None}
    promoted = promotions(observed)
    at_destinations = (*promoted.planned, *retirements(observed, promoted.copies))
    planned = sorted(
        (
            *(
                p
                for c in observed.readable()
                for p in _steps(c, wanted[c.step], purges.get(c.step), observed)
            ),
            *(PlannedAction(action=a, reason=why) for a, why in at_destinations),
            *(
                PlannedAction(action=action, reason=why, not_now=not_now)
                for action, why, not_now in draft_actions(observed)
            ),
        ),
        key=lambda p: (_ORDER.index(p.action.kind), p.action.step),
    )
    waiting = [_after_its_record(p, observed, now) for p in planned]
    return Plan(
        planned=(*waiting, *_when_idle(waiting, observed, going=going, now=now)),
        verdicts=tuple(
            Verdict(step=v.step, reasons=(), why_not=going[v.step]) if v.step in going else v
            for v in verdicts
        ),
        settled=tuple(request for request in observed.requests if _is_settled(request, observed)),
        problems=tuple(_problems(observed, held)),
    )


def decide_all(
    observed: Observation, *, holds: Mapping[int, tuple[str, ...]], now: float
) -> list[Verdict]:
    """The retention verdict on every readable checkpoint, `holds` included."""
    keep = observed.policy.keep
    candidates = _candidates(observed, holds)
    return decide(candidates, keep.policies(now=now), max_bytes=keep.max_bytes)


def purge_guards(observed: Observation) -> dict[int, tuple[str, ...]]:
    """For each readable step, what speaks against its purge whoever asks for it."""
    return guards_of(_candidates(observed, holds_of(observed)))


def holds_of(observed: Observation) -> dict[int, tuple[str, ...]]:
    """For each readable step, sentences about unfinished work that still needs it."""
    return _held(all_wanted(observed), observed)


def _held(wanted: Mapping[int, Wanted], observed: Observation) -> dict[int, tuple[str, ...]]:
    return {c.step: _holds(wanted[c.step], c, observed) for c in observed.readable()}


def _holds(wanted: Wanted, checkpoint: CheckpointView, observed: Observation) -> tuple[str, ...]:
    """Sentences about unfinished work that still needs the checkpoint.

    Whoever reads its bytes now; unfinished exports until they end; required copies until they
    were made.
    """
    readers = (verify_action(checkpoint), scrub_action(checkpoint))
    reading = [a for a in readers if observed.state_of(a) is ActionState.RUNNING]
    running = [
        export.action
        for export in wanted.exports
        if not export.is_exported and export.state not in GIVEN_UP
    ]
    missing = [publish.action for publish in wanted.publishes if _is_missing(publish)]
    return tuple(f"not done yet: {action.title}" for action in (*reading, *running, *missing))


def _is_missing(publish: WantedAction) -> bool:
    """Whether a copy is to be made, or must be there and is not."""
    if publish.loss is not None:
        return publish.is_required or publish.loss.state is CopyState.GONE
    is_over = publish.state in (ActionState.SUCCEEDED, ActionState.SUPERSEDED)
    return not is_over and (publish.is_required or publish.state not in GIVEN_UP)


def _candidates(observed: Observation, held: Mapping[int, tuple[str, ...]]) -> list[Candidate]:
    return [
        Candidate(
            step=checkpoint.step,
            is_verified=checkpoint.is_way_back,
            metrics=manifest_of(checkpoint).metrics if checkpoint.is_healthy else {},
            pins=tuple(pin.title for pin in checkpoint.pins),
            holds=held.get(checkpoint.step, ()),
            created_at=seconds_of(manifest_of(checkpoint).created_at),
            size_bytes=manifest_of(checkpoint).total_bytes,
        )
        for checkpoint in observed.readable()
    ]


def seconds_of(created_at: str) -> float | None:
    """Seconds since the epoch of an ISO 8601 moment, UTC unless it says; None if it is none."""
    try:
        moment = datetime.fromisoformat(created_at)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _purges(
    observed: Observation, verdicts: Iterable[Verdict], guards: Mapping[int, Sequence[str]]
) -> dict[int, PlannedAction]:
    """By step, the purges that policies and people ask for; what must not be is not now."""
    asked, views = asked_purges(observed), {view.step: view for view in observed.readable()}
    grace_s = observed.policy.keep.trash_grace_s
    purges: dict[int, PlannedAction] = {}
    for step, record in asked.items():
        purges[step] = PlannedAction(
            action=record.action,
            reason=f"asked for by {record.asked_by}",
            not_now="; ".join(guards[step]) or None,
        )
    for verdict in verdicts:
        if not verdict.keep and verdict.step not in asked:
            purge = purge_action(views[verdict.step], grace_s=grace_s)
            purges[verdict.step] = PlannedAction(action=purge, reason=verdict.why_not)
    return purges


def _steps(
    checkpoint: CheckpointView,
    wanted: Wanted,
    purge: PlannedAction | None,
    observed: Observation,
) -> Iterator[PlannedAction]:
    """What is wanted of one checkpoint and not done: verify, then exports, then their copies.

    Of one that goes now, nothing else.
    """
    if purge is not None:
        yield purge
        if purge.not_now is None:
            return
    first = None
    if checkpoint.state is not CheckpointState.VERIFIED:
        verify = verify_action(checkpoint)
        first = f"after {verify.title}"
        yield PlannedAction(action=verify, reason="every committed step is verified")
    for export in wanted.exports:
        if not export.is_exported:
            yield PlannedAction(action=export.action, reason=export.reason, not_now=first)
    for publish in wanted.publishes:
        if publish.state is not ActionState.SUCCEEDED or publish.loss is not None:
            before = first or _before_publish(publish, observed)
            yield PlannedAction(action=publish.action, reason=publish.reason, not_now=before)


def _before_publish(publish: WantedAction, observed: Observation) -> str | None:
    """What must end before a copy is made: its export, and the removal of an older copy.

    One that is another now than was made is never written over: a person removes it.
    """
    if publish.loss is not None and publish.loss.state is CopyState.STALE:
        return (
            f"the copy there is another now: {publish.loss.why}; look at it and remove it there, "
            "the next look finds it gone"
        )
    retire = retire_action(publish.action)
    if observed.state_of(retire) is ActionState.RUNNING:
        return f"after {retire.title}"
    return None if publish.is_exported else f"after {export_of(publish.action).title}"


def _after_its_record(planned: PlannedAction, observed: Observation, now: float) -> PlannedAction:
    record = observed.records.get(planned.action.key)
    by_record = not_yet(record, now)
    is_over = record is not None and record.state in GIVEN_UP
    not_now = by_record if is_over else planned.not_now or by_record
    return PlannedAction(action=planned.action, reason=planned.reason, not_now=not_now)


def _when_idle(
    planned: Sequence[PlannedAction], observed: Observation, *, going: Container[int], now: float
) -> Iterator[PlannedAction]:
    """What merely looks, after all other work; nothing of the steps that go now."""
    is_busy = any(p.not_now is None for p in planned) or any(
        record.state is ActionState.RUNNING and record.action.kind not in MERELY_LOOKS
        for record in observed.records.values()
    )
    for idle in idle_actions(observed, going=going, now=now):
        not_now = idle.not_yet or ("after all other work" if is_busy else None)
        yield PlannedAction(action=idle.action, reason=idle.reason, not_now=not_now)


def _is_settled(request: Request, observed: Observation) -> bool:
    checkpoint = next((c for c in observed.readable() if c.step == request.step), None)
    if checkpoint is None:
        return True
    is_given_up = False
    if request.export is not None:
        export = export_action(checkpoint, request.export)
        is_given_up = observed.state_of(export) in GIVEN_UP
        if request.destination is None:
            made = (e.manifest for e in observed.exports if e.step == request.step)
            return is_given_up or any(is_result(manifest, export) for manifest in made)
    assert request.destination is not None, "a copy goes somewhere"
    publish = publish_action(checkpoint, request.export, request.destination)
    return is_given_up or observed.state_of(publish) in (ActionState.SUCCEEDED, *GIVEN_UP)


def _problems(observed: Observation, held: Mapping[int, tuple[str, ...]]) -> Iterable[str]:
    readable = {checkpoint.step for checkpoint in observed.readable()}
    for request in observed.requests:
        if request.step not in readable:
            yield f"{request.title} was asked for, but that step is not there"
    yield from unreported_metrics(observed)
    too_large = quota_problem(_candidates(observed, held), observed.policy.keep.max_bytes)
    if too_large is not None:
        yield too_large
    nearly_full = room_problem(observed)
    if nearly_full is not None:
        yield nearly_full
