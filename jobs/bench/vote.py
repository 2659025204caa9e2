"""What a step without a save costs: one `save()` that finds nothing due, on two ranks."""

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import nn

from jobs.bench.timing import Timing, interleaved
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState

NUM_RANKS = 2
NUM_CALLS = 200


def measure_votes(repeats: int) -> list[Timing]:
    """Rank 0's times of `NUM_CALLS` calls each, with and without anything to listen for."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-") as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, folder, repeats, send))
            for rank in range(NUM_RANKS)
        ]
        for rank in ranks:
            rank.start()
        send.close()
        try:
            return receive.recv()
        finally:
            for rank in ranks:
                rank.join()


def _rank(rank: int, folder: str, repeats: int, send: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS
    )
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
    if rank == 0:
        send.send(timings)
    dist.destroy_process_group()


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
