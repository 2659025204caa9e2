"""Processes that train together, for what a benchmark can only measure there.

Two over gloo; where a training state is measured and there are GPUs, one for each over NCCL.
"""

import mmap
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jobs.bench.timing import Timing
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig
from ray_ckpt.storage.disk.file_blocks import FileBlocks, new_file

T = TypeVar("T", bound=Timing)
NUM_RANKS = 2
"""Without GPUs."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where training states are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    size: int
    device: str
    folder: Path


def on_ranks(
    measure: Callable[[Path], list[T]], *, below: Path | None = None, device: str = "cpu"
) -> list[T]:
    """What `measure` returns on rank 0; all get the same folder, which is gone afterwards."""
    size = torch.cuda.device_count() if device == "cuda" else NUM_RANKS
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=below) as folder:
        world = _World(size=size, device=device, folder=Path(folder))
        ranks = [
            context.Process(target=_rank, args=(rank, world, measure, send)) for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        send.close()
        try:
            return receive.recv()
        finally:
            for rank in ranks:
                rank.join()


def sharded_decoder(config: DecoderConfig, device: str = "cpu") -> Decoder:
    """One of these sizes under FSDP2, each block by itself; on all ranks."""
    model = Decoder(config, VOCAB_SIZE).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def write_raw(folder: Path, size_bytes: int) -> None:
    """Each rank has written so many bytes to a file there, past the page cache, and synced it."""
    block = mmap.mmap(-1, FileBlocks.block_bytes)
    file = new_file(folder / f"rank-{dist.get_rank()}")
    for number in range(-(-size_bytes // len(block))):
        left = size_bytes - number * len(block)
        file.put(number, memoryview(block), min(len(block), left))
    file.finish(size_bytes)
    dist.barrier()


def read_raw(path: Path) -> None:
    """Each rank has read its file from the disk, past the page cache."""
    block = memoryview(mmap.mmap(-1, FileBlocks.block_bytes))
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        while os.readv(file, [block]) == len(block):
            pass
    finally:
        os.close(file)
    dist.barrier()


def synchronize() -> None:
    """All that this rank's GPU was told to do is done; nothing, without one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _rank(
    rank: int,
    world: _World,
    measure: Callable[[Path], list[Timing]],
    send: Connection,
) -> None:
    torch.set_num_threads(1)
    if world.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.device == "cuda" else "gloo",
        init_method=f"file://{world.folder}/store",
        rank=rank,
        world_size=world.size,
    )
    timings = measure(world.folder)
    if rank == 0:
        send.send(timings)
    dist.destroy_process_group()
