"""What Ray knows of its nodes, as `core.admission` wants to have it, and what it is told back."""

import os
import signal
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.storage.beats import process_born

IO_RESOURCE = "ckpt_io"
"""Custom resource of the nodes that run tasks after a save. They ask for no CPU, so that a trainer
which holds every CPU never starves them."""


def living_nodes() -> list[LiveNode]:
    """Every node that is alive; two questions to the cluster's head."""
    draining = ray._private.state.state.get_draining_nodes()  # Ray says it nowhere else
    return [
        LiveNode(
            id=node["NodeID"],
            name=node["NodeManagerHostname"],
            num_slots=_slots(node["Resources"]),
            is_draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _slots(resources: Mapping[str, float]) -> int | None:
    return int(resources[IO_RESOURCE]) if IO_RESOURCE in resources else None


def options_of(placement: Placement) -> dict[str, Any]:
    """Ray's options for a task that runs there: no CPU, and a slot of `ckpt_io` where it has any.

    Without the resource a task still never waits behind a trainer. On a node that it must run on it
    waits for nothing.
    """
    takes_slot = placement.node.num_slots is not None and placement.strength == "prefer"
    strategy = NodeAffinitySchedulingStrategy(
        placement.node.id,
        soft=placement.strength == "prefer",
        # a place that others have filled meanwhile is no reason to wait
        _spill_on_unavailable=placement.strength == "prefer",
    )
    return {
        "num_cpus": 0,
        "resources": {IO_RESOURCE: 1.0} if takes_slot else {},
        "scheduling_strategy": strategy,
    }


def why_waiting(*, num_gpus: int) -> str:
    """What a task that Ray has not begun waits for, as far as one look tells."""
    if num_gpus and _free("GPU") < num_gpus:
        return f"waits for a GPU: {_free('GPU'):.0f} of {_total('GPU'):.0f} free"
    if not _total(IO_RESOURCE):
        return "waits for a worker process of Ray"
    free, total = _free(IO_RESOURCE), _total(IO_RESOURCE)
    return f"waits for a slot of {IO_RESOURCE}: {free:.0f} of {total:.0f} free"


def has_room(*, num_gpus: int) -> bool:
    """Whether a task could begin now; where nobody has slots none is needed."""
    has_slot = not _total(IO_RESOURCE) or _free(IO_RESOURCE) >= 1.0
    return has_slot and (not num_gpus or _free("GPU") >= num_gpus)


def room_for_helpers(num_sent: int, *, num_gpus: int) -> int:
    """How many tasks could begin now that only help, beside so many of them.

    Where nobody has slots each other node takes one.
    """
    if _total(IO_RESOURCE):
        room = int(_free(IO_RESOURCE))
    else:
        room = max(0, len(living_nodes()) - 1 - num_sent)
    return min(room, int(_free("GPU"))) if num_gpus else room


def options_of_helper() -> dict[str, Any]:
    """Ray's options for one of these: a slot where there are any, far from the others."""
    has_slots = IO_RESOURCE in ray.cluster_resources()
    return {
        "num_cpus": 0,
        "resources": {IO_RESOURCE: 1.0} if has_slots else {},
        "scheduling_strategy": "SPREAD",
    }


def _total(resource: str) -> float:
    return ray.cluster_resources().get(resource, 0.0)


def _free(resource: str) -> float:
    return ray.available_resources().get(resource, 0.0)


def end_process(beat: Beat) -> None:
    """The worker that spoke last in `beat` will be gone; returns at once.

    A task on its very node kills it: Ray's own way to cancel a task asks the process itself, and
    one that is stopped, or stuck in a system call, does not answer.
    """
    task = ray.remote(kill_if_same).options(
        name=f"end process {beat.pid}",
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(str(beat.node), soft=False),
    )
    task.remote(beat.pid, beat.process_born)


def kill_if_same(pid: int, born: str) -> bool:
    """Whether a process of this host was killed: it has this pid and began at that very moment."""
    if not born or process_born(pid) != born:
        return False
    os.kill(pid, signal.SIGKILL)
    return True
