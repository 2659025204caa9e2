"""A training of an adapter beside a base that is frozen, and larger than anything else."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.saving import Mode, SaveConfig
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import Run
from ray_ckpt.tensors.states import TrainingState

NUM_ROWS, WIDTH = 4096, 1024
BASE_BYTES = NUM_ROWS * WIDTH * 4
LITTLE_BYTES = 300_000
"""More than adapter, optimizer, framing and index of a step, less than any part of the base."""


class Adapted(nn.Module):
    """A large base that is frozen, sharded over the ranks if there are any, and an adapter."""

    def __init__(self, num_rows: int = NUM_ROWS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(num_rows, WIDTH, generator=generator)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            base = distribute_tensor(base, mesh, [Shard(0)])
        self.base = nn.Parameter(base, requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(WIDTH))

    @property
    def local_base(self) -> Tensor:
        base = self.base.detach()
        return base.to_local() if isinstance(base, DTensor) else base


class Training:
    """Adapter and optimizer move with each step; the base does when somebody moves it."""

    def __init__(
        self,
        root: str | Path,
        mode: Mode = "sync",
        *,
        full_every_saves: int = 100,
        num_rows: int = NUM_ROWS,
    ) -> None:
        self.model = Adapted(num_rows)
        self.optimizer = torch.optim.AdamW([self.model.adapter], lr=0.1)
        self.events: list[SaveEvent] = []
        self.manager = CheckpointManager(
            str(root),
            TrainingState(model=ModelWrapper(self.model), optimizer=self.optimizer),
            config=SaveConfig(
                every_steps=1, mode=mode, when_busy="wait", full_every_saves=full_every_saves
            ),
            run=Run(on_event=self.events.append),
        )

    def step(self, number: int) -> None:
        """One optimizer step and its save, waited for."""
        self.model.adapter.grad = torch.full((WIDTH,), 1.0 / number)
        self.optimizer.step()
        pending = self.manager.save(number)
        assert pending is not None
        pending.wait()

    @property
    def written(self) -> list[int]:
        """Bytes, by save."""
        return [event.volume.written_bytes for event in self.events]

    @property
    def taken_over(self) -> list[int]:
        return [event.volume.taken_over_bytes for event in self.events]

    @property
    def shares(self) -> list[bool]:
        """By save, whether the base was taken over."""
        return [number > BASE_BYTES for number in self.taken_over]
