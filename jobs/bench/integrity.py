"""What trust costs: digests and the look for NaN in a save, the second reading in a load.

One process, plain tensors, the page cache warm. Beside it stand what the memory can do, and torch's
own save and load, which trust every byte.
"""

import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from jobs.bench.timing import Timing, interleaved
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import SHARD_ALGORITHM, STRONG_ALGORITHM, new_digest
from ray_ckpt.tensors.finite import is_finite

NUM_TENSORS = 16


def measure_integrity(folder: Path, *, size_mb: int, repeats: int) -> list[Timing]:
    """Every row is about the same `size_mb` of float32, in files in `folder`."""
    model = _model(size_mb)
    tensors = [parameter.detach() for parameter in model.parameters()]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    state = {"model": model.state_dict()}
    config = SaveConfig(mode="sync", every_steps=1)
    root = str(folder / "run")
    manager = CheckpointManager(root, TrainingState(model=ModelWrapper(model)), config=config)
    steps = itertools.count(1)
    torch_steps = itertools.count(1)

    def save() -> None:
        step = next(steps)
        manager.save(step)
        shutil.rmtree(folder / f"run/step-{step - 1}", ignore_errors=True)

    def save_with_torch() -> None:
        step = next(torch_steps)
        writer = dcp.FileSystemWriter(
            folder / f"torch/step-{step}", sync_files=True, single_file_per_rank=True
        )
        dcp.save(state, storage_writer=writer, no_dist=True)
        shutil.rmtree(folder / f"torch/step-{step - 1}", ignore_errors=True)

    def load_with_torch() -> None:
        [newest] = (folder / "torch").iterdir()
        dcp.load(state, checkpoint_id=str(newest), no_dist=True)

    def verify() -> None:
        catalog = open_catalog(root)
        [newest] = catalog.observe().readable()
        catalog.verify(newest.step)

    ways = {
        "copy in memory": lambda: [c.copy_(t) for c, t in zip(copies, tensors, strict=True)],
        f"digest {SHARD_ALGORITHM}": lambda: _digest(SHARD_ALGORITHM, tensors),
        f"digest {STRONG_ALGORITHM}": lambda: _digest(STRONG_ALGORITHM, tensors),
        "look for NaN and Inf": lambda: all(map(is_finite, tensors)),
        "save": save,
        "dcp.save": save_with_torch,
        "verify": verify,
        "load, which verifies": manager.load,
        "dcp.load": load_with_torch,
    }
    try:
        return interleaved(ways, repeats, prepare=lambda: _touch_memory(folder, tensors))
    finally:
        manager.close()


def _model(size_mb: int) -> nn.Module:
    torch.manual_seed(0)
    rows = size_mb * 2**20 // 4 // 1024 // NUM_TENSORS
    return nn.ParameterList([torch.randn(rows, 1024) for _ in range(NUM_TENSORS)])


def _touch_memory(folder: Path, tensors: list[torch.Tensor]) -> None:
    """A virtual machine gives free memory back: who uses it next pays more than for the writing."""
    with (folder / "scratch").open("wb") as file:
        file.writelines(_bytes_of(tensor) for tensor in tensors)
    (folder / "scratch").unlink()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def _digest(algorithm: str, tensors: list[torch.Tensor]) -> None:
    digest = new_digest(algorithm)
    for tensor in tensors:
        digest.update(_bytes_of(tensor))
