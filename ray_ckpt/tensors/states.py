"""Everything a resume needs beside the model: optimizer, schedule, random numbers, progress.

Keys on storage, as TorchTitan writes them: model tensors under their FQN alone; the others under
`optimizer.`, `lr_scheduler.`, `dataloader.`, `train_state.`; random numbers, which differ from rank
to rank, under `rng.rank_<r>.`.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.model_wrapper import ModelWrapper, canonical_fqn

RNG = "rng"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What `CheckpointManager` saves and restores, as the training loop holds it."""

    model: ModelWrapper
    optimizer: Optimizer | None = None
    lr_scheduler: LRScheduler | None = None
    extra: Mapping[str, Stateful] = field(default_factory=dict[str, Stateful])
    """Whatever else has `state_dict` and `load_state_dict`: `dataloader`, `train_state`, ..."""

    def parts(self, rank: int) -> dict[str, Stateful]:
        """Name on storage to object, the model left out.

        Raises:
            StateDictError: a name of `extra` is taken.
        """
        parts: dict[str, Stateful] = {RNG: RngState(rank)}
        if self.optimizer is not None:
            parts["optimizer"] = OptimizerState(self.model.parts, self.optimizer)
        if self.lr_scheduler is not None:
            parts["lr_scheduler"] = self.lr_scheduler
        taken = sorted(set(parts) & set(self.extra))
        if taken:
            raise StateDictError(
                f"these names are taken: {', '.join(taken)}", "TrainingState.extra"
            )
        return {**parts, **self.extra}


def collect(model: ModelWrapper, parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Model tensors under their FQNs, the other parts under their names: what DCP takes."""
    return {**model.state_dict(), **{name: part.state_dict() for name, part in parts.items()}}


class OptimizerState:
    """An optimizer's state by parameter name, so that it survives another sharding or grouping."""

    def __init__(self, parts: list[nn.Module], optimizer: Optimizer) -> None:
        # torch wants one module that holds every parameter of the optimizer
        self._whole = nn.ModuleList(parts)
        self._optimizer = optimizer
        self._part_of = {
            canonical_fqn(name): str(index)
            for index, part in enumerate(parts)
            for name, _ in part.named_parameters()
        }

    def state_dict(self) -> dict[str, Any]:
        """`state.<fqn>.<name>` and `param_groups.<fqn>.<key>`."""
        found = get_optimizer_state_dict(self._whole, self._optimizer, options=_FLAT)
        return {self._outside(key): value for key, value in found.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undoes :meth:`state_dict`."""
        inside = {self._inside(key): value for key, value in state_dict.items()}
        set_optimizer_state_dict(self._whole, self._optimizer, inside, options=_FLAT)

    def _outside(self, key: str) -> str:
        """`state.0.front.weight.step` without the number of the part."""
        kind, _, rest = key.partition(".")
        return f"{kind}.{rest.partition('.')[2]}"

    def _inside(self, key: str) -> str:
        """Undoes :meth:`_outside`; an unknown parameter keeps its name, and torch complains."""
        kind, _, rest = key.partition(".")
        part = self._part_of.get(rest.rpartition(".")[0])
        return key if part is None else f"{kind}.{part}.{rest}"


class RngState:
    """The random number generators of one rank: Python's, torch's on the CPU and on its GPU."""

    def __init__(self, rank: int) -> None:
        self._key = f"rank_{rank}"

    def state_dict(self) -> dict[str, Any]:
        """One entry named after the rank, which DCP keeps apart from other ranks'."""
        version, words, gauss = random.getstate()
        states: dict[str, Any] = {
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {self._key: states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The generators go on where they were."""
        states = state_dict[self._key]
        python = states["python"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        torch.set_rng_state(states["torch"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


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
