"""The manager of one root: observe storage, plan, act; again and again.

A plain class until `cluster.connect` wraps it as an actor. It keeps nothing between rounds that it
cannot read from storage again: killed at any line, it starts anew and goes on. Its memory holds
only the tasks it is waiting for and what the trainer said last, for people to look at.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_ckpt.cluster.tasks import run_action
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.errors import TransitionError
from ray_ckpt.core.lifecycle import ActionState, CheckpointState, move_checkpoint
from ray_ckpt.core.names import run_name
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import Plan, plan
from ray_ckpt.storage.backends import open_catalog

log = logging.getLogger("ray_ckpt")

IO_RESOURCE = "ckpt_io"
"""Custom resource of the nodes that run tasks after a save. They ask for no CPU, so that a trainer
which holds every CPU never starves them."""
_TRASHED = CheckpointState.TRASHED
MAX_RUNNING = 2
ABANDONED_AFTER_S = 6 * 3600.0
"""A save or an export whose files have not changed for so long is given up and swept."""
LOSSES_KEPT = 256
"""So many of the last steps' losses, repeated steps included, are held for people to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    record: ActionRecord
    task: "ray.ObjectRef[Any]"


class Manager:
    """Drives every action of one root; its methods answer at once."""

    def __init__(self, root: str, interval_s: float = 2.0) -> None:
        # an actor's process has no other place where logging is set up
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self._root = root
        self._catalog = open_catalog(root)
        self._interval_s = interval_s
        self._in_flight: dict[str, _InFlight] = {}
        self._seen: dict[int, CheckpointState] = {}
        self._progress: dict[str, Any] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)
        self._status: dict[str, Any] = {"root": root, "rounds": 0, "problems": []}
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reconcile", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Manager({run_name(self._root)})"

    # ---- what others call ----

    def wake(self) -> None:
        """The next round starts now: something was committed, or asked for."""
        self._wake.set()

    def report(self, progress: Mapping[str, Any]) -> None:
        """Keeps what the trainer says about itself, for people to look at."""
        self._progress.update(progress)
        if "step" in progress and "loss" in progress:
            self._losses.append((progress["step"], progress["loss"]))

    def status(self) -> dict[str, Any]:
        """The last round and the trainer's progress, as plain values."""
        return {
            **self._status,
            "progress": dict(self._progress),
            "losses": list(self._losses),
        }

    # ---- the loop ----

    def _loop(self) -> None:
        while True:
            try:
                self._round(time.time())
            except Exception as error:
                # the loop must outlive every failure; storage is asked again in the next round
                log.exception("round failed root=%s", self._root)
                self._status = {**self._status, "problems": [f"the last round failed: {error}"]}
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _round(self, now: float) -> None:
        self._collect(now)
        observed = self._resume_orphans(self._catalog.observe(), now)
        self._note_changes(observed)
        planned = plan(observed, now=now)
        for action in planned.actions:
            if len(self._in_flight) < MAX_RUNNING and action.key not in self._in_flight:
                self._start(action, observed.records.get(action.key), now)
        for request in planned.settled:
            self._catalog.records.settle_request(request)
        self._catalog.empty_trash(older_than_s=observed.policy.keep.trash_grace_s, now=now)
        self._catalog.commit.sweep(prefix="", idle_s=ABANDONED_AFTER_S, now=now)
        self._status = self._describe(observed, planned)

    def _note_changes(self, observed: Observation) -> None:
        """Tells every move of a checkpoint since the last round; an illegal one is a warning."""
        states = {view.step: view.state for view in observed.checkpoints}
        for step, before in self._seen.items():
            gone = CheckpointState.PURGED if before is _TRASHED else CheckpointState.MISSING
            after = states.get(step, gone)
            if after is before:
                continue
            try:
                log.info("step-%d: %s -> %s", step, before, move_checkpoint(before, after))
            except TransitionError as error:
                log.warning("step-%d was changed by somebody else: %s", step, error.what)
        self._seen = states

    def _resume_orphans(self, observed: Observation, now: float) -> Observation:
        """Records that say RUNNING under a manager that died: its tasks died with it."""
        records = dict(observed.records)
        for key, record in observed.records.items():
            if record.state is ActionState.RUNNING and key not in self._in_flight:
                records[key] = record.interrupted(now)
                self._catalog.records.write_action(records[key])
        return replace(observed, records=records)

    def _start(self, action: Action, record: ActionRecord | None, now: float) -> None:
        """The record says RUNNING before the task exists, so that no crash hides an attempt."""
        if record is None or record.state.is_terminal:
            record = ActionRecord(action=action)
        started = record.started(now)
        self._catalog.records.write_action(started)
        task = _remote(action).remote(self._root, action.to_document())
        self._in_flight[action.key] = _InFlight(record=started, task=task)
        log.info("started %s attempt=%d", action.title, started.attempts)

    def _collect(self, now: float) -> None:
        """Records of the tasks that have ended since the last round."""
        for key, running in list(self._in_flight.items()):
            finished, _ = ray.wait([running.task], timeout=0)
            if finished:
                self._catalog.records.write_action(_outcome(running, now))
                del self._in_flight[key]

    def _describe(self, observed: Observation, planned: Plan) -> dict[str, Any]:
        waiting = [a.title for a in planned.actions if a.key not in self._in_flight]
        return {
            "root": self._root,
            "run_id": observed.run_id,
            "rounds": self._status["rounds"] + 1,
            "checkpoints": {str(c.step): str(c.state) for c in observed.checkpoints},
            "running": [running.record.action.title for running in self._in_flight.values()],
            "waiting": waiting,
            "dead": [
                {"title": record.action.title, "error": record.error}
                for record in observed.records.values()
                if record.state is ActionState.DEAD
            ],
            "retrying": [
                record.action.title
                for record in observed.records.values()
                if record.state is ActionState.RETRY_WAIT
            ],
            "problems": list(planned.problems),
            "is_idle": not (self._in_flight or waiting),
        }


def _outcome(running: _InFlight, now: float) -> ActionRecord:
    try:
        result: Mapping[str, Any] = ray.get(running.task)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        log.warning("failed %s: %s", running.record.action.title, cause)
        return running.record.failed(cause, now)
    except RayError as error:
        # the worker or its node died: not the action's fault
        log.warning("lost %s: %s", running.record.action.title, error)
        return running.record.failed(error, now)
    log.info("finished %s", running.record.action.title)
    return running.record.succeeded(result, now)


def _remote(action: Action) -> Any:
    """The task as the dashboard shows it. Ray never retries it: our records own the attempts."""
    return ray.remote(run_action).options(
        name=action.title, num_cpus=0, max_retries=0, resources=io_resources(ray.cluster_resources)
    )


def io_resources(cluster_resources: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What a task asks for: a slot of `ckpt_io` where the cluster has any, else nothing at all.

    Without the resource a task still never waits behind a trainer, but may land on any node.
    """
    return {IO_RESOURCE: 1.0} if IO_RESOURCE in cluster_resources() else {}
