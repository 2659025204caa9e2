"""An action (verify, export, publish, purge, ...), its record, and what follows from its end.

One record per (checkpoint content, kind, parameters): the key is a digest of these, so that asking
twice is asking once, and a step that was saved anew is another checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ray_ckpt.core.draft import Node
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.failures import (
    BLOCKED_FOR_S,
    BLOCKS,
    ErrorClass,
    classify,
    may_try_again,
    wait_s,
)
from ray_ckpt.core.lifecycle import ActionKind, ActionState, move_action

MAX_INTERRUPTIONS = 8
_INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do to one checkpoint."""

    kind: ActionKind
    step: int
    source_id: str
    """Content id of the checkpoint; another save of the same step is another source. Of a save
    that is no checkpoint yet its save id."""
    export: ExportSpec | None = None
    """For export and for all that is about copies: which export. A publish, a retire or a look
    without one is about a copy of the checkpoint itself."""
    destination: str | None = None
    """For publish: where to. For promote, retire and look: where."""
    grace_s: float | None = None
    """For purge: seconds the step stays in the trash."""
    pointer: str | None = None
    """For promote: the name that leads to the copy, for example `latest`."""
    node: Node | None = None
    """For gather and free: the one node that can do it."""

    @property
    def key(self) -> str:
        """Idempotency key: 16 hex digits over everything that makes the action what it is."""
        text = json.dumps(self.to_document(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def num_gpus(self) -> int:
        """So many a task that carries it out works with."""
        if self.kind is not ActionKind.EXPORT or self.export is None:
            return 0
        return self.export.num_gpus

    @property
    def title(self) -> str:
        """The action as a sentence, as it stands on the dashboard."""
        words = [self.kind, f"step-{self.step}"]
        if self.export is not None:
            words.append(self.export.name)
        elif self.destination is not None:
            words.append("checkpoint")
        if self.pointer is not None:
            words.append(f"to {self.pointer}")
        if self.destination is not None:
            place = "to" if self.kind is ActionKind.PUBLISH else "at"
            words.append(f"{place} {self.destination}")
        if self.node is not None:
            place = "from" if self.kind is ActionKind.GATHER else "on"
            words.append(f"{place} {self.node.title}")
        return " ".join(words)

    def to_document(self) -> dict[str, Any]:
        """A plain mapping for JSON; pointer and node only where there are any: keys stay."""
        document = _fields_of(self)
        if self.export is not None:
            document["export"] = _fields_of(self.export)
        if self.pointer is None:
            del document["pointer"]
        if self.node is None:
            del document["node"]
        else:
            document["node"] = _fields_of(self.node)
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Action":
        """What :meth:`to_document` wrote."""
        export, node = document["export"], document.get("node")
        return cls(
            kind=ActionKind(document["kind"]),
            step=int(document["step"]),
            source_id=document["source_id"],
            export=ExportSpec(**export) if export else None,
            destination=document["destination"],
            grace_s=document["grace_s"],
            pointer=document.get("pointer"),
            node=Node(**node) if node else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRecord:
    """How far an action has come, and what came of it."""

    action: Action
    state: ActionState = ActionState.PENDING
    asked_by: str | None = None
    """Who asked for this one by its name, `user@host`; None for what policies and requests ask."""
    attempts: int = 0
    changed_at: float = 0.0
    """Seconds since the epoch, by the clock of whoever wrote the record."""
    next_attempt_at: float | None = None
    """Earliest time of the next attempt; only in RETRY_WAIT and BLOCKED."""
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the action reports: bytes, location."""
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    """How often it has failed by class of error, or was `interrupted` by its manager's death."""
    first_failed_at: float | None = None
    first_error: str | None = None
    """The whole message of the first error: the last one is often only its consequence."""
    error_class: ErrorClass | None = None
    """Of the last error."""
    error_kind: str | None = None
    """Class name of the last error."""
    error: str | None = None
    """The whole message of the last error, with what is safe and what to type."""

    def started(self, now: float) -> "ActionRecord":
        """The record once a task runs."""
        return replace(
            self,
            state=move_action(self.state, ActionState.RUNNING),
            attempts=self.attempts + 1,
            changed_at=now,
            next_attempt_at=None,
        )

    def afresh(self) -> "ActionRecord":
        """The record of the same action before anything was tried; what a look found stays."""
        found: Mapping[str, Any] = self.result if self.action.kind is ActionKind.LOOK else {}
        return ActionRecord(action=self.action, result=found)

    def interrupted(self, now: float) -> "ActionRecord":
        """The record after its manager died, and the task with it: it runs again.

        A task that was running each time a manager died is given up in the end.
        """
        times = self.failures.get(_INTERRUPTED, 0) + 1
        counted = replace(self, failures={**self.failures, _INTERRUPTED: times})
        if times >= MAX_INTERRUPTIONS:
            return counted.failed(_interrupted_too_often(times), now)
        return replace(counted, state=move_action(self.state, ActionState.PENDING), changed_at=now)

    def asked_again(self, by: str, now: float) -> "ActionRecord":
        """The record once a person has asked for another try: all that went wrong is forgotten."""
        return replace(
            self.afresh(),
            state=move_action(self.state, ActionState.PENDING),
            asked_by=by,
            changed_at=now,
        )

    def cancelled(self, why: str, now: float) -> "ActionRecord":
        """The record of an action that nobody waits for any more."""
        return replace(
            self,
            state=move_action(self.state, ActionState.CANCELLED),
            changed_at=now,
            next_attempt_at=None,
            error=why,
            error_class=None,
            error_kind=None,
        )

    def refused(self, why: str, now: float) -> "ActionRecord":
        """The record of what a person asked for and something spoke against.

        Nobody tries it again for them; what policies ask for later is not bound by it.
        """
        return replace(self.cancelled(why, now), error_class=ErrorClass.HELD)

    @property
    def is_refusal(self) -> bool:
        """Whether it says that something spoke against what a person asked for."""
        return self.state is ActionState.CANCELLED and self.error_class is ErrorClass.HELD

    def superseded(self, by: str, now: float) -> "ActionRecord":
        """The record of what `by` has made needless before it began."""
        return replace(
            self,
            state=move_action(self.state, ActionState.SUPERSEDED),
            changed_at=now,
            next_attempt_at=None,
            error=f"by {by}",
            error_kind=None,
        )

    def succeeded(self, result: Mapping[str, Any], now: float) -> "ActionRecord":
        """The record once the effect is there."""
        return ActionRecord(
            action=self.action,
            state=move_action(self.state, ActionState.SUCCEEDED),
            asked_by=self.asked_by,
            attempts=self.attempts,
            changed_at=now,
            result=result,
        )

    def failed(self, error: BaseException, now: float, *, jitter: float = 0.0) -> "ActionRecord":
        """The record after `error`: to be tried again, blocked until there is room, or dead.

        `jitter`, in [0, 1), keeps those who failed together from coming back together.
        """
        error_class = classify(error)
        num_failures = self.failures.get(error_class, 0) + 1
        first_failed_at = now if self.first_failed_at is None else self.first_failed_at
        text = str(error) or type(error).__name__
        failed = replace(
            self,
            changed_at=now,
            failures={**self.failures, error_class: num_failures},
            first_failed_at=first_failed_at,
            first_error=self.first_error or text,
            error_class=error_class,
            error_kind=type(error).__name__,
            error=text,
        )
        if may_try_again(error_class, num_failures, now - first_failed_at):
            wait = wait_s(error, num_failures, jitter=jitter)
            return failed._waiting(ActionState.RETRY_WAIT, now + wait)
        if error_class in BLOCKS:
            return failed._waiting(ActionState.BLOCKED, now + BLOCKED_FOR_S)
        return replace(failed, state=move_action(self.state, ActionState.DEAD))

    def _waiting(self, state: ActionState, until: float) -> "ActionRecord":
        return replace(self, state=move_action(self.state, state), next_attempt_at=until)

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> "ActionRecord":
        """What :meth:`to_json` wrote."""
        document = json.loads(text)
        document["action"] = Action.from_document(document["action"])
        document["state"] = ActionState(document["state"])
        error_class = document["error_class"]
        document["error_class"] = None if error_class is None else ErrorClass(error_class)
        return cls(**document)


def _fields_of(data: Action | ExportSpec | Node) -> dict[str, Any]:
    """Name to value; `asdict` copies every value, which costs a plan most of its time."""
    return {field.name: getattr(data, field.name) for field in fields(data)}


def _interrupted_too_often(times: int) -> RayCkptError:
    return RayCkptError(
        f"the manager died {times} times while this was running",
        safe="the checkpoint is untouched",
        do="look at the manager's log on the dashboard, then ask for the action again",
    )
