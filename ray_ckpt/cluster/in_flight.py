"""Attempts of one manager that have begun, or wait for their turn: who lives, how far each is.

Listens to their signs of life by its own monotonic clock, one read an attempt, never more often
than they come. Knows nothing of plans: whoever holds it decides what becomes of a record.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.executors import DiedError, Executor, Running
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import Occupant, Placement
from ray_ckpt.core.beats import WAITS_AFTER_S, Beat, Watch
from ray_ckpt.core.errors import TransientError
from ray_ckpt.core.limits import Limits
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.beats import read_beats, sweep_beats

log = logging.getLogger("ray_ckpt")
SWEEP_EVERY_S = 600.0
_DEAF_AFTER_BEATS = 4
"""A manager that has not listened for so many beats (paused, or its store was away) blames nobody
for what it has not heard meanwhile."""
_SAFE = "nothing of the attempt is visible; another one is made"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """One attempt, as its manager sees it."""

    record: ActionRecord
    attempt: Attempt
    placement: Placement | None
    running: Running
    watch: Watch

    @property
    def action(self) -> Action:
        """What it does."""
        return self.attempt.action

    @property
    def node(self) -> str | None:
        """Id of its node: where it says it is, else where it was sent."""
        told = self.watch.last.node if self.watch.last else None
        return self.placement.node.id if told is None and self.placement else told

    def describe(self) -> dict[str, Any]:
        """How far it is, as plain values."""
        beat = self.watch.last
        speed = self.watch.bytes_per_s
        return {
            "title": self.action.title,
            "attempt": self.attempt.number,
            "node": self.node,
            "doing": None if beat is None else beat.doing,
            "done_bytes": 0 if beat is None else beat.done_bytes,
            "total_bytes": None if beat is None else beat.total_bytes,
            "bytes_per_s": None if speed is None else round(speed),
            "percent": None if beat is None else beat.percent,
        }


class InFlight:
    """Starts, hears, stops and forgets attempts; one caller, one thread."""

    def __init__(self, store: Store, executor: Executor) -> None:
        self._store = store
        self._executor = executor
        self._flights: dict[str, Flight] = {}
        self._listened_at: float | None = None
        self._swept_at: float | None = None

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def all(self) -> tuple[Flight, ...]:
        """Every one of them."""
        return tuple(self._flights.values())

    def occupants(self) -> list[Occupant]:
        """What holds room, and where."""
        return [Occupant(action=f.action, node=f.node) for f in self._flights.values()]

    def start(self, record: ActionRecord, attempt: Attempt, placement: Placement | None) -> None:
        """The attempt has begun, or waits for its turn; `record` says RUNNING already."""
        self._flights[attempt.action.key] = Flight(
            record=record,
            attempt=attempt,
            placement=placement,
            running=self._executor.start(self._store.uri, attempt, placement),
            watch=Watch(begun_at=time.monotonic()),
        )

    def ended(self) -> list[Flight]:
        """Those that have ended, well or not."""
        return [flight for flight in self._flights.values() if flight.running.done()]

    def drop(self, flight: Flight) -> None:
        """It has ended, and its record says so: it is not in flight any more."""
        del self._flights[flight.action.key]

    def result_of(self, flight: Flight) -> Mapping[str, Any]:
        """What an attempt that has ended says; raises what it raised.

        One that was killed did not say anything: the error tells the last that was heard of it.
        """
        try:
            return flight.running.result()
        except DiedError as error:
            beat = self._last_words(flight)
            self._store.delete([flight.attempt.beat_key])
            said = "it had not begun" if beat is None else f"last heard of: {beat.sentence}"
            raise error.kind(f"{error.why}; {said}", self._store.uri, _SAFE) from error

    def listen(self, limits: Limits) -> list[tuple[Flight, TransientError]]:
        """Attempts that are given up, and why; they are stopped, and not in flight any more."""
        now = time.monotonic()
        silent_s = now - (self._listened_at or now - limits.beat_s)
        if silent_s < limits.beat_s:
            return []
        self._listened_at = now
        deaf_s = silent_s if silent_s > _DEAF_AFTER_BEATS * limits.beat_s else 0.0
        beats = read_beats(self._store, (f.attempt.beat_key for f in self._flights.values()))
        given_up: list[tuple[Flight, TransientError]] = []
        for key, flight in list(self._flights.items()):
            beat = _of_this_attempt(flight, beats.get(flight.attempt.beat_key))
            watch = flight.watch.without(deaf_s).after(beat, now)
            flight = replace(flight, watch=watch)
            self._flights[key] = flight
            why = watch.why_dead(limits, now) or self._why_lost(flight, limits, now)
            if why is not None:
                self.stop(key)
                given_up.append((flight, TransientError(why, self._store.uri, _SAFE)))
        return given_up

    def stop(self, key: str) -> None:
        """The attempt is not in flight any more, and will be gone; nothing, if there is none."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        flight.running.cancel()
        beat = flight.watch.last
        if beat is not None:
            self._executor.end_process(beat)
        self._store.delete([flight.attempt.beat_key])

    def forget(self) -> None:
        """Another manager acts: none of these is ours any more."""
        self._flights.clear()

    def problems(self) -> list[str]:
        """Sentences about attempts that should have begun long ago."""
        now = time.monotonic()
        waiting = [f for f in self._flights.values() if f.watch.has_waited(WAITS_AFTER_S, now)]
        if not waiting:
            return []
        return [f"{f.attempt.title} {self._executor.why_waiting(f.action)}" for f in waiting]

    def sweep(self) -> None:
        """What attempts of dead managers left is gone; looked for now and then, and at first."""
        now = time.monotonic()
        if self._swept_at is not None and now - self._swept_at < SWEEP_EVERY_S:
            return
        self._swept_at = now
        swept = sweep_beats(self._store, except_for=_beat_keys(self._flights.values()))
        if swept:
            log.info("swept signs of life of dead attempts num=%d", len(swept))

    def _why_lost(self, flight: Flight, limits: Limits, now: float) -> str | None:
        """Why an attempt that was never heard of is given up; None while it may wait for its turn.

        Its process, if it has one, is unknown: should it wake up, it finds that it was given up.
        """
        watch, has_room = flight.watch, self._executor.has_room
        if not watch.has_waited(limits.stalled_after_s, now) or not has_room(flight.action):
            return None
        return f"it has not begun for {now - watch.begun_at:.0f} s although there is room for it"

    def _last_words(self, flight: Flight) -> Beat | None:
        """The newest beat; it may have come after the last time that anybody listened."""
        found = read_beats(self._store, [flight.attempt.beat_key])
        beat = _of_this_attempt(flight, found.get(flight.attempt.beat_key))
        return flight.watch.last if beat is None else beat


def _beat_keys(flights: Iterable[Flight]) -> list[str]:
    return [flight.attempt.beat_key for flight in flights]


def _of_this_attempt(flight: Flight, beat: Beat | None) -> Beat | None:
    """A record that was begun anew counts from one again: an older attempt may still beat there."""
    is_ours = beat is not None and beat.attempt_started_at == flight.attempt.started_at
    return beat if is_ours else None
