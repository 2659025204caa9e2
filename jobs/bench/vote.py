"""What a step without a save costs: one `save()` that finds nothing due, on two ranks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import nn

from jobs.bench.ranks import on_ranks
from jobs.bench.timing import Timing, interleaved
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState

NUM_CALLS = 200


def measure_votes(repeats: int) -> list[Timing]:
    """Rank 0's times of `NUM_CALLS` calls each, with and without anything to listen for."""
    return on_ranks(partial(_measured, repeats))


def _measured(repeats: int, folder: Path) -> list[Timing]:
    managers = {
        "listens": _manager(f"{folder}/listens", SaveConfig(every_steps=None)),
        "does not": _manager(f"{folder}/not", SaveConfig(every_steps=None, listen=False)),
    }
    ways: dict[str, Callable[[], object]] = {
        f"{NUM_CALLS} x save(), which {what}": lambda m=manager: _call(m)
        for what, manager in managers.items()
    }
    ways[f"{NUM_CALLS} x dist.barrier"] = _wait_for_each_other
    timings = interleaved(ways, repeats)
    for manager in managers.values():
        manager.close()
    return timings


def _manager(root: str, config: SaveConfig) -> CheckpointManager:
    return CheckpointManager(
        root, TrainingState(model=ModelWrapper(nn.Linear(2, 2))), config=config
    )


def _wait_for_each_other() -> None:
    for _ in range(NUM_CALLS):
        dist.barrier()


def _call(manager: CheckpointManager) -> None:
    for step in range(1, NUM_CALLS + 1):
        manager.save(step)
