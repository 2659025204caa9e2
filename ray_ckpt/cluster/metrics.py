"""What a manager has seen, told to Ray's metrics: the charts of `infra/grafana`, the alerts.

A thread of its own tells every second: Ray drops a gauge that nobody sets for two of its reports,
which are a second apart at least. What grows old does so there, also while a round of the manager
hangs. Totals are gauges too: a counter of Ray's cannot be 0, and a rate misses what a series begins
with. All of it comes from the manager, so that a run has one series each and no trainer ever waits
for a metric.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ray.util.metrics import Gauge

from ray_ckpt.cluster.in_flight import Flight
from ray_ckpt.cluster.reconciler import Round
from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.metrics import (
    METRICS,
    Moving,
    Sample,
    World,
    counted,
    counted_save,
    gauges,
    zeros,
)
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.lease import TRAINER, has_ended

log = logging.getLogger("ray_ckpt")
TELL_EVERY_S = 1.0
LOOK_FOR_TRAINER_EVERY_S = 10.0


@dataclass(slots=True)
class _Trainer:
    """What the last look at the trainer's lease told."""

    looked_at: float = float("-inf")
    has_ended: bool = False


class Meter:
    """Of one run. Whatever goes wrong with a metric is a line in the log."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._gauges = {
            metric.name: Gauge(metric.name, metric.says, tag_keys=("run", *metric.labels))
            for metric in METRICS
        }
        self._labels = {metric.name: metric.labels for metric in METRICS}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}
        self._world: World | None = None
        self._trainer = _Trainer()
        self._lock = threading.Lock()
        self._has_failed = False

    def start(self) -> None:
        """Tells from now on, until the process ends."""
        threading.Thread(target=self._tell_on, name="ray_ckpt metrics", daemon=True).start()

    def saved(self, event: SaveEvent) -> None:
        """A save of the trainer has ended, or was not begun."""
        self._add(counted_save(event))

    def saw(self, done: Round, *, epoch: int) -> None:
        """A round of the manager; one that stands by has nothing to tell, another one does."""
        if done.standing_by is not None:
            self._world = None
            return
        before, self._world = self._world, self._seen(done, epoch)
        self._add(zeros(done.observed.policy))
        if before is not None:
            self._add(counted(before.observed, done.observed))

    def samples(self, now: float) -> list[Sample]:
        """What is told at this moment; nothing before the first round."""
        world = self._world
        if world is None:
            return []
        with self._lock:
            totals = [Sample(name, value, labels) for (name, labels), value in self._totals.items()]
        return [*gauges(world, now=now), *totals]

    def _add(self, increments: Iterable[Sample]) -> None:
        with self._lock:
            for each in increments:
                series = each.name, each.labels
                self._totals[series] = self._totals.get(series, 0.0) + each.value

    def _seen(self, done: Round, epoch: int) -> World:
        return World(
            observed=done.observed,
            planned=done.planned,
            moving=tuple(map(_moving, done.running)),
            num_problems=len(done.problems) + len(done.planned.problems),
            epoch=epoch,
            has_ended=self._trainer_has_ended(),
        )

    def _trainer_has_ended(self) -> bool:
        now, trainer = time.monotonic(), self._trainer
        if now - trainer.looked_at > LOOK_FOR_TRAINER_EVERY_S:
            trainer.looked_at = now
            with contextlib.suppress(StorageError):  # the next look may tell
                trainer.has_ended = has_ended(self._store, TRAINER)
        return trainer.has_ended

    def _tell_on(self) -> None:
        while True:
            try:
                for each in self.samples(time.time()):
                    labels = dict(zip(self._labels[each.name], each.labels, strict=True))
                    self._gauges[each.name].set(each.value, {"run": self._run, **labels})
                self._has_failed = False
            except Exception:
                # the thread outlives every failure; no action depends on it
                if not self._has_failed:
                    log.exception("metrics of %s cannot be told; all else goes on", self._run)
                self._has_failed = True
            time.sleep(TELL_EVERY_S)


def _moving(flight: Flight) -> Moving:
    watch = flight.watch
    return Moving(
        action=flight.action,
        done_bytes=watch.last.done_bytes if watch.last else 0,
        bytes_per_s=watch.bytes_per_s,
        eta_s=watch.eta_s,
    )
