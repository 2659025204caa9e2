"""What is told about a run: to its training loop, and to everybody who looks later.

An `Event` lies on storage. It is told at least once; its id is the same each time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    id: str
    """Equal for the same happening, however often it is told."""
    at: str
    """UTC, ISO 8601 with milliseconds, by the clock of who tells it."""
    who: str
    """Who tells it: `manager epoch 7`, `trainer llama-8b`."""
    what: str
    """The kind: `checkpoint.verified`, `action.dead`, `pin.set`, `save.failed`, `run.resumed`."""
    step: int | None
    """None for what concerns the run as a whole."""
    text: str
    """A sentence."""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """A few JSON values for scripts."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> "Event":
        """What :meth:`to_json` wrote."""
        return cls(**json.loads(line))


def event_id(*parts: object) -> str:
    """16 hex digits that stand for `parts`, which make a happening the one it is."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def utc(seconds: float) -> str:
    """Seconds since the epoch as an event tells them."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


Becomes = Literal["committed", "staged"]
"""What a save is that has ended well. Staged: it lies on the nodes' own disks, and is a checkpoint
once it was brought to the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Bytes of the files of one step, on all ranks together."""

    written_bytes: int = 0
    taken_over_bytes: int = 0
    """Of files that are an older step's as well, because nothing in them has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvent:
    """One save has ended, or was not begun."""

    kind: Becomes | Literal["failed", "skipped"]
    step: int
    reason: str
    """Why it was due; for a failure what failed, for a skip what was in the way."""
    seconds: float = 0.0
    """From the copy, or in `sync` mode from the beginning, to the end of the save."""
    blocked_s: float = 0.0
    """Seconds of these and before for which training stood still on rank 0."""
    phases: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds on rank 0 by phase: `wait` for the save before, `stage`, `write`, `commit`."""
    volume: Volume = field(default_factory=Volume)
    """How many bytes were written for it; known on rank 0 alone."""


@dataclass(slots=True, kw_only=True)
class SaveStats:
    """Counts of one process's saves since it started."""

    num_committed: int = 0
    num_staged: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    last_save_s: float | None = None
    """Seconds the last save took that was committed or staged; None before the first."""
    blocked_s: float = 0.0
    """Seconds in all for which training stood still, whatever became of the saves."""

    def count(self, event: SaveEvent) -> None:
        """One more of its kind."""
        self.blocked_s += event.blocked_s
        if event.kind == "committed":
            self.num_committed += 1
            self.last_save_s = event.seconds
        elif event.kind == "staged":
            self.num_staged += 1
            self.last_save_s = event.seconds
        elif event.kind == "failed":
            self.num_failed += 1
        else:
            self.num_skipped += 1
