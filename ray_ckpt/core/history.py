"""What has changed between two looks at a run, as events. Pure: no clock, no memory.

The look before lies on storage as a `Snapshot`. Whoever comes next tells the difference, so that a
manager that dies between acting and telling still tells.

    a kind of fact    its state is                         events
    checkpoint        the checkpoint's state               checkpoint.<state>, checkpoint.damaged
    action            the record's state                   action.<state>, action.forgotten
    export            the content                          export.made, .replaced, .gone
    pin, request      that it is there                     pin.set, .removed; request.made, .settled
    copy              that it is not what was made         copy.gone, .stale, .whole
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_states import losses
from ray_ckpt.core.errors import TransitionError
from ray_ckpt.core.events import Event, event_id
from ray_ckpt.core.lifecycle import ActionState, CheckpointState, move_checkpoint
from ray_ckpt.core.observation import READABLE, CheckpointView, Observation

_SCHEMA = "ray_ckpt.snapshot/1"
_LONGEST_ERROR = 200
_THERE = "there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing of a run that can change."""

    step: int
    name: str
    """Whose state it is, as a sentence begins: `step-500`, `export step-500 hf-bf16`."""
    state: str
    attempts: int = 0
    error_kind: str | None = None
    error: str | None = None
    """First line of what is wrong; of what begins anew, who asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Every fact at one moment."""

    token: str = ""
    """Unlike any other snapshot's: the same change, at another time, is another event."""
    facts: Mapping[str, Fact] = field(default_factory=dict[str, Fact])

    def to_json(self) -> bytes:
        """UTF-8 JSON; a fact is a row."""
        rows = {
            key: (f.step, f.name, f.state, f.attempts, f.error_kind, f.error)
            for key, f in self.facts.items()
        }
        document = {"schema": _SCHEMA, "token": self.token, "facts": rows}
        return json.dumps(document, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Snapshot":
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        document = json.loads(text)
        try:
            if document["schema"] != _SCHEMA:
                raise ValueError(f"schema {document['schema']!r}, expected {_SCHEMA!r}")
            facts = {key: _fact(*row) for key, row in document["facts"].items()}
            return cls(token=str(document["token"]), facts=facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no snapshot: {error!r}") from error


def snapshot_of(observed: Observation, *, token: str) -> Snapshot:
    """All that can change of a run, as one look saw it."""
    facts: dict[str, Fact] = {}
    # a save that lies in two places for a moment is what readers take it for
    for view in sorted(observed.checkpoints, key=lambda view: view.state not in READABLE):
        facts.setdefault(_checkpoint_key(view), _checkpoint(view))
        for pin in view.pins:
            facts[f"pin/{view.step}/{pin.name}"] = Fact(step=view.step, name=pin.name, state=_THERE)
    for export in observed.exports:
        name = f"export {export.name} of step-{export.step}"
        fact = Fact(step=export.step, name=name, state=export.manifest.content_id)
        facts[f"export/{export.step}/{export.name}"] = fact
    for key, record in observed.records.items():
        facts[f"action/{key}"] = _action(record)
    for key, loss in losses(observed.records).items():
        copy = observed.records[key].action
        name = copy.title.removeprefix(f"{copy.kind} ")
        fact = Fact(step=copy.step, name=name, state=loss.state, error=_line(loss.why))
        facts[f"copy/{key}"] = fact
    for request in observed.requests:
        fact = Fact(step=request.step, name=request.title, state=_THERE)
        facts[f"request/{request.title}"] = fact
    return Snapshot(token=token, facts=facts)


def changes(before: Snapshot, after: Snapshot, *, at: str, who: str) -> list[Event]:
    """What happened between two snapshots, oldest step first; told by `who` at `at`."""
    found = _differences(before.facts, after.facts)
    told = [_event(change, before.token, at=at, who=who) for change in found]
    return sorted(told, key=lambda event: (event.step or 0, event.what, event.id))


def _checkpoint_key(view: CheckpointView) -> str:
    """One save of a step; what has no manifest has no save id either."""
    return f"checkpoint/{view.step}/{view.manifest.save_id if view.manifest else ''}"


def _checkpoint(view: CheckpointView) -> Fact:
    return Fact(
        step=view.step, name=f"step-{view.step}", state=view.state, error=_line(view.problem)
    )


def _action(record: ActionRecord) -> Fact:
    """A record keeps its last error while it runs again; what is told then is that it runs."""
    is_going_on = record.state in (ActionState.PENDING, ActionState.RUNNING)
    return Fact(
        step=record.action.step,
        name=record.action.title,
        state=record.state,
        attempts=record.attempts,
        error_kind=None if is_going_on else record.error_kind,
        error=_who_asked(record) if is_going_on else _line(record.error),
    )


def _who_asked(record: ActionRecord) -> str | None:
    is_new = record.state is ActionState.PENDING and record.attempts == 0
    return f"asked for by {record.asked_by}" if is_new and record.asked_by else None


def _fact(*row: Any) -> Fact:
    step, name, state, attempts, error_kind, error = row
    return Fact(
        step=step, name=name, state=state, attempts=attempts, error_kind=error_kind, error=error
    )


def _line(text: str | None) -> str | None:
    return text.strip().splitlines()[0][:_LONGEST_ERROR] if text and text.strip() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """One fact that differs; at least one side is there."""

    key: str
    before: Fact | None
    after: Fact | None

    @property
    def fact(self) -> Fact:
        """What it is, or was last."""
        fact = self.after or self.before
        assert fact is not None, "a change has a side"
        return fact

    @property
    def why(self) -> str:
        """What is wrong, as the end of a sentence."""
        return f": {self.after.error}" if self.after is not None and self.after.error else ""


def _differences(before: Mapping[str, Fact], after: Mapping[str, Fact]) -> Iterator[_Change]:
    gone = set(before.keys() - after.keys())
    for key in after.keys() - before.keys():
        old = next((other for other in gone if _is_same_folder(other, key)), None)
        gone.discard(old or "")
        yield _Change(key=key, before=before[old] if old else None, after=after[key])
    for key in gone:
        yield _Change(key=key, before=before[key], after=None)
    for key in after.keys() & before.keys():
        if before[key] != after[key]:
            yield _Change(key=key, before=before[key], after=after[key])


def _is_same_folder(old: str, new: str) -> bool:
    """A folder without a manifest that gets one, or the other way round, is one checkpoint."""
    old_folder, _, old_save = old.rpartition("/")
    new_folder, _, new_save = new.rpartition("/")
    is_same = old_folder == new_folder and old.startswith("checkpoint/")
    return is_same and not (old_save and new_save)


def _event(change: _Change, token: str, *, at: str, who: str) -> Event:
    fact = change.fact
    what, text = _SENTENCES[change.key.partition("/")[0]](change)
    details = {
        "from": change.before.state if change.before else None,
        "to": change.after.state if change.after else None,
        "attempts": fact.attempts or None,
        "error_kind": fact.error_kind,
    }
    return Event(
        id=event_id(token, change.key, what, fact.state, fact.attempts, fact.error),
        at=at,
        who=who,
        what=what,
        step=fact.step,
        text=text,
        details={name: value for name, value in details.items() if value is not None},
    )


def _of_checkpoint(change: _Change) -> tuple[str, str]:
    name, old, new = change.fact.name, change.before, change.after
    if old is None:
        return f"checkpoint.{change.fact.state}", f"{name} is {change.fact.state}{change.why}"
    before = CheckpointState(old.state)
    is_purged = before in (CheckpointState.TRASHED, CheckpointState.ABANDONED)
    absent = CheckpointState.PURGED if is_purged else CheckpointState.MISSING
    after = CheckpointState(new.state) if new else absent
    if after is not before:
        text = f"{name}: {before} -> {after}{change.why}"
        return f"checkpoint.{after}", text + _by_whom(before, after)
    if after not in READABLE:
        return f"checkpoint.{after}", f"{name} is {after}{change.why}"
    if change.why:
        return "checkpoint.damaged", f"{name} is {after}, but damaged{change.why}"
    return f"checkpoint.{after}", f"{name} is {after}, and whole again"


def _by_whom(before: CheckpointState, after: CheckpointState) -> str:
    try:
        move_checkpoint(before, after)
    except TransitionError:
        return "; somebody else changed it"
    return "; somebody removed it" if after is CheckpointState.MISSING else ""


def _of_action(change: _Change) -> tuple[str, str]:
    fact = change.fact
    if change.after is None:
        return "action.forgotten", f"{fact.name}: its record is gone, it counts as never started"
    attempt = f", attempt {fact.attempts}" if fact.attempts > 1 else ""
    return f"action.{fact.state}", f"{fact.name}: {fact.state}{attempt}{change.why}"


def _of_export(change: _Change) -> tuple[str, str]:
    if change.after is None:
        return "export.gone", f"{change.fact.name} is gone"
    if change.before is None:
        return "export.made", f"{change.fact.name} is there"
    return "export.replaced", f"{change.fact.name} is another one now"


def _of_pin(change: _Change) -> tuple[str, str]:
    fact = change.fact
    if change.after is None:
        return "pin.removed", f"step-{fact.step} is no longer pinned as {fact.name}"
    return "pin.set", f"step-{fact.step} is pinned as {fact.name}"


def _of_request(change: _Change) -> tuple[str, str]:
    if change.after is None:
        return "request.settled", f"settled: the request for {change.fact.name}"
    return "request.made", f"somebody asked for {change.fact.name}"


def _of_copy(change: _Change) -> tuple[str, str]:
    if change.after is None:
        return "copy.whole", f"the copy {change.fact.name} is no longer {change.fact.state}"
    return (
        f"copy.{change.fact.state}",
        f"the copy {change.fact.name} is {change.fact.state}{change.why}",
    )


_SENTENCES: Mapping[str, Callable[[_Change], tuple[str, str]]] = {
    "checkpoint": _of_checkpoint,
    "action": _of_action,
    "export": _of_export,
    "pin": _of_pin,
    "request": _of_request,
    "copy": _of_copy,
}
