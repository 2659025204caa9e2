"""A training of one small layer, for what has nothing to do with FSDP; and the moments of a save.

moments      staging -> planning -> writing -> written -> finishing -> committing
ranks        all        all         all        all        rank 0       rank 0
"""

import functools
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_ckpt.core.draft import Node
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.commit import RenameCommit
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.run import HfAssets, Run
from ray_ckpt.tensors.shard_file import ShardFile
from ray_ckpt.tensors.staging import Stager
from ray_ckpt.tensors.states import TrainingState, TrainState
from ray_ckpt.tensors.writer import CommittingWriter

NEVER = SaveConfig(every_steps=1_000_000)
EVERY_STEP = SaveConfig(every_steps=1, when_busy="wait")
EVERY_STEP_SYNC = SaveConfig(every_steps=1, mode="sync")
MOMENTS: dict[str, tuple[type, str]] = {
    "staging": (Stager, "stage"),
    "planning": (CommittingWriter, "prepare_local_plan"),
    "writing": (ShardFile, "add"),
    "written": (RenameCommit, "contribute"),
    "finishing": (CommittingWriter, "finish"),
    "committing": (Catalog, "commit_step"),
}
"""What a rank is about to do, and the method that it does it with."""


class Layer(nn.Module):
    """Two tensors; with a process group `weight` is sharded over the ranks, as FSDP does it."""

    def __init__(self, value: float = 0.0, num_rows: int = 8) -> None:
        super().__init__()
        weight = torch.full((num_rows, 4), value)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            weight = distribute_tensor(weight, mesh, [Shard(0)])
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.full((4,), value))

    @property
    def local_weight(self) -> torch.Tensor:
        """This rank's rows; writing to them changes the weight."""
        weight = self.weight.detach()
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def fill(self, value: float) -> None:
        """One optimizer step."""
        self.local_weight.fill_(value)
        self.bias.detach().fill_(value)

    def values(self) -> set[float]:
        """Every number that this rank has; one, if nothing was mixed."""
        return {*self.local_weight.flatten().tolist(), *self.bias.tolist()}


def plain_manager(
    root: Path | str,
    model: nn.Module,
    config: SaveConfig = NEVER,
    *,
    owner: str | None = None,
    on_event: Callable[[SaveEvent], None] | None = None,
    assets: Mapping[str, bytes] | None = None,
    node: Node | None = None,
) -> CheckpointManager:
    """A manager of a model and of how far training has come."""
    state = TrainingState(model=ModelWrapper(model), extra={"train_state": TrainState(step=5)})
    return CheckpointManager(
        str(root),
        state,
        config=config,
        assets=HfAssets(family="llama", files=assets) if assets else None,
        run=Run(owner=owner, on_event=on_event, node=node),
    )


def saved_steps(root: Path | str) -> list[int]:
    """Every step that can be read, each verified; oldest first."""
    catalog = open_catalog(str(root))
    steps = [view.step for view in catalog.observe().readable()]
    for step in steps:
        catalog.verify(step)
    return steps


def save_steps(root: Path | str, *steps: int, config: SaveConfig = EVERY_STEP_SYNC) -> None:
    """These steps are committed, each full of its own number."""
    model = Layer()
    manager = plain_manager(root, model, config)
    for step in steps:
        model.fill(step)
        manager.do_save(step, "test", last_step=False, metrics={})
    manager.close()


def loaded(root: Path | str) -> tuple[int, set[float]]:
    """Which step a new process resumes from, and the numbers that it finds there."""
    model = Layer(value=-1.0)
    manager = plain_manager(root, model)
    step = manager.load().step
    manager.close()
    return step, model.values()


def before(moment: str, act: Callable[[], Any], *, times: int = 1) -> None:
    """From now on `act` is called right before this process does what the moment names."""
    owner, name = MOMENTS[moment]
    method = getattr(owner, name)
    left = [times]

    @functools.wraps(method)
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            act()
        return method(*args, **kwargs)

    setattr(owner, name, interrupted)


def signal_self(number: signal.Signals) -> Callable[[], None]:
    """A call that sends this process the signal, and does not return before it is met."""
    return lambda: signal.pthread_kill(threading.get_ident(), number)
