"""Nodes of a Ray cluster on this machine, and what the tasks on each of them have used.

A head without slots of `ckpt_io`, and nodes with one each: real raylets. For Linux.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from ray_ckpt.cluster.nodes import IO_RESOURCE

_WORKER = b"ray::"
"""What Ray calls the processes that tasks run in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """By one process, or by several together."""

    cpu_s: float = 0.0
    written_bytes: int = 0
    """Handed to the kernel, for whatever file."""


@contextlib.contextmanager
def nodes_with_slots(count: int) -> Generator[list[int]]:
    """Process ids of the nodes' raylets; this process is connected. All of it is gone afterwards.

    Ray's files lie in a folder of their own, so that nobody else's Ray is found there.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False, dashboard_agent_listen_port=0)
            nodes = [cluster.add_node(resources={IO_RESOURCE: 1}) for _ in range(count)]
            ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield [node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid for node in nodes]
        finally:
            ray.shutdown()
            cluster.shutdown()


def used_by_workers(raylet: int) -> dict[int, Used]:
    """By process id, of a node's workers that live now."""
    found: dict[int, Used] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if _is_worker(process, raylet):
                found[int(process.name)] = _used(process)
    return found


def used_since(before: dict[int, Used], after: dict[int, Used]) -> Used:
    """By the workers of one node together; those that have ended are not known."""
    then = [before.get(pid, Used()) for pid in after]
    return Used(
        cpu_s=sum(used.cpu_s for used in after.values()) - sum(used.cpu_s for used in then),
        written_bytes=sum(used.written_bytes for used in after.values())
        - sum(used.written_bytes for used in then),
    )


def _is_worker(process: Path, raylet: int) -> bool:
    parent = int(_stat(process)[1])
    return parent == raylet and process.joinpath("cmdline").read_bytes().startswith(_WORKER)


def _used(process: Path) -> Used:
    ticks = sum(int(field) for field in _stat(process)[11:13])
    lines = process.joinpath("io").read_text().splitlines()
    return Used(
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        written_bytes=int(dict(line.split(": ") for line in lines)["wchar"]),
    )


def _stat(process: Path) -> Sequence[str]:
    """Fields of `/proc/<pid>/stat` from the third on, the first behind the process's name."""
    return process.joinpath("stat").read_text().rpartition(")")[2].split()
