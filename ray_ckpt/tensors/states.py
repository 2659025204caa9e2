"""Everything a resume needs beside the model: optimizer, schedule, random numbers, progress.

Keys on storage, as TorchTitan writes them: model tensors under their FQN alone; the others under
`optimizer.`, `lr_scheduler.`, `dataloader.`, `train_state.`; random numbers, which differ from rank
to rank, under `rng.rank_<r>.`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.optimizer_state import OptimizerState
from ray_ckpt.tensors.random_state import RandomState

RNG = "rng"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What `CheckpointManager` saves and restores, as the training loop holds it."""

    model: ModelWrapper
    optimizer: Optimizer | Sequence[Optimizer] | None = None
    """Several are saved as one: each parameter belongs to one of them."""
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | Stateful | None = None
    """Several are saved under their numbers: `lr_scheduler.0.last_epoch`."""
    extra: Mapping[str, Stateful] = field(default_factory=dict[str, Stateful])
    """Whatever else has `state_dict` and `load_state_dict`: `dataloader`, `train_state`, ..."""

    def parts(self, rank: int) -> dict[str, Stateful]:
        """Name on storage to object, the model left out.

        Raises:
            StateDictError: a name of `extra` is taken.
        """
        parts: dict[str, Stateful] = {RNG: RandomState(rank)}
        if self.optimizer is not None:
            # TorchTitan's container is an Optimizer itself; torch's own cannot be iterated over
            several = (
                list(self.optimizer) if isinstance(self.optimizer, Iterable) else [self.optimizer]
            )
            parts["optimizer"] = OptimizerState(self.model.parts, several)
        if isinstance(self.lr_scheduler, Sequence):
            parts["lr_scheduler"] = SchedulerStates(self.lr_scheduler)
        elif self.lr_scheduler is not None:
            parts["lr_scheduler"] = _schedule_part(self.lr_scheduler)
        taken = sorted(set(parts) & set(self.extra))
        if taken:
            raise StateDictError(
                f"these names are taken: {', '.join(taken)}",
                "TrainingState.extra",
                "nothing was saved or loaded",
                "call them something else",
            )
        return {**parts, **self.extra}


def _schedule_part(schedule: LRScheduler | Stateful) -> Stateful:
    """The schedule itself, unless all it saves follows from the step and the optimizer."""
    if isinstance(schedule, LambdaLR) and not any(schedule.state_dict()["lr_lambdas"]):
        return LambdaState(schedule)
    return schedule


class LambdaState:
    """A DCP `Stateful` around a LambdaLR of plain functions, under TorchTitan's one key.

    Its base rates are the `initial_lr` of the optimizer's groups and its last ones their `lr`,
    which the optimizer brings along.
    """

    def __init__(self, schedule: LambdaLR) -> None:
        self._schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """`last_epoch`."""
        return {"last_epoch": self._schedule.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The schedule goes on where it was; the optimizer must have its state already."""
        groups = self._schedule.optimizer.param_groups
        self._schedule.load_state_dict(
            {
                **self._schedule.state_dict(),
                "last_epoch": int(state_dict["last_epoch"]),
                "_step_count": int(state_dict["last_epoch"]) + 1,
                "base_lrs": [group["initial_lr"] for group in groups],
                "_last_lr": [group["lr"] for group in groups],
            }
        )


class SchedulerStates:
    """A DCP `Stateful` around several schedules, by their number."""

    def __init__(self, schedulers: Sequence[LRScheduler]) -> None:
        self._schedulers = [_schedule_part(scheduler) for scheduler in schedulers]

    def state_dict(self) -> dict[str, Any]:
        """`0.last_epoch`, `1.last_epoch`, ..."""
        return {str(number): s.state_dict() for number, s in enumerate(self._schedulers)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Undoes :meth:`state_dict`."""
        for number, scheduler in enumerate(self._schedulers):
            scheduler.load_state_dict(state_dict[str(number)])


@dataclass(slots=True)
class TrainState:
    """How far training has come; saved like any other state."""

    step: int = 0
    """Optimizer steps done."""
    num_samples: int = 0
    """Samples consumed by all ranks together."""

    def state_dict(self) -> dict[str, Any]:
        """Both numbers."""
        return {"step": self.step, "num_samples": self.num_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Both numbers."""
        self.step = int(state_dict["step"])
        self.num_samples = int(state_dict["num_samples"])
