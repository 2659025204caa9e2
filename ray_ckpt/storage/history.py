"""Events of one root on storage: one object a batch, never rewritten.

    .ray_ckpt/events/<time>-<who>-<id>.jsonl    written by whoever has something to tell
    .ray_ckpt/snapshot.json                     up to where the manager has told

All of it can be lost without losing a checkpoint. Nobody's work depends on telling: what cannot be
written is a line in the log, and the manager tells it when it can.
"""

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Sequence

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectNotFoundError, StorageError
from ray_ckpt.core.events import Event, utc
from ray_ckpt.core.history import Snapshot, changes, snapshot_of
from ray_ckpt.core.observation import Observation
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.base import ObjectInfo, Store

log = logging.getLogger("ray_ckpt")
MAX_WAITING = 256
"""So many events wait to be written at most; more are dropped, and counted in the log."""
CLOSE_S = 5.0


def append_events(store: Store, events: Sequence[Event]) -> None:
    """The events, of one writer and oldest first, are on storage."""
    last = events[-1]
    key = names.event_key(last.at, last.who, uuid.uuid4().hex[:8])
    store.create(key, "".join(f"{event.to_json()}\n" for event in events).encode())


class EventReader:
    """Reads the events of one root, each once, however often it was told."""

    def __init__(self, store: Store, *, since: str = "") -> None:
        self._store = store
        self._since = since
        """UTC, ISO 8601; what was told before is passed over."""
        self._read: set[str] = set()
        self._ids: set[str] = set()

    def read(self) -> list[Event]:
        """Events that no earlier call returned, oldest first."""
        oldest = f"{names.EVENTS}/{names.event_time(self._since)}" if self._since else ""
        listed = [info for info in self._store.list_objects(names.EVENTS) if info.key >= oldest]
        fresh = sorted((i for i in listed if i.key not in self._read), key=lambda info: info.key)
        self._read |= {info.key for info in fresh}
        told = [event for batch in at_once(self._batch, fresh) for event in batch]
        wanted = [e for e in told if e.at >= self._since and e.id not in self._ids]
        # of what was told twice the first telling counts
        first = {event.id: event for event in sorted(wanted, key=_when, reverse=True)}
        self._ids |= first.keys()
        return sorted(first.values(), key=_when)

    def _batch(self, info: ObjectInfo) -> list[Event]:
        try:
            lines = self._store.read(info.key).decode().splitlines()
            return [Event.from_json(line) for line in lines]
        except ObjectNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            log.warning("%s/%s cannot be read: %r", self._store.uri, info.key, error)
            return []


def _when(event: Event) -> str:
    return event.at


class Teller:
    """Tells what changed from one look to the next. One at a time: its caller holds a lease."""

    def __init__(self, store: Store, *, who: str) -> None:
        self._store = store
        self._who = who
        self._before: Snapshot | None = None
        """What lies on storage; read at the first call."""
        self._told: set[str] = set()
        """Ids of what was told since then."""
        self._has_failed = False

    def tell(self, observed: Observation, *, now: float) -> list[Event]:
        """Events told just now: they are on storage, and so is what was observed.

        The events go first: who dies between the two writes tells them once more, under the same
        ids. What cannot be written is told by a later call, and nothing piles up meanwhile.
        """
        try:
            told = self._tell(observed, now)
        except StorageError as error:
            if not self._has_failed:
                log.warning("events cannot be written; all else goes on: %s", error)
            self._has_failed = True
            return []
        self._has_failed = False
        return told

    def _tell(self, observed: Observation, now: float) -> list[Event]:
        before = self._before = self._before or self._read()
        after = snapshot_of(observed, token=uuid.uuid4().hex[:12])
        if after.facts == before.facts:
            return []
        found = changes(before, after, at=utc(now), who=self._who)
        told = [event for event in found if event.id not in self._told]
        if told:
            append_events(self._store, told)
            self._told |= {event.id for event in told}
        self._store.write(names.SNAPSHOT, after.to_json())
        self._before, self._told = after, set()
        return told

    def _read(self) -> Snapshot:
        try:
            return Snapshot.from_json(self._store.read(names.SNAPSHOT))
        except ObjectNotFoundError:
            return Snapshot()
        except ValueError as error:
            log.warning("%s/%s cannot be read: %s", self._store.uri, names.SNAPSHOT, error)
            return Snapshot()


class BackgroundTeller:
    """Writes events in a thread of its own, so that no caller ever waits or fails."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: queue.Queue[Callable[[], Event] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def tell(self, make: Callable[[], Event]) -> None:
        """The event that `make` returns will be on storage; `make` is called in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ray_ckpt events", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(make)
        except queue.Full:
            log.warning("an event is not told: %d others wait to be written", MAX_WAITING)

    def close(self) -> None:
        """Everything that could be told in a few seconds is told."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (make := self._waiting.get()) is not None:
            try:
                append_events(self._store, [make()])
            except Exception as error:  # noqa: BLE001  the thread outlives them all
                log.warning("an event cannot be written; all else goes on: %s", error)
