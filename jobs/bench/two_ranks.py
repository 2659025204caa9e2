"""Two processes that train together over gloo, for what a benchmark can only measure there."""

import mmap
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jobs.bench.timing import Timing
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig
from ray_ckpt.storage.disk.file_blocks import FileBlocks, new_file

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


def sharded_decoder(config: DecoderConfig) -> Decoder:
    """One of these sizes under FSDP2, each block by itself; on both ranks."""
    model = Decoder(config, VOCAB_SIZE)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
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
