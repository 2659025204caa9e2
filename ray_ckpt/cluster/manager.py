"""The manager of one root: a Reconciler that never ends, and what people ask it.

A plain class until `cluster.connect` wraps it as an actor. Its memory holds only what the trainer
said last and what the last round saw, for people to look at. Of several managers of one root, on
one cluster or on many, the one that holds the lease acts; the others stand by.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray

from ray_ckpt.cluster.executors import RayTasks
from ray_ckpt.cluster.metrics import Meter
from ray_ckpt.cluster.reconciler import Reconciler, Round
from ray_ckpt.cluster.task_log import speak
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.names import run_name
from ray_ckpt.storage.backends import open_catalog

log = logging.getLogger("ray_ckpt")

LOSSES_KEPT = 256
"""So many of the last steps' losses, repeated steps included, are held for people to look at."""


class Manager:
    """Turns the crank of one root; its methods answer at once."""

    def __init__(self, root: str, interval_s: float = 2.0) -> None:
        # an actor's process has no other place where logging is set up
        name = run_name(root)
        speak(f"{name}: ")
        self._root = root
        catalog = open_catalog(root)
        self._reconciler = Reconciler(catalog, RayTasks(), owner=_owner())
        self._meter = Meter(catalog.store, name)
        self._interval_s = interval_s
        self._progress: dict[str, Any] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)
        self._rounds = 0
        self._status: dict[str, Any] = {"root": root, "problems": []}
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reconcile", daemon=True)
        self._thread.start()
        self._meter.start()

    def __repr__(self) -> str:
        return f"Manager({run_name(self._root)})"

    # ---- what others call ----

    def wake(self) -> None:
        """The next round starts now: something was committed, or asked for."""
        self._wake.set()

    def saved(self, event: SaveEvent) -> None:
        """A save of the trainer has ended, or was not begun; the next round starts now."""
        self._meter.saved(event)
        if event.kind in ("committed", "staged"):
            self.report({f"last_{event.kind}_step": event.step, "save_s": event.seconds})
            self.wake()
        else:
            self.report({f"last_{event.kind}_save": f"step-{event.step}: {event.reason}"})

    def report(self, progress: Mapping[str, Any]) -> None:
        """Keeps what the trainer says about itself, for people to look at."""
        self._progress.update(progress)
        if "step" in progress and "loss" in progress:
            self._losses.append((progress["step"], progress["loss"]))

    def status(self) -> dict[str, Any]:
        """The last round and the trainer's progress, as plain values."""
        return {
            **self._status,
            "rounds": self._rounds,
            "progress": dict(self._progress),
            "losses": list(self._losses),
        }

    # ---- the loop ----

    def _loop(self) -> None:
        while True:
            try:
                done = self._reconciler.round(time.time())
                self._meter.saw(done, epoch=self._reconciler.epoch)
                self._status = describe(self._root, done)
                self._rounds += 1
            except Exception as error:
                # the loop must outlive every failure; storage is asked again in the next round
                log.exception("round failed root=%s", self._root)
                self._status = {**self._status, "problems": [f"the last round failed: {error}"]}
            self._wake.wait(self._interval_s)
            self._wake.clear()


def describe(root: str, done: Round) -> dict[str, Any]:
    """A round as plain values."""
    records = done.observed.records.values()
    standing_by = [f"standing by: {done.standing_by}"] if done.standing_by else []
    return {
        "root": root,
        "run_id": done.observed.run_id,
        "checkpoints": {str(c.step): str(c.state) for c in done.observed.checkpoints},
        "running": [flight.describe() for flight in done.running],
        "waiting": [
            {"title": action.title, "why": done.waits.get(action.key)} for action in done.waiting
        ],
        "dead": [
            {"title": record.action.title, "error": record.error}
            for record in records
            if record.state is ActionState.DEAD
        ],
        "retrying": [r.action.title for r in records if r.state is ActionState.RETRY_WAIT],
        "problems": [*standing_by, *done.problems, *done.planned.problems],
        "is_idle": not (done.running or done.waiting),
    }


def _owner() -> str:
    """Equal for all restarts of one actor, unlike any other's on any cluster."""
    return ray.get_runtime_context().get_actor_id() or uuid.uuid4().hex
