"""What became of a run's saves: counted, logged, and told to who listens.

Knows how a save ended. Decides nothing: what follows from a failure is the manager's.
"""

import logging
from collections.abc import Callable

from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.events import SaveEvent, SaveStats
from ray_ckpt.tensors.pending import PendingSave

log = logging.getLogger("ray_ckpt")


class Outcomes:
    """Counts on every rank; only the coordinator's speaks of what all ranks know."""

    def __init__(
        self,
        uri: str,
        on_event: Callable[[SaveEvent], None] | None,
        *,
        is_coordinator: bool,
    ) -> None:
        self.stats = SaveStats()
        self.failure: RayCkptError | None = None
        """How the last save that failed on this rank did."""
        self._uri = uri
        self._on_event = on_event
        self._is_coordinator = is_coordinator

    def ended(self, pending: PendingSave, reason: str) -> None:
        """The save has ended, well or not; `reason` is why it was made."""
        error = pending.error()
        if error is not None:
            self.failure = error
            reason = str(error)
            if pending.is_in_background:
                log.error("the save of step-%d failed in the background\n%s", pending.step, error)
        elif self._is_coordinator:
            log.info("step-%d is committed at %s", pending.step, self._uri)
        kind = "committed" if error is None else "failed"
        event = SaveEvent(kind=kind, step=pending.step, reason=reason, seconds=pending.seconds)
        self._tell(event)

    def skipped(self, step: int, reason: str) -> None:
        """The save was due and was not begun; `reason` is what was in the way."""
        if self._is_coordinator:
            log.warning("step-%d is not saved: %s", step, reason)
        self._tell(SaveEvent(kind="skipped", step=step, reason=reason))

    def _tell(self, event: SaveEvent) -> None:
        self.stats.count(event)
        if self._on_event is None or not self._is_coordinator:
            return
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001  whose faults are its own: training goes on
            log.error("step-%d is %s, but on_event failed: %r", event.step, event.kind, error)
