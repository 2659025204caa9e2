"""Two processes that train together over gloo, for what a benchmark can only measure there."""

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.bench.timing import Timing

NUM_RANKS = 2


def on_two_ranks(
    measure: Callable[[Path], list[Timing]], *, below: Path | None = None
) -> list[Timing]:
    """What `measure` returns on rank 0; both get the same folder, which is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=below) as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, Path(folder), measure, send))
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


def _rank(
    rank: int, folder: Path, measure: Callable[[Path], list[Timing]], send: Connection
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS
    )
    timings = measure(folder)
    if rank == 0:
        send.send(timings)
    dist.destroy_process_group()
