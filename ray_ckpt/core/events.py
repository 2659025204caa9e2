"""What a training loop has to tell about its saves."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvent:
    """One save has ended, or was not begun."""

    kind: Literal["committed", "failed", "skipped"]
    step: int
    reason: str
    """Why it was due; for a failure what failed, for a skip what was in the way."""
    seconds: float = 0.0
    """From the beginning of the save to its end."""


@dataclass(slots=True, kw_only=True)
class SaveStats:
    """Counts of one process's saves since it started."""

    num_committed: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    last_save_s: float | None = None
    """Seconds the last committed save took; None before the first."""

    def count(self, event: SaveEvent) -> None:
        """One more of its kind."""
        if event.kind == "committed":
            self.num_committed += 1
            self.last_save_s = event.seconds
        elif event.kind == "failed":
            self.num_failed += 1
        else:
            self.num_skipped += 1
