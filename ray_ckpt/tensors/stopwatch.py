"""How long one save took, by what it did: one phase after the other, on this rank.

wait      an earlier save is still being written
stage     the state is collected and, unless the mode is `sync`, copied
write     this rank's files are written
commit    the other ranks write theirs, and the step becomes visible
"""

import time
from collections.abc import Mapping
from typing import Literal

SavePhase = Literal["wait", "stage", "write", "commit"]


class Stopwatch:
    """Runs from its making; used by one thread at a time."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._seconds: dict[SavePhase, float] = {}

    def end_of(self, phase: SavePhase) -> None:
        """What has passed since the last call was `phase`."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def end(self) -> None:
        """The save has ended, well or not: what has passed was the phase after the last one."""
        self.end_of("commit" if "write" in self._seconds else "write")

    @property
    def seconds(self) -> Mapping[str, float]:
        """By phase, as far as it has come."""
        return {**self._seconds}

    def blocked_s(self, *, until_end: bool) -> float:
        """Seconds for which training stood still: to the end in `sync` mode, else to the copy."""
        phases = self._seconds if until_end else ("wait", "stage")
        return sum(self._seconds.get(phase, 0.0) for phase in phases)
