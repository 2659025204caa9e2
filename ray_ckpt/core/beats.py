"""What a running attempt says of itself, and whether it still lives. Pure.

Times are those of whoever listens, by its own monotonic clock: no two hosts' clocks are compared.
"""

import json
from dataclasses import asdict, dataclass, replace

from ray_ckpt.core.limits import Limits

WAITS_AFTER_S = 60.0
"""An attempt that has not begun after so long is told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One sign of life, with how far the attempt is."""

    attempt_started_at: float
    """As its record says: a record that was begun anew counts its attempts from one again."""
    host: str
    node: str | None
    """Ray's id of the node; None outside Ray."""
    pid: int
    process_born: str
    """When the process began, in its kernel's words: another one may get the same pid later."""
    count: int = 0
    doing: str = "begins"
    done_bytes: int = 0
    total_bytes: int | None = 0
    """0 until it has begun; None for what it cannot count."""
    peak_rss_bytes: int = 0
    """The most memory that the process has held so far."""

    @property
    def percent(self) -> int | None:
        """Of the bytes that are to be worked on; None while nobody knows."""
        if not self.total_bytes:
            return None
        return min(100, 100 * self.done_bytes // self.total_bytes)

    @property
    def sentence(self) -> str:
        """Where it is, how far, and how large."""
        share = "" if self.percent is None else f" {self.percent} %"
        where = f"process {self.pid} on {self.host}"
        node = f", node {self.node[:12]}" if self.node else ""
        return f"{where}{node}, {self.doing}{share}, peak memory {self.peak_rss_bytes / 1e9:.2f} GB"

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Beat":
        """What :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError: it is something else.
        """
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What somebody who listens to one attempt knows of it."""

    begun_at: float
    """When it was asked for, and later when it was first heard to do what it does now."""
    last: Beat | None = None
    heard_at: float = 0.0
    """Last sign of life."""
    moved_at: float = 0.0
    """Last time it had come further."""

    def after(self, beat: Beat | None, now: float) -> "Watch":
        """The same after one more look, which found `beat`."""
        if beat is None or (self.last is not None and beat.count == self.last.count):
            return self
        if self.last is None:
            return Watch(begun_at=now, last=beat, heard_at=now, moved_at=now)
        if beat.doing != self.last.doing:
            return Watch(begun_at=now, last=beat, heard_at=now, moved_at=now)
        moved_at = now if beat.done_bytes != self.last.done_bytes else self.moved_at
        return replace(self, last=beat, heard_at=now, moved_at=moved_at)

    def without(self, seconds: float) -> "Watch":
        """The same, had the last so many seconds not passed: nobody listened then."""
        if self.last is None:
            return replace(self, begun_at=self.begun_at + seconds)
        heard_at, moved_at = self.heard_at + seconds, self.moved_at + seconds
        return replace(self, heard_at=heard_at, moved_at=moved_at)

    def why_dead(self, limits: Limits, now: float) -> str | None:
        """Why the attempt is to be given up; None while it lives, or waits for its turn."""
        if self.last is None:
            return None
        if now - self.heard_at > limits.hung_after_s:
            return f"nothing was heard of it for {now - self.heard_at:.0f} s: {self.last.sentence}"
        # what cannot be counted (a purge, the Hub's own client) may take as long as it takes
        is_counted = self.last.total_bytes is not None
        if is_counted and now - self.moved_at > limits.stalled_after_s:
            return f"it came no further for {now - self.moved_at:.0f} s: {self.last.sentence}"
        return None

    def has_waited(self, seconds: float, now: float) -> bool:
        """Whether it has not begun for longer than that."""
        return self.last is None and now - self.begun_at > seconds

    @property
    def bytes_per_s(self) -> float | None:
        """Mean speed of what it does now, as far as it was heard of; None before."""
        if self.last is None or self.heard_at <= self.begun_at:
            return None
        return self.last.done_bytes / (self.heard_at - self.begun_at)

    @property
    def eta_s(self) -> float | None:
        """Seconds until what it does now is done, at this speed; None where nobody knows."""
        if self.last is None or not self.last.total_bytes or not self.bytes_per_s:
            return None
        return max(0, self.last.total_bytes - self.last.done_bytes) / self.bytes_per_s
