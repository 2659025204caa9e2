"""What Ray Train's workers tell the manager: "step n is committed", and how training goes.

Every call returns at once and swallows every failure: a manager that is gone must never stop or
slow training. Nothing is lost by it, since the manager looks at storage anyway.
"""

import logging
from typing import Any

import ray.train

from ray_ckpt.cluster.connect import find_manager

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

    def committed(self, step: int) -> None:
        """The manager looks at storage now instead of in a moment."""
        self._tell("wake")
        self._tell("report", {"last_committed_step": step})

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


def run_owner() -> str:
    """Equal for all restarts of this Ray Train run's workers: who holds the trainer's lease."""
    return f"ray-train {ray.train.get_context().get_experiment_name()}"
