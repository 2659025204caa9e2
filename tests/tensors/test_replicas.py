"""What several ranks hold alike is read by one of them from far away, by each from a disk."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.s3.store import S3Store
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.plain import EVERY_STEP_SYNC
from tests.tensors.ranks import run
from tests.tensors.shard_reads import counted_shard_reads

WIDTH = 400


class Training:
    """Some layers with AdamW, after one step; `shape` is the mesh's: replicas and shards."""

    def __init__(self, root: str, shape: tuple[int, ...], *, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5)))
        fully_shard(
            self.model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(2, WIDTH)).sum().backward()
        self.optimizer.step()
        state = TrainingState(model=ModelWrapper(self.model), optimizer=self.optimizer)
        self.manager = CheckpointManager(root, state, config=EVERY_STEP_SYNC)

    def held(self) -> list[torch.Tensor]:
        """What this rank holds of model and optimizer."""
        tensors: list[Any] = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += state.values()
        return [t.to_local().detach() if isinstance(t, DTensor) else t for t in tensors]


def _save(root: str) -> list[torch.Tensor]:
    training = Training(root, (2, 2), seed=1)
    training.manager.save(1)
    training.manager.close()
    return training.held()


def _load(root: str, shape: tuple[int, ...]) -> tuple[list[torch.Tensor], int]:
    """What this rank holds after a load, and how many bytes of shards it has read."""
    taken = counted_shard_reads(S3Store if root.startswith("s3://") else LocalStore)
    training = Training(root, shape, seed=2)
    training.manager.load()
    training.manager.close()
    return training.held(), sum(taken)


def _size(root: str) -> int:
    files = open_catalog(root).manifest(1).files
    return sum(entry.size_bytes for entry in files if entry.path.endswith(".distcp"))


@pytest.mark.s3
def test_from_s3_each_byte_comes_once_for_all_replicas(s3_root: str) -> None:
    saved = run(_save, s3_root, num_ranks=4)
    loaded = run(_load, s3_root, (2, 2), num_ranks=4)
    for before, (after, _) in zip(saved, loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    read = [num_bytes for _, num_bytes in loaded]
    assert _size(s3_root) <= sum(read) <= 1.1 * _size(s3_root)
    assert max(read) < 0.5 * _size(s3_root), "the replicas share the reading"


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
def test_from_a_disk_each_replica_reads_for_itself(root: str, shape: tuple[int, ...]) -> None:
    saved = run(_save, root, num_ranks=4)
    loaded = run(_load, root, shape, num_ranks=4)
    whole = [torch.cat([a, b]) for a, b in zip(saved[0], saved[1], strict=True) if a.dim()]
    for rank, (after, _) in enumerate(loaded):
        expected = saved[rank] if shape == (2, 2) else whole
        held = after if shape == (2, 2) else [tensor for tensor in after if tensor.dim()]
        assert all(torch.equal(a, b) for a, b in zip(expected, held, strict=True))
    assert sum(num_bytes for _, num_bytes in loaded) > 1.9 * _size(root)
