"""Any model saved once and loaded once, with an optimizer that has trained it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState

SAVE = SaveConfig(every_steps=1, mode="async", when_busy="wait")


def manager_of(
    root: str | Path, model: nn.Module | list[nn.Module], *, trained: bool = False
) -> tuple[CheckpointManager, torch.optim.AdamW]:
    """A manager, and its optimizer after one step if `trained`."""
    parts = [model] if isinstance(model, nn.Module) else model
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=0.1)
    if trained:
        for part in parts:
            for parameter in part.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    state = TrainingState(model=ModelWrapper(model), optimizer=optimizer)
    return CheckpointManager(str(root), state, config=SAVE), optimizer


def save(root: str | Path, model: nn.Module | list[nn.Module]) -> list[Tensor]:
    """Step 1 is committed; returns the optimizer's first moments."""
    manager, optimizer = manager_of(root, model, trained=True)
    manager.save(1)
    manager.close()
    return moments_of(optimizer)


def load(root: str | Path, model: nn.Module | list[nn.Module]) -> list[Tensor]:
    manager, optimizer = manager_of(root, model)
    assert manager.load().step == 1
    manager.close()
    return moments_of(optimizer)


def moments_of(optimizer: torch.optim.AdamW) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [whole(optimizer.state[p]["exp_avg"]) for p in parameters if p in optimizer.state]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: whole(value) for key, value in model.state_dict().items()}


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))
