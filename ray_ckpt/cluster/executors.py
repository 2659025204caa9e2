"""Where an action is carried out while the loop that planned it goes on.

RayTasks    one Ray task an action: on any node with room, or on the only one that can do it
Threads     this process, for a root that no cluster is at hand for
"""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import ray
from ray.exceptions import OutOfMemoryError as OutOfMemory
from ray.exceptions import RayError, RayTaskError

from ray_ckpt.cluster import nodes, priority
from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.ray_result import raised_in
from ray_ckpt.cluster.task_log import speak
from ray_ckpt.cluster.tasks import Result, run_action
from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.errors import NodeLostError, OutOfMemoryError, TransientError
from ray_ckpt.core.lifecycle import ActionKind


class Running(Protocol):
    """An action that has begun; a `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Whether it has ended, well or not; answers at once."""
        ...

    def result(self) -> Mapping[str, Any]:
        """What the record says of it; raises what the action raised, or DiedError."""
        ...

    def cancel(self) -> object:
        """It ends soon, if it can be stopped at all."""
        ...


class DiedError(Exception):
    """An attempt has ended without a word of its own."""

    def __init__(self, why: str, kind: type[TransientError] | type[OutOfMemoryError]) -> None:
        super().__init__(why, kind)
        self.why = why
        self.kind = kind


class Executor(Protocol):
    """Carries out actions of one root."""

    def nodes(self) -> Sequence[LiveNode]:
        """Where an action may run."""
        ...

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        """The attempt has begun, or waits for its turn; returns at once.

        Without a placement the one node that can do it is not there.
        """
        ...

    def why_waiting(self, action: Action) -> str:
        """What an attempt at it that has not begun waits for."""
        ...

    def has_room(self, action: Action) -> bool:
        """Whether an attempt at it that has not begun waits for nothing that can be named."""
        ...

    def end_process(self, beat: Beat) -> None:
        """The process that spoke last in `beat` will be gone, if it is one of the executor's."""
        ...

    def takes(self, action: Action) -> bool:
        """Whether it can be carried out from here at all."""
        ...

    def close(self) -> None:
        """Nothing is held any more."""
        ...


class RayTasks:
    """Ray never retries one: our records own the attempts. It dies with the process that asked."""

    def nodes(self) -> Sequence[LiveNode]:
        """The cluster's."""
        return nodes.living_nodes()

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        """A task that the dashboard shows under the action's title."""
        if placement is None:
            return _lost(attempt)
        task = ray.remote(run_on_ray).options(
            name=attempt.title,
            max_retries=0,
            num_gpus=attempt.action.num_gpus,
            **nodes.options_of(placement),
        )
        return _RayTask(task.remote(root, attempt))

    def takes(self, action: Action) -> bool:
        """Every one: a node that is not of the cluster is a lost one."""
        return True

    def why_waiting(self, action: Action) -> str:
        """A slot or a GPU, most likely."""
        return nodes.why_waiting(num_gpus=action.num_gpus)

    def has_room(self, action: Action) -> bool:
        """A slot is free, or none is needed, and a GPU where it wants one."""
        return nodes.has_room(num_gpus=action.num_gpus)

    def end_process(self, beat: Beat) -> None:
        """By a task on its node."""
        if beat.node is not None:
            nodes.end_process(beat)

    def close(self) -> None:
        """Nothing is."""


def run_on_ray(root: str, attempt: Attempt) -> Result:
    """The action's effect is there; the task gives way to training while it works."""
    speak()  # a task's process has no other place where logging is set up
    node = ray.get_runtime_context().get_node_id()
    crew = None
    if attempt.action.kind is ActionKind.EXPORT:
        from ray_ckpt.cluster.crew import together  # torch, which the manager never needs

        crew = together(attempt.action.title)
    return priority.giving_way(lambda: run_action(root, attempt, node=node, crew=crew))


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
            raise raised_in(error) from None
        except OutOfMemory as error:
            why = "the task was killed: its node ran out of memory"
            raise DiedError(why, OutOfMemoryError) from error
        except RayError as error:
            why = f"the task's worker or node died: {error}"
            raise DiedError(why, TransientError) from error

    def cancel(self) -> None:
        ray.cancel(self._task, force=True)


class Threads:
    """One action after the other: whoever waits in front of a terminal has one machine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt action")

    def nodes(self) -> Sequence[LiveNode]:
        """The host of this process, which takes one at a time."""
        return [LiveNode(id="", name=socket.gethostname(), num_slots=1)]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        """Begins when those before it have ended."""
        return self._pool.submit(run_action, root, attempt)

    def takes(self, action: Action) -> bool:
        """Whether it is not for another host alone."""
        return action.node is None or action.node.host == socket.gethostname()

    def why_waiting(self, action: Action) -> str:
        """Its one thread, which a hanging attempt never gives back."""
        return "waits for the one before it, which was given up, to let its thread go"

    def has_room(self, action: Action) -> bool:
        """Never: an attempt that waits, waits for the thread."""
        return False

    def end_process(self, beat: Beat) -> None:
        """Nothing: it is this one."""

    def close(self) -> None:
        """Waits for what has begun; the rest never begins."""
        self._pool.shutdown(cancel_futures=True)


def _lost(attempt: Attempt) -> Running:
    """An attempt that has ended already: where its files lie nothing can be started."""
    assert attempt.action.node is not None, "only what names its node may lack one"
    error = NodeLostError(
        f"{attempt.action.node.title} is not there",
        safe="steps that were committed are untouched",
        do="start Ray on that host again within two minutes, or leave it",
    )
    lost: Future[Mapping[str, Any]] = Future()
    lost.set_exception(error)
    return lost
