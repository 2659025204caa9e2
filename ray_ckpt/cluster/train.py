"""What Ray Train's workers tell the manager, and what Ray tells them.

    Reporter     "step n is committed", how training goes     to the manager, if there is one
    NodeWatch    a node is about to be taken away             from Ray, through Ray Train

What the reporter is called for returns at once and swallows every failure: a manager that is gone
must never stop or slow training. Nothing is lost by it, since the manager looks at storage anyway.
"""

import logging
import socket
from typing import Any

import ray
import ray.train

from ray_ckpt.cluster.connect import find_manager
from ray_ckpt.core.draft import Node
from ray_ckpt.core.events import SaveEvent

log = logging.getLogger("ray_ckpt")


class Reporter:
    """One worker's line to the manager; it may be dead."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._manager: Any = None
        try:
            self._manager = find_manager(root)
        except Exception:  # training goes on without anybody to tell
            log.warning("the manager of %s cannot be reached", root, exc_info=True)

    def saved(self, event: SaveEvent) -> None:
        """The manager looks at storage now instead of in a moment, and counts."""
        self._tell("saved", event)

    def progress(self, **values: Any) -> None:
        """The manager shows these to people: `step`, `loss`, and what else is told."""
        self._tell("report", values)

    def _tell(self, method: str, *arguments: Any) -> None:
        if self._manager is None:
            return
        try:
            getattr(self._manager, method).remote(*arguments)
        except Exception:  # as above
            log.warning("the manager of %s did not take a report", self._root, exc_info=True)


class NodeWatch:
    """Whether nodes of this run are about to be taken away, as Ray knows it.

    Ray Train runs the training function outside the main thread, where SIGTERM cannot be watched:
    what the cloud announces reaches a worker as the drain of its node. The thing to do is to save
    and to train on. Ray Train restarts the workers elsewhere at the deadline, but takes a training
    function that returns, for whatever reason, for one that has finished.
    """

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()

    def are_leaving(self) -> bool:
        """True once for every node; all workers must ask equally often, and wait for each other."""
        info = ray.train.get_preemption_info()
        leaving = frozenset(info.preempted_node_ids) if info is not None else frozenset[str]()
        new, self._known = leaving - self._known, leaving
        if new:
            log.warning("nodes are about to be taken away: %s", ", ".join(sorted(new)))
        return bool(new)


def this_node() -> Node:
    """Where this worker runs, so that a task can be sent there: for `Run(node=...)`."""
    return Node(host=socket.gethostname(), id=ray.get_runtime_context().get_node_id())


def run_owner() -> str:
    """Equal for all restarts of this Ray Train run's workers: who holds the trainer's lease."""
    return f"ray-train {ray.train.get_context().get_experiment_name()}"
