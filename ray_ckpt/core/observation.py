"""What storage shows of one run at one moment: plain records, filled in by whoever reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.draft import Draft
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionState, CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.policy import LifecyclePolicy

READABLE = frozenset({CheckpointState.COMMITTED, CheckpointState.VERIFIED})
"""States in which a checkpoint may be loaded, exported or counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointView:
    """One step, wherever it lies: in place, in the trash or in quarantine."""

    step: int
    state: CheckpointState
    manifest: Manifest | None = None
    """None for a foreign folder, or where it cannot be read; of a staged save as it will be."""
    pins: tuple[Pin, ...] = ()
    """Expired ones too, until `Observation.at` leaves them out."""
    problem: str | None = None
    """Why the step cannot be used, where its state alone does not say."""

    @property
    def is_healthy(self) -> bool:
        """Whether no weight is NaN or Inf, as far as the save looked."""
        return self.manifest is None or not self.manifest.non_finite

    @property
    def is_way_back(self) -> bool:
        """Whether a run can be trusted to go on from it: verified, healthy, with its optimizer."""
        is_verified = self.state is CheckpointState.VERIFIED
        return is_verified and self.is_healthy and self.is_resumable

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it; step 0 is a seed, which needs weights alone."""
        return self.step == 0 or self.manifest is None or self.manifest.holds == "everything"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportView:
    """One finished export."""

    name: str
    step: int
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An export or a copy that a person or a job asked for; by step, which may be saved anew."""

    step: int
    export: ExportSpec | None = None
    """None asks for a copy of the checkpoint itself."""
    destination: str | None = None
    """Where a copy goes; None asks for the export alone."""
    verify: Proof = "sizes"
    """Of a copy: what is to say that it is whole."""

    @property
    def title(self) -> str:
        """The request as a sentence."""
        to = f" to {self.destination}" if self.destination is not None else ""
        what = "checkpoint" if self.export is None else self.export.name
        return f"{what} of step-{self.step}{to}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a person wants to become of an action: try it again, give it up, or purge a step."""

    verb: Literal["retry", "cancel", "purge"]
    action: Action
    by: str
    """Who asks: `user@host`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A whole run."""

    run_id: str
    policy: LifecyclePolicy
    checkpoints: tuple[CheckpointView, ...]
    exports: tuple[ExportView, ...] = ()
    records: Mapping[str, ActionRecord] = field(default_factory=dict[str, ActionRecord])
    """Every action's record under its key."""
    requests: tuple[Request, ...] = ()
    commands: tuple[Command, ...] = ()
    drafts: tuple[Draft, ...] = ()
    """Saves that ranks have left on their nodes, until nothing of them is left there."""
    free_bytes: int | None = field(default=None, compare=False)
    """What can still be written to the root, where anybody can say; others fill it as well."""

    def at(self, now: float) -> "Observation":
        """The same without the pins that have expired by `now`."""
        views = (
            replace(view, pins=tuple(pin for pin in view.pins if pin.holds(now)))
            for view in self.checkpoints
        )
        return replace(self, checkpoints=tuple(views))

    def readable(self) -> list[CheckpointView]:
        """Checkpoints that may be used, oldest first."""
        return sorted((c for c in self.checkpoints if c.state in READABLE), key=lambda c: c.step)

    def holds_content(self, action: Action) -> bool:
        """Whether the very checkpoint that the action is about is in place."""
        return any(
            (view.step, view.manifest.content_id) == (action.step, action.source_id)
            for view in self.checkpoints
            if view.state in READABLE and view.manifest is not None
        )

    def state_of(self, action: Action) -> ActionState | None:
        """State of the action's record; None if it was never started."""
        record = self.records.get(action.key)
        return record.state if record else None
