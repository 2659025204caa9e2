"""What a report of a run tells: its marks in time, its faults, its numbers. Pure.

marks     one for each save, verify, export, copy, purge and fault that was told or recorded
open      what needs somebody now, with the message and what to type
faults    everything that went wrong, whether it passed or not
rates     how fast each kind of work was
series    metrics by step, of the checkpoints whose manifests are still here
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from statistics import median
from typing import Any

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.events import Event
from ray_ckpt.core.lifecycle import ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation


class Lane(StrEnum):
    """A row of the timeline, from top to bottom."""

    SAVE = "saves"
    VERIFY = "verifies"
    EXPORT = "exports"
    COPY = "copies"
    PURGE = "purges"
    FAULT = "faults"


_LANES = {
    ActionKind.VERIFY: Lane.VERIFY,
    ActionKind.SCRUB: Lane.VERIFY,
    ActionKind.EXPORT: Lane.EXPORT,
    ActionKind.PUBLISH: Lane.COPY,
    ActionKind.PROMOTE: Lane.COPY,
    ActionKind.PURGE: Lane.PURGE,
    ActionKind.RETIRE: Lane.PURGE,
    ActionKind.FREE: Lane.PURGE,
    ActionKind.GATHER: Lane.SAVE,
    ActionKind.COMMIT: Lane.SAVE,
}
_LANES_BY_WORD = {str(kind): lane for kind, lane in _LANES.items()}
"""By the first word of an action's title."""
_MOVES_BYTES = (ActionKind.VERIFY, ActionKind.SCRUB, ActionKind.EXPORT, ActionKind.PUBLISH)
_NEEDS_SOMEBODY = (ActionState.DEAD, ActionState.BLOCKED, ActionState.RETRY_WAIT)
_FAULTS = frozenset(
    {
        *("save.failed", "checkpoint.damaged"),
        *(f"action.{state}" for state in _NEEDS_SOMEBODY),
        *(
            f"checkpoint.{state}"
            for state in (
                CheckpointState.QUARANTINED,
                CheckpointState.ABANDONED,
                CheckpointState.MISSING,
            )
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something on the timeline."""

    lane: Lane
    title: str
    begin: float
    """Seconds since the epoch, like `end`."""
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Something that does not go on by itself, or not now."""

    title: str
    state: str
    message: str
    """All of it, with what is safe and what to do."""
    do: str
    """The next command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast one kind of work was."""

    what: str
    count: int
    total_bytes: int
    median_s: float
    bytes_per_s: float


Series = Mapping[str, Sequence[tuple[int, float]]]
"""Name to step and value, by step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is told."""

    root: str
    run_id: str
    made_at: float
    views: tuple[CheckpointView, ...]
    """By step, then by what became of it."""
    gone: tuple[int, ...]
    """Steps of which nothing but events is left."""
    events: tuple[Event, ...]
    """Oldest first."""
    records: tuple[ActionRecord, ...]
    """In order of their last change."""
    marks: tuple[Mark, ...]
    open: tuple[Open, ...]
    faults: tuple[Event, ...]
    rates: tuple[Rate, ...]
    metrics: Series
    saves: Series
    """Seconds that saves took, and that training stood still for them."""
    doers: Mapping[str, Mapping[str, int]]
    """Who told of it, and how often of each kind of event."""


def make_report(root: str, observed: Observation, events: Sequence[Event], *, now: float) -> Report:
    """The report of a run as it is `now`, in seconds since the epoch; `events` oldest first."""
    records = sorted(observed.records.values(), key=lambda record: record.changed_at)
    faults = tuple(event for event in events if event.what in _FAULTS)
    marks = [*map(_saved, _ended_saves(events)), *_done(events, records), *map(_fault, faults)]
    views = sorted(observed.checkpoints, key=lambda view: (view.step, view.state))
    present = {view.step for view in views}
    return Report(
        root=root,
        run_id=observed.run_id,
        made_at=now,
        views=tuple(views),
        gone=tuple(sorted({e.step for e in events if e.step is not None} - present)),
        events=tuple(events),
        records=tuple(records),
        marks=tuple(sorted(marks, key=lambda mark: mark.begin)),
        open=(*_stuck(root, records), *_damaged(root, views)),
        faults=faults,
        rates=tuple(_rates(events, records)),
        metrics=_metrics(views),
        saves=_save_seconds(events),
        doers=_doers(events),
    )


def seconds_at(event: Event) -> float:
    """When it happened, in seconds since the epoch."""
    return datetime.fromisoformat(event.at).timestamp()


def _ended_saves(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.what in ("save.committed", "save.staged")]


def _saved(event: Event) -> Mark:
    end = seconds_at(event)
    begin = end - _seconds(event.details)
    return Mark(lane=Lane.SAVE, title=event.text, begin=begin, end=end)


def _done(events: Sequence[Event], records: Sequence[ActionRecord]) -> Iterator[Mark]:
    """Records say how long it took; events remember what has no record any more."""
    recorded = {r.action.title for r in records if r.state is ActionState.SUCCEEDED}
    for record in records:
        if record.state is ActionState.SUCCEEDED:
            end = record.changed_at
            begin = end - _seconds(record.result)
            lane = _LANES[record.action.kind]
            yield Mark(lane=lane, title=record.action.title, begin=begin, end=end)
    for event in events:
        title, is_done, _ = event.text.partition(f": {ActionState.SUCCEEDED}")
        lane = _LANES_BY_WORD.get(title.partition(" ")[0])
        is_action = event.what == f"action.{ActionState.SUCCEEDED}" and is_done
        if is_action and lane is not None and title not in recorded:
            at = seconds_at(event)
            yield Mark(lane=lane, title=title, begin=at, end=at)


def _fault(event: Event) -> Mark:
    at = seconds_at(event)
    return Mark(lane=Lane.FAULT, title=event.text, begin=at, end=at)


def _stuck(root: str, records: Sequence[ActionRecord]) -> Iterator[Open]:
    for record in records:
        if record.state in _NEEDS_SOMEBODY:
            action = record.action
            yield Open(
                title=action.title,
                state=str(record.state),
                message=record.error or "",
                do=f"ray-ckpt retry {root} --step {action.step} --kind {action.kind}",
            )


def _damaged(root: str, views: Sequence[CheckpointView]) -> Iterator[Open]:
    for view in views:
        is_damaged = view.state in (CheckpointState.COMMITTED, CheckpointState.VERIFIED)
        if view.state is CheckpointState.QUARANTINED or (is_damaged and view.problem):
            yield Open(
                title=f"step-{view.step}",
                state=str(view.state),
                message=view.problem or "its bytes differed from its manifest; it was set aside",
                do=f"ray-ckpt resume-plan {root}",
            )


def _rates(events: Sequence[Event], records: Sequence[ActionRecord]) -> Iterator[Rate]:
    done: dict[str, list[Mapping[str, Any]]] = {"save": [e.details for e in _ended_saves(events)]}
    for record in records:
        if record.state is ActionState.SUCCEEDED and record.action.kind in _MOVES_BYTES:
            done.setdefault(record.action.kind, []).append(record.result)
    for what, results in done.items():
        timed = [result for result in results if _seconds(result) > 0]
        if timed:
            total_bytes = sum(int(result.get("bytes", 0)) for result in timed)
            seconds = [_seconds(result) for result in timed]
            yield Rate(
                what=what,
                count=len(timed),
                total_bytes=total_bytes,
                median_s=median(seconds),
                bytes_per_s=total_bytes / sum(seconds),
            )


def _metrics(views: Sequence[CheckpointView]) -> Series:
    found: dict[str, dict[int, float]] = {}
    for view in views:
        if view.manifest is not None:
            for name, value in view.manifest.metrics.items():
                if math.isfinite(value):
                    found.setdefault(name, {})[view.step] = value
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def _save_seconds(events: Sequence[Event]) -> Series:
    saves = [e for e in _ended_saves(events) if e.step is not None]
    named = {"the whole save": "seconds", "training stood still": "blocked_s"}
    return {
        title: sorted(
            {e.step or 0: float(e.details[key]) for e in saves if key in e.details}.items()
        )
        for title, key in named.items()
    }


def _doers(events: Sequence[Event]) -> dict[str, dict[str, int]]:
    """Epochs of the manager are one."""
    counts = Counter((event.who.partition(" epoch ")[0], event.what) for event in events)
    found: dict[str, dict[str, int]] = {}
    for (who, what), count in sorted(counts.items()):
        found.setdefault(who, {})[what] = count
    return found


def _seconds(said: Mapping[str, Any]) -> float:
    return float(said.get("seconds") or 0.0)
