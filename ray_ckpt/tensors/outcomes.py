"""What became of a run's saves: counted, logged, told to who listens, and written down.

Knows how a save ended. Decides nothing: what follows from a failure is the manager's.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.events import Becomes, Event, SaveEvent, SaveStats, event_id, utc
from ray_ckpt.core.manifest import StartSource
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.history import BackgroundTeller
from ray_ckpt.storage.listing import sizes_in
from ray_ckpt.tensors.choosing import Choice
from ray_ckpt.tensors.pending import PendingSave
from ray_ckpt.tensors.stopwatch import Stopwatch

log = logging.getLogger("ray_ckpt")


_WELL: dict[Becomes, str] = {
    "committed": "step-%d is committed at %s",
    "staged": "step-%d lies on its nodes; the manager of %s brings it there and commits it",
}


class Outcomes:
    """Counts on every rank; only the coordinator's speaks of what all ranks know."""

    def __init__(
        self,
        store: Store,
        on_event: Callable[[SaveEvent], None] | None,
        *,
        owner: str,
        is_coordinator: bool,
    ) -> None:
        self.stats = SaveStats()
        self.failure: RayCkptError | None = None
        """How the last save that failed on this rank did."""
        self._store = store
        self._who = f"trainer {owner}"
        self._teller = BackgroundTeller(store)
        self._on_event = on_event
        self._is_coordinator = is_coordinator

    def ended(self, pending: PendingSave, reason: str, stopwatch: Stopwatch) -> None:
        """The save has ended, well or not; `reason` is why it was made."""
        error = pending.error()
        if error is not None:
            self.failure = error
            reason = str(error)
            if pending.is_in_background:
                log.error("the save of step-%d failed in the background\n%s", pending.step, error)
        elif self._is_coordinator:
            log.info(_WELL[pending.becomes] + _bytes_of(pending), pending.step, self._store.uri)
        kind = pending.becomes if error is None else "failed"
        event = SaveEvent(
            kind=kind,
            step=pending.step,
            reason=reason,
            seconds=pending.seconds,
            blocked_s=stopwatch.blocked_s(until_end=not pending.is_in_background),
            phases=stopwatch.seconds,
            volume=pending.volume,
        )
        self._tell(event, error_kind=type(error).__name__ if error else None)

    def skipped(self, step: int, reason: str) -> None:
        """The save was due and was not begun; `reason` is what was in the way."""
        if self._is_coordinator:
            log.warning("step-%d is not saved: %s", step, reason)
        self._tell(SaveEvent(kind="skipped", step=step, reason=reason))

    def began(
        self, choice: Choice, started_from: Sequence[StartSource], *, world_size: int
    ) -> None:
        """The run trains from now on; `started_from` is where its first weights came from."""
        sources = [source.name for source in started_from]
        kind, text = "run.resumed", f"training goes on from step-{choice.step}"
        if choice.step is None:
            kind, text = "run.started", f"training starts from {', '.join(sources) or 'scratch'}"
        details = {"reason": choice.reason, "world_size": world_size, "started_from": sources}
        text = f"{text} on {world_size} ranks: {choice.reason}"
        self._write(kind, choice.step, text, details)

    def close(self) -> None:
        """What was to be written down is, as far as storage lets it."""
        self._teller.close()

    def _tell(self, event: SaveEvent, *, error_kind: str | None = None) -> None:
        self.stats.count(event)
        text = f"the save of step-{event.step} is {event.kind}: {event.reason.splitlines()[0]}"
        details: dict[str, Any] = {"reason": event.reason, "error_kind": error_kind}
        if event.seconds:
            details["seconds"] = round(event.seconds, 3)
            details["blocked_s"] = round(event.blocked_s, 3)
        self._write(f"save.{event.kind}", event.step, text, details)
        if self._on_event is None or not self._is_coordinator:
            return
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001  whose faults are its own: training goes on
            log.error("step-%d is %s, but on_event failed: %r", event.step, event.kind, error)

    def _write(self, what: str, step: int | None, text: str, details: dict[str, Any]) -> None:
        """An event of this run, by the coordinator alone; returns at once, come what may."""
        if not self._is_coordinator:
            return
        at = utc(time.time())

        def make() -> Event:
            if what == "save.committed":
                details["bytes"] = sum(sizes_in(self._store, names.step_dir(step or 0)).values())
            return Event(
                id=event_id(self._who, what, step, at),
                at=at,
                who=self._who,
                what=what,
                step=step,
                text=text,
                details={name: value for name, value in details.items() if value},
            )

        self._teller.tell(make)


def _bytes_of(pending: PendingSave) -> str:
    """How much of it was written, where that is not all of it."""
    volume = pending.volume
    if not volume.taken_over_bytes:
        return ""
    return (
        f"; {volume.written_bytes} bytes were written, {volume.taken_over_bytes} have not changed "
        "and were taken over from the save before"
    )
