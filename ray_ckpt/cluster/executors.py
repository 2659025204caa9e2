"""Where an action is carried out while the loop that planned it goes on.

RayTasks    one Ray task an action: on any node with room, or on the only one that can do it
Threads     this process, for a root that no cluster is at hand for
"""

import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import ray
from ray.exceptions import OutOfMemoryError as OutOfMemory
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.cluster.tasks import Attempt, run_action
from ray_ckpt.core.actions import Action
from ray_ckpt.core.draft import Node
from ray_ckpt.core.errors import NodeLostError, OutOfMemoryError, TransientError

IO_RESOURCE = "ckpt_io"
"""Custom resource of the nodes that run tasks after a save. They ask for no CPU, so that a trainer
which holds every CPU never starves them."""


class Running(Protocol):
    """An action that has begun; a `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Whether it has ended, well or not; answers at once."""
        ...

    def result(self) -> Mapping[str, Any]:
        """What the record says of it; raises what the action raised, or what became of its node."""
        ...

    def cancel(self) -> object:
        """It ends soon, if it can be stopped at all."""
        ...


class Executor(Protocol):
    """Carries out actions of one root."""

    def start(self, root: str, attempt: Attempt) -> Running:
        """The attempt has begun; returns at once."""
        ...

    def takes(self, action: Action) -> bool:
        """Whether it can be carried out from here at all."""
        ...

    def close(self) -> None:
        """Nothing is held any more."""
        ...


class RayTasks:
    """Ray never retries one: our records own the attempts. It dies with the process that asked."""

    def start(self, root: str, attempt: Attempt) -> Running:
        """A task that the dashboard shows under the action's title."""
        try:
            place = _place(attempt.action.node)
        except NodeLostError as error:
            lost: Future[Mapping[str, Any]] = Future()
            lost.set_exception(error)
            return lost
        task = ray.remote(run_action).options(
            name=attempt.action.title, num_cpus=0, max_retries=0, **place
        )
        return _RayTask(task.remote(root, attempt))

    def takes(self, action: Action) -> bool:
        """Every one: a node that is not of the cluster is a lost one."""
        return True

    def close(self) -> None:
        """Nothing is."""


class _RayTask:
    def __init__(self, task: "ray.ObjectRef[Any]") -> None:
        self._task = task

    def done(self) -> bool:
        finished, _ = ray.wait([self._task], timeout=0)
        return bool(finished)

    def result(self) -> Mapping[str, Any]:
        try:
            return ray.get(self._task)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except OutOfMemory as error:
            raise OutOfMemoryError(
                "the task was killed: its node ran out of memory",
                safe="nothing of the attempt is visible",
                do="give tasks a node with more memory (custom resource ckpt_io)",
            ) from error
        except RayError as error:
            raise TransientError(f"the task's worker or node died: {error}") from error

    def cancel(self) -> None:
        ray.cancel(self._task, force=True)


class Threads:
    """One action after the other: whoever waits in front of a terminal has one machine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt action")

    def start(self, root: str, attempt: Attempt) -> Running:
        """Begins when those before it have ended."""
        return self._pool.submit(run_action, root, attempt)

    def takes(self, action: Action) -> bool:
        """Whether it is not for another host alone."""
        return action.node is None or action.node.host == socket.gethostname()

    def close(self) -> None:
        """Waits for what has begun; the rest never begins."""
        self._pool.shutdown(cancel_futures=True)


def _place(node: Node | None) -> dict[str, Any]:
    """What a task asks for: that very node, or a slot of `ckpt_io` on any.

    On a node that it must run on it waits for nothing.
    """
    if node is None:
        return {"resources": io_resources(ray.cluster_resources)}
    found = find_node(node, ray.nodes())
    if found is None:
        raise NodeLostError(
            f"{node.title} is not there",
            safe="steps that were committed are untouched",
            do="start Ray on that host again within two minutes, or leave it",
        )
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=found, soft=False)}


def find_node(node: Node, nodes: Iterable[Mapping[str, Any]]) -> str | None:
    """Ray's id, among its `nodes`, of this one or of one that has joined on the same host since.

    None if neither is alive.
    """
    alive = [n for n in nodes if n["Alive"]]
    same = [n for n in alive if n["NodeID"] == node.id]
    host = [n for n in alive if n["NodeManagerHostname"] == node.host]
    return next((n["NodeID"] for n in (*same, *host)), None)


def io_resources(cluster_resources: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What a task asks for: a slot of `ckpt_io` where the cluster has any, else nothing at all.

    Without the resource a task still never waits behind a trainer, but may land on any node.
    """
    return {IO_RESOURCE: 1.0} if IO_RESOURCE in cluster_resources() else {}
