"""Reasons to save that one rank alone learns of, made known to all without stopping any.

    a signal, a request, the clock   on any rank   ->   a vote, begun at one step and
                                                         counted at the next: no rank waits

Every rank counts the same vote at the same step, so all of them begin the same save.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ray_ckpt.core.errors import UsageError
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.ranks import Ranks

log = logging.getLogger("ray_ckpt")
POLL_S = 2.0


class Trigger(IntEnum):
    """What may happen on one rank; its place in the vote."""

    REQUESTED = 0
    TIME = 1
    STOP = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks have agreed on: the largest number that any of them gave, 0 for none."""

    numbers: tuple[float, ...] = (0.0,) * len(Trigger)
    age_s: float = 0.0
    """Seconds since they gave them."""

    def __getitem__(self, trigger: Trigger) -> float:
        """The trigger's number."""
        return self.numbers[trigger]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What all ranks know at one step."""

    reason: str | None = None
    """Why to save, beside the schedule by steps."""
    stop_s: float | None = None
    """Seconds since one of the ranks was told to stop; None if none was."""
    has_failed: bool = False
    """Whether a save has failed in the background."""


class Listener:
    """Signals, requests and the clock, as far as the config asks for them."""

    def __init__(self, ranks: Ranks, config: SaveConfig, *, is_asked: Callable[[], bool]) -> None:
        self._ranks = ranks
        self._votes = Votes(ranks)
        self._signal = StopSignal()
        self._watcher: Watcher | None = None
        asks = (config.listen, config.every_s, config.sigterm_notice_s, config.on_failure == "stop")
        self._listens = config.listen
        self._is_on = any(bool(asked) for asked in asks)
        if config.sigterm_notice_s is not None:
            self._signal.watch()
        if config.listen and ranks.is_coordinator:
            self._watcher = Watcher(is_asked, self.request)

    def hear(self, *, is_time: bool) -> Heard:
        """What the vote of the step before came to; collective, without waiting."""
        if not self._is_on:
            return Heard()
        if is_time and self._ranks.is_coordinator:
            self._votes.give(Trigger.TIME)
        if self._signal.came_at is not None:
            self._votes.give(Trigger.STOP, time.monotonic() - self._signal.came_at + _TINY_S)
        agreed = self._votes.count()
        return Heard(
            reason=next((text for t, text in _REASONS.items() if agreed[t]), None),
            stop_s=agreed[Trigger.STOP] + agreed.age_s if agreed[Trigger.STOP] else None,
            has_failed=bool(agreed[Trigger.FAILED]),
        )

    def request(self) -> None:
        """A save at the next step; from any rank and thread."""
        self._refuse(unless=self._listens)
        self._votes.give(Trigger.REQUESTED)

    def stop(self) -> None:
        """As if SIGTERM had come; from any rank and thread."""
        self._refuse(unless=self._is_on)
        self._signal.came_at = self._signal.came_at or time.monotonic()

    def failed(self) -> None:
        """A save has failed in the background."""
        self._votes.give(Trigger.FAILED)

    def close(self) -> None:
        """Nobody listens any more; collective."""
        if self._watcher is not None:
            self._watcher.close()
        self._signal.release()
        with contextlib.suppress(RuntimeError):  # a rank is dead, and the vote without an end
            self._votes.finish()

    def _refuse(self, *, unless: bool) -> None:
        if not unless:
            raise UsageError(
                "this run does not listen to requests",
                "save.listen",
                "training goes on",
                "leave SaveConfig.listen on",
            )


ASKED_FOR = "asked for"
TIME_HAS_COME = "time has come"
_REASONS = {Trigger.REQUESTED: ASKED_FOR, Trigger.TIME: TIME_HAS_COME}
_TINY_S = 1e-6
"""A signal that came this very moment is told from none."""


class Votes:
    """One vote a step, counted one step later; `ranks` is the training thread's."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._numbers = [0.0] * len(Trigger)
        self._vote: tuple[Any, torch.Tensor] | None = None
        self._began_at = 0.0
        """When the vote that is under way began."""

    def give(self, trigger: Trigger, number: float = 1.0) -> None:
        """In the next vote this rank has the number; from any thread."""
        with self._lock:
            self._numbers[trigger] = max(self._numbers[trigger], number)

    def count(self) -> Agreed:
        """What the last vote came to; the next one has begun. Collective."""
        with self._lock:
            numbers, self._numbers = self._numbers, [0.0] * len(Trigger)
        if self._ranks.group is None:
            return Agreed(tuple(numbers))
        agreed = self.finish()
        tensor = torch.tensor(numbers, dtype=torch.float64)
        group = self._ranks.group
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group, async_op=True)
        self._vote, self._began_at = (work, tensor), time.monotonic()
        return agreed

    def finish(self) -> Agreed:
        """What the last vote came to; no vote is under way. Collective."""
        if self._vote is None:
            return Agreed()
        work, tensor = self._vote
        self._vote = None
        work.wait()
        return Agreed(tuple(tensor.tolist()), age_s=time.monotonic() - self._began_at)


class StopSignal:
    """SIGTERM no longer ends this process: it is remembered, with the time it came."""

    def __init__(self) -> None:
        self.came_at: float | None = None
        """By the monotonic clock; None as long as it has not come."""
        self._before: Any = None

    def watch(self) -> None:
        """From now on; only the main thread may, another is told how else to stop."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("SIGTERM is not watched outside the main thread: call request_stop() there")
            return
        self._before = signal.signal(signal.SIGTERM, self._came)

    def release(self) -> None:
        """The handler of before is in place again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.came_at = self.came_at or time.monotonic()


class Watcher:
    """Asks `look` every few seconds in a thread, and tells when it says yes."""

    def __init__(self, look: Callable[[], bool], tell: Callable[[], None]) -> None:
        self._look = look
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray_ckpt watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The thread has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                if self._look():
                    self._tell()
            except Exception as error:  # noqa: BLE001  storage may be away; training goes on
                log.debug("could not look for requests: %r", error)
