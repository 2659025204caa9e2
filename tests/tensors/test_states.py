"""What is saved beside the model, under which names."""

import pytest
import torch

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.contents import everything
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState, TrainState
from tests.tensors.two_layers import trained


def test_names_on_storage_are_the_models_and_those_of_the_parts() -> None:
    model, optimizer = trained(0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState(
        model=ModelWrapper(model),
        optimizer=optimizer,
        lr_scheduler=schedule,
        extra={"train_state": TrainState(step=7, num_samples=70)},
    )
    held = everything(state.model, state.parts(rank=0), ()).state_dict
    assert set(held) == {*model.state_dict(), "rng", "optimizer", "lr_scheduler", "train_state"}
    assert held["train_state"] == {"step": 7, "num_samples": 70}
    assert "last_epoch" in held["lr_scheduler"]


@pytest.mark.parametrize("name", ["rng", "optimizer"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    model, optimizer = trained(0)
    state = TrainingState(
        model=ModelWrapper(model), optimizer=optimizer, extra={name: TrainState()}
    )
    with pytest.raises(StateDictError, match=name):
        state.parts(rank=0)


def test_progress_comes_back() -> None:
    state = TrainState()
    state.load_state_dict(TrainState(step=3, num_samples=12).state_dict())
    assert (state.step, state.num_samples) == (3, 12)
