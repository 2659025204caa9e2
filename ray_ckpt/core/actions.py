"""An action (verify, export, publish, purge, ...), its record, and what follows from its end.

One record per (checkpoint content, kind, parameters): the key is a digest of these, so that asking
twice is asking once, and a step that was saved anew is another checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import RayCkptError, StorageFullError, TransientError
from ray_ckpt.core.lifecycle import ActionKind, ActionState, move_action

MAX_ATTEMPTS = 8
_BACKOFF_BASE_S = 2.0
_BACKOFF_CAP_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """What kind of export."""

    name: str
    dtype: Dtype = "bfloat16"
    flavors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Converter to what it is exported as, for example `{"lora": "peft"}`; each has a default."""
    allow_non_finite: bool = False
    """Also export a step with NaN or Inf in its weights."""

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, str]) -> "ExportSpec":
        """What was asked for when an export of this recipe was made."""
        prefix = "flavor."
        dtype = cast(Dtype, recipe["dtype"])
        flavors = {k.removeprefix(prefix): v for k, v in recipe.items() if k.startswith(prefix)}
        return cls(name=recipe["name"], dtype=dtype, flavors=flavors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do to one checkpoint."""

    kind: ActionKind
    step: int
    source_id: str
    """Content id of the checkpoint; another save of the same step is another source."""
    export: ExportSpec | None = None
    """For export, publish and retire: which export."""
    destination: str | None = None
    """For publish: where to. For retire: where from."""
    grace_s: float | None = None
    """For purge: seconds the step stays in the trash."""

    @property
    def key(self) -> str:
        """Idempotency key: 16 hex digits over everything that makes the action what it is."""
        text = json.dumps(self.to_document(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """The action as a sentence, as it stands on the dashboard."""
        words = [self.kind, f"step-{self.step}"]
        if self.export is not None:
            words.append(self.export.name)
        if self.destination is not None:
            place = "at" if self.kind is ActionKind.RETIRE else "to"
            words.append(f"{place} {self.destination}")
        return " ".join(words)

    def to_document(self) -> dict[str, Any]:
        """A plain mapping for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Action":
        """What :meth:`to_document` wrote."""
        export = document["export"]
        return cls(
            kind=ActionKind(document["kind"]),
            step=int(document["step"]),
            source_id=document["source_id"],
            export=ExportSpec(**export) if export else None,
            destination=document["destination"],
            grace_s=document["grace_s"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionRecord:
    """How far an action has come, and what came of it."""

    action: Action
    state: ActionState = ActionState.PENDING
    attempts: int = 0
    changed_at: float = 0.0
    """Seconds since the epoch, by the clock of whoever wrote the record."""
    next_attempt_at: float | None = None
    """Earliest time of the next attempt; only in RETRY_WAIT."""
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the action reports: bytes, location."""
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

    def interrupted(self, now: float) -> "ActionRecord":
        """The record after its manager died, and the task with it: it runs again.

        A task that was running each time a manager died is given up in the end.
        """
        if self.attempts >= MAX_ATTEMPTS:
            return self.failed(_interrupted_too_often(self.attempts), now)
        return replace(self, state=move_action(self.state, ActionState.PENDING), changed_at=now)

    def succeeded(self, result: Mapping[str, Any], now: float) -> "ActionRecord":
        """The record once the effect is there."""
        state = move_action(self.state, ActionState.SUCCEEDED)
        return replace(
            self, state=state, result=result, changed_at=now, error=None, error_kind=None
        )

    def failed(self, error: BaseException, now: float) -> "ActionRecord":
        """The record after `error`: RETRY_WAIT if the same call may succeed later, else DEAD."""
        may_pass = _may_pass(error) and self.attempts < MAX_ATTEMPTS
        state = ActionState.RETRY_WAIT if may_pass else ActionState.DEAD
        return replace(
            self,
            state=move_action(self.state, state),
            changed_at=now,
            next_attempt_at=now + backoff_s(self.attempts) if may_pass else None,
            error_kind=type(error).__name__,
            error=str(error) or type(error).__name__,
        )

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> "ActionRecord":
        """What :meth:`to_json` wrote."""
        document = json.loads(text)
        document["action"] = Action.from_document(document["action"])
        document["state"] = ActionState(document["state"])
        return cls(**document)


def _interrupted_too_often(attempts: int) -> RayCkptError:
    return RayCkptError(
        f"the manager died during each of {attempts} attempts",
        safe="the checkpoint is untouched",
        do="look at the manager's log on the dashboard, then ask for the action again",
    )


def backoff_s(attempts: int) -> float:
    """Seconds to wait after attempt number `attempts`: 2, 4, 8, ... and never above 300."""
    return min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2.0 ** max(0, attempts - 1))


def _may_pass(error: BaseException) -> bool:
    """Errors that are not ours (a worker died, a network library gave up) deserve another try."""
    return isinstance(error, TransientError | StorageFullError) or not isinstance(
        error, RayCkptError
    )
