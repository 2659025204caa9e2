"""Ranks that save to disks of their own, and a manager that looks at what they left there.

The hosts are folders and names: two ranks of one machine that say they run on two.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.executors import Executor, Running, Threads
from ray_ckpt.cluster.reconciler import Reconciler
from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.draft import Node
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.storage.catalog import Catalog
from tests.tensors.plain import Layer, plain_manager
from tests.tensors.ranks import run
from tests.waiting import wait_for

HERE = socket.gethostname()


def config(disk: Path, mode: Mode = "sync") -> SaveConfig:
    return SaveConfig(every_steps=1, mode=mode, when_busy="wait", local_dir=str(disk))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What every rank does, on a host and a disk of its own."""

    root: str
    disks: Path
    steps: tuple[int, ...]
    hosts: tuple[str, ...] = (HERE, HERE)
    ids: tuple[str, ...] = ("id-0", "id-1")
    """What the cluster calls the hosts."""
    mode: Mode = "sync"
    resume: int = -1
    value: float | None = None
    """What every tensor is filled with; None for the number of the step."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def train(training: Training) -> list[str]:
    """On each rank; returns the events that it was told of."""
    os.environ.update(training.environment)
    rank = dist.get_rank()
    told: list[str] = []
    model = Layer()
    manager = plain_manager(
        training.root,
        model,
        config(training.disks / str(rank), training.mode),
        node=Node(host=training.hosts[rank], id=training.ids[rank]),
        on_event=lambda event: told.append(f"{event.kind} {event.step}"),
    )
    manager.load(training.resume)
    for step in training.steps:
        model.fill(step if training.value is None else training.value)
        manager.save(step)
    manager.close()
    assert manager.stats.num_staged == len(training.steps)
    return told


def stage(root: str, disks: Path, *steps: int, **changes: Any) -> list[list[str]]:
    """Two ranks on two disks have staged these steps."""
    return run(train, Training(root=root, disks=disks, steps=steps, **changes))


class Patient:
    """An executor whose actions have ended when their start returns."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def nodes(self) -> Sequence[LiveNode]:
        return [replace(node, num_slots=None) for node in self._executor.nodes()]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Running:
        running = self._executor.start(root, attempt, placement)
        wait_for(running.done)
        return running

    def takes(self, action: Action) -> bool:
        return self._executor.takes(action)

    def why_waiting(self, action: Action) -> str:
        return self._executor.why_waiting(action)

    def has_room(self, action: Action) -> bool:
        return self._executor.has_room(action)

    def end_process(self, beat: Beat) -> None:
        self._executor.end_process(beat)

    def close(self) -> None:
        self._executor.close()


def rounds(catalog: Catalog, executor: Executor | None = None, *, count: int = 5) -> None:
    """A manager looks so many times, ten minutes apart."""
    reconciler = Reconciler(catalog, Patient(executor or Threads()), owner="test")
    for number in range(count):
        reconciler.round(time.time() + number * 600.0)
    reconciler.close()
