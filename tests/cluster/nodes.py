"""More nodes for the session's Ray: real raylets on this machine, killed like hosts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from ray_ckpt.cluster.nodes import IO_RESOURCE
from tests.waiting import PATIENCE_S, wait_for

_RAY = str(Path(sys.executable).parent / "ray")
TRAINER = "trainer"
"""A resource that only these nodes have: training that asks for it runs on no other."""
_STARTS = 3
"""Of one node: on a busy machine a raylet may give up while it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A host of its own, as far as Ray can tell."""

    label: str
    """A resource that it alone has."""
    process: subprocess.Popen[bytes]

    def find_id(self) -> str | None:
        """Ray's name for it; None until it has joined."""
        found = [n["NodeID"] for n in ray.nodes() if n["Alive"] and self.label in n["Resources"]]
        return found[0] if found else None

    def kill(self) -> None:
        """The host has lost power: every process of it is gone, and nobody was told."""
        for pid in sorted(self._pids()):  # Ray gives each worker a process group of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _pids(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, ProcessLookupError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    yield int(entry.name)


class Nodes:
    """Adds nodes with one CPU and one `trainer` each."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._nodes: list[Node] = []

    def add(self, *, num_gpus: int = 0, num_slots: int = 0, **environment: str) -> Node:
        """A node that tasks and actors may run on from now on.

        `num_slots` are slots of `ckpt_io`; without any, no task after a save goes there.
        """
        for _ in range(_STARTS):
            node = self._start(num_gpus, num_slots, environment)
            wait_for(lambda node=node: node.process.poll() is not None or node.find_id())
            if node.process.poll() is None:
                return node
        raise AssertionError(f"no node came up in {_STARTS} starts")

    def _start(self, num_gpus: int, num_slots: int, environment: dict[str, str]) -> Node:
        label = uuid.uuid4().hex
        slots = {IO_RESOURCE: num_slots} if num_slots else {}
        command = [
            *(_RAY, "start", "--block", "--disable-usage-stats"),
            *("--address", self._address, "--num-cpus", "1", "--num-gpus", str(num_gpus)),
            *("--resources", json.dumps({TRAINER: 1, label: 1, **slots})),
        ]
        # a session of its own: what the node starts can be killed with it, and nothing else
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        node = Node(label=label, process=process)
        self._nodes.append(node)
        return node

    def drain(self, node: Node, *, deadline_s: int) -> None:
        """The cloud has announced that it takes the node away in so many seconds."""
        command = [
            *(_RAY, "drain-node", "--address", self._address, "--node-id", str(node.find_id())),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot reclaim"),
            *("--deadline-remaining-seconds", str(deadline_s)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)

    def close(self) -> None:
        """Every node is gone."""
        for node in self._nodes:
            node.kill()


def nodes_of(address: str) -> Iterator[Nodes]:
    """For a fixture."""
    nodes = Nodes(address)
    try:
        yield nodes
    finally:
        nodes.close()
