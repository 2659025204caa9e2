"""Optimizers go on exactly where they were, and looking at one changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.optimizer_state import OptimizerState
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.two_layers import train_step, trained


def test_optimizer_state_is_named_by_parameter() -> None:
    model, optimizer = trained(0)
    state = OptimizerState([model], [optimizer]).state_dict()
    for fqn, parameter in model.named_parameters():
        assert torch.equal(state[f"state.{fqn}.exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert state[f"param_groups.{fqn}.lr"] == 0.1


def test_an_optimizer_goes_on_exactly_whatever_it_did_in_between() -> None:
    model, optimizer = trained(0)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    state = _cloned(OptimizerState([model], [optimizer]).state_dict())
    train_step(model, optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]

    other, restored = trained(1, weight_decay=0.5)
    other.load_state_dict(values)
    OptimizerState([other], [restored]).load_state_dict(state)
    train_step(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(expected, other.parameters(), strict=True))


def test_one_optimizer_over_several_parts_of_a_model_is_saved_and_restored() -> None:
    first, second = nn.Module(), nn.Module()
    first.front, second.back = nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.1)
    second.back(first.front(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    moments = [optimizer.state[p]["exp_avg"].clone() for p in _parameters(first, second)]
    state = _cloned(OptimizerState([first, second], [optimizer]).state_dict())
    assert {"state.front.weight.exp_avg", "state.back.weight.exp_avg"} <= set(state)
    optimizer.step()
    OptimizerState([first, second], [optimizer]).load_state_dict(state)
    restored = [optimizer.state[p]["exp_avg"] for p in _parameters(first, second)]
    assert all(torch.equal(a, b) for a, b in zip(moments, restored, strict=True))


def test_an_optimizer_that_was_looked_at_is_as_it_was() -> None:
    """Fresh, or with gradients that wait for a step: a save or a refused load changes nothing."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    state = OptimizerState([model], [optimizer])
    assert not any(key.startswith("state.") for key in state.state_dict())
    wanted = state.wanted({"state.weight.step", "state.bias.step"})
    assert {"state.weight.exp_avg", "state.bias.step"} <= set(wanted)
    assert not optimizer.state
    assert [parameter.grad for parameter in model.parameters()] == gradients
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_parameter_that_had_no_gradient_comes_back_without_state() -> None:
    """An expert that no token was sent to: what was saved of the others is loaded."""
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    model[0](torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    saved = OptimizerState([model], optimizers[:1]).state_dict()
    held = set(flatten_state_dict(saved)[0])
    assert not [key for key in held if key.startswith("state.1.")]
    train_step(other, optimizers[1])  # whatever it did in between
    restored = OptimizerState([other], optimizers[1:])
    assert set(restored.wanted(held)) == held
    restored.load_state_dict(_cloned(saved))
    assert list(optimizers[1].state) == list(other[0].parameters())
    other.load_state_dict(model.state_dict())
    for one, optimizer in zip((model, other), optimizers, strict=True):
        optimizer.zero_grad()
        train_step(one, optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_parameter_that_the_source_does_not_know_at_all_is_asked_for() -> None:
    model, optimizer = trained(0)
    state = OptimizerState([model], [optimizer])
    held = {key for key in state.state_dict() if ".1.weight." not in key}
    assert "state.1.weight.exp_avg" in state.wanted(held)
    assert "param_groups.1.weight.lr" in state.wanted(held)


def test_a_parameter_of_another_model_is_refused() -> None:
    model, _ = trained(0)
    _, optimizer = trained(1)
    with pytest.raises(StateDictError, match="4 parameters that are none of the model's"):
        OptimizerState([model], [optimizer]).state_dict()


def _make_several(seed: int) -> tuple[nn.Sequential, TrainingState]:
    """A matrix optimizer and another one for the rest, each with its schedule."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizers = [
        torch.optim.SGD([m.weight for m in model], lr=0.1, momentum=0.9),
        torch.optim.AdamW([m.bias for m in model], lr=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.9 - 0.1 * n) for n, o in enumerate(optimizers)
    ]
    wrapper = ModelWrapper(model)
    return model, TrainingState(model=wrapper, optimizer=optimizers, lr_scheduler=schedules)


def _step_several(model: nn.Module, state: TrainingState) -> None:
    assert isinstance(state.optimizer, list)
    assert isinstance(state.lr_scheduler, list)
    model(torch.ones(4, 2)).square().sum().backward()
    for optimizer, schedule in zip(state.optimizer, state.lr_scheduler, strict=True):
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_several_optimizers_and_schedules_go_on_exactly(tmp_path: Path) -> None:
    model, state = _make_several(0)
    _step_several(model, state)
    manager = CheckpointManager(str(tmp_path), state, config=SaveConfig(mode="sync"))
    manager.save(1, last_step=True)
    manager.close()
    names = set(FileSystemReader(tmp_path / "step-1").read_metadata().state_dict_metadata)
    assert {
        "optimizer.state.0.weight.momentum_buffer",
        "optimizer.state.1.bias.exp_avg",
        "optimizer.param_groups.0.weight.momentum",
        "lr_scheduler.0.last_epoch",
        "lr_scheduler.1.last_epoch",
    } <= names
    other, restored = _make_several(1)
    manager = CheckpointManager(str(tmp_path), restored)
    assert manager.load().as_initialised == ()
    manager.close()
    for one, its in ((model, state), (other, restored)):
        _step_several(one, its)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    for optimizer, its in zip(state.optimizer or (), restored.optimizer or (), strict=True):
        assert optimizer.param_groups[0]["lr"] == its.param_groups[0]["lr"]


def _parameters(*parts: nn.Module) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    """As storage would hold it: no tensor is shared with the optimizer."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
