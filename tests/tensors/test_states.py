"""Optimizer and random numbers go on exactly where they were."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import (
    OptimizerState,
    RngState,
    TrainingState,
    TrainState,
    collect,
)


def _draw() -> tuple[list[float], list[float], list[float]]:
    return (
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],  # every other one is kept for the next call
        torch.rand(5).tolist(),
    )


def test_random_numbers_go_on_exactly_after_any_draws() -> None:
    random.gauss(0, 1)
    saved = RngState(0).state_dict()
    expected = _draw()
    _draw()
    random.seed(99)
    torch.manual_seed(99)
    RngState(0).load_state_dict(saved)
    assert _draw() == expected


def test_each_rank_has_a_key_of_its_own() -> None:
    assert set(RngState(3).state_dict()) == {"rank_3"}


def _trained(seed: int, **groups: Any) -> tuple[nn.Sequential, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **groups)
    for _ in range(3):
        _step(model, optimizer)
    return model, optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_state_is_named_by_parameter() -> None:
    model, optimizer = _trained(0)
    state = OptimizerState([model], optimizer).state_dict()
    for fqn, parameter in model.named_parameters():
        assert torch.equal(state[f"state.{fqn}.exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert state[f"param_groups.{fqn}.lr"] == 0.1


def test_an_optimizer_goes_on_exactly_whatever_it_did_in_between() -> None:
    model, optimizer = _trained(0)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    state = _cloned(OptimizerState([model], optimizer).state_dict())
    _step(model, optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]

    other, restored = _trained(1, weight_decay=0.5)
    other.load_state_dict(values)
    OptimizerState([other], restored).load_state_dict(state)
    _step(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(expected, other.parameters(), strict=True))


def test_one_optimizer_over_several_parts_of_a_model_is_saved_and_restored() -> None:
    first, second = nn.Module(), nn.Module()
    first.front, second.back = nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.1)
    second.back(first.front(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    moments = [optimizer.state[p]["exp_avg"].clone() for p in _parameters(first, second)]
    state = _cloned(OptimizerState([first, second], optimizer).state_dict())
    assert {"state.front.weight.exp_avg", "state.back.weight.exp_avg"} <= set(state)
    optimizer.step()
    OptimizerState([first, second], optimizer).load_state_dict(state)
    restored = [optimizer.state[p]["exp_avg"] for p in _parameters(first, second)]
    assert all(torch.equal(a, b) for a, b in zip(moments, restored, strict=True))


def test_names_on_storage_are_the_models_and_those_of_the_parts() -> None:
    model, optimizer = _trained(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState(
        model=ModelWrapper(model),
        optimizer=optimizer,
        lr_scheduler=schedule,
        extra={"train_state": TrainState(step=7, num_samples=70)},
    )
    collected = collect(state.model, state.parts(rank=0))
    assert set(collected) == {
        *model.state_dict(),
        *("rng", "optimizer", "lr_scheduler", "train_state"),
    }
    assert collected["train_state"] == {"step": 7, "num_samples": 70}


@pytest.mark.parametrize("name", ["rng", "optimizer"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    model, optimizer = _trained(0)
    state = TrainingState(
        model=ModelWrapper(model), optimizer=optimizer, extra={name: TrainState()}
    )
    with pytest.raises(StateDictError, match=name):
        state.parts(rank=0)


def test_progress_comes_back() -> None:
    state = TrainState()
    state.load_state_dict(TrainState(step=3, num_samples=12).state_dict())
    assert (state.step, state.num_samples) == (3, 12)


def _parameters(*parts: nn.Module) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    """As storage would hold it: no tensor is shared with the optimizer."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
