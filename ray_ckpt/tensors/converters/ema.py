"""EMA: a shadow of every trained parameter that follows it slowly.

    ema.<fqn>            shadow, sharded like the parameter
    ema.num_updates      int64 scalar on the CPU; the shadows equal the parameters while it is 0

Shadows are no parameters: FSDP neither gathers nor reduces them, the optimizer does not see them.
They come and go with the model's state dict through two hooks. Knows nothing of the training loop,
which calls :meth:`EMA.update` after every optimizer step.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters import choices
from ray_ckpt.tensors.converters.order import enter, refuse_late
from ray_ckpt.tensors.converters.protocol import SHADOWS, WHOLE_MODEL, ExportLayout
from ray_ckpt.tensors.converters.subclasses import plain
from ray_ckpt.tensors.fqn import canonical_fqn
from ray_ckpt.tensors.recording import TensorSpec

NUM_UPDATES = f"{SHADOWS}num_updates"


@dataclass(frozen=True, slots=True, kw_only=True)
class EMA:
    """Exponential moving average of what is trained."""

    flavors: ClassVar[tuple[str, ...]] = ("averaged", "raw")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "parameter")

    decay: float
    """Weight of the past, for example 0.999; between 0 and 1."""
    dtype: Literal["float32", "parameter"] = "float32"
    """Of the shadows: float32, or each parameter's own. In bfloat16 a slow average stands still."""
    flavor: Literal["averaged", "raw"] = "averaged"
    """`averaged`: shadows take the place of parameters. `raw`: the parameters as they trained."""
    _averages: "list[Averages]" = field(default_factory=list, init=False, repr=False, compare=False)
    """One of each part of the model."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay is {self.decay!r}, not in [0, 1)", "ema.decay")
        choices.one_of("ema.dtype", self.dtype, self.dtypes)
        choices.one_of("ema.flavor", self.flavor, self.flavors)

    @property
    def name(self) -> str:
        """`ema`."""
        return "ema"

    def options(self) -> dict[str, Any]:
        """JSON values from which an equal converter is made."""
        return {"decay": self.decay, "dtype": self.dtype}

    def convert(self, model: nn.Module) -> None:
        """State dicts of the model hold the shadows, which are made when first asked for.

        By then the model must be sharded, and frozen where it is to be.
        """
        refuse_late(model, self.name)
        if hasattr(model, SHADOWS.removesuffix(".")):
            raise ConfigError("the model has a module or tensor called 'ema' already", "ema")
        enter(model, self.name)
        # one part a rank carries the number of updates: the same key in two parts is an error
        count = None if not self._averages else self._averages[0].num_updates
        self._averages.append(Averages(model, dtype=self.dtype, num_updates=count))

    def update(self) -> None:
        """The shadows have come `1 - decay` nearer to the parameters; call it after each step.

        The first update makes them equal. No communication.
        """
        for averages in self._averages:
            averages.update(self.decay)
        if self._averages:
            self._averages[0].num_updates.add_(1)

    def key_filter(self, fqn: str) -> bool:
        """Whether it is a shadow, or the number of updates."""
        return fqn.startswith(SHADOWS)

    def has_part(self, fqn: str) -> bool:
        """The shadows, unless the raw weights are asked for."""
        return self.flavor != "raw" and fqn != NUM_UPDATES

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The model's own keys; averaged: with the shadows' values, in the parameters' dtypes.

        Raises:
            StateDictError: a shadow of a tensor that is not there.
        """
        own = {key: value for key, value in state_dict.items() if not self.key_filter(key)}
        if self.flavor == "raw":
            return own
        return {**own, **_in_place_of(own, self._shadows(state_dict))}

    def state_dict_adapter(self, base: StateDictAdapter) -> StateDictAdapter | None:
        """None: names are the model's own."""
        return None

    def layout(self, outputs: Mapping[str, TensorSpec]) -> ExportLayout:
        """A plain model."""
        return WHOLE_MODEL

    def _shadows(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Name of the parameter to its shadow."""
        keys = (key for key in state_dict if self.key_filter(key) and key != NUM_UPDATES)
        return {key.removeprefix(SHADOWS): state_dict[key] for key in keys}


class Averages:
    """The shadows of one part of a model, and its state dict hooks."""

    def __init__(self, model: nn.Module, *, dtype: str, num_updates: Tensor | None) -> None:
        self._model = model
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        self._carries_count = num_updates is None
        # on the CPU whatever the default device is: update() reads it without waiting for a GPU
        self.num_updates = (
            torch.zeros((), dtype=torch.int64, device="cpu") if num_updates is None else num_updates
        )
        # torch writes an attribute on the hook, which a bound method cannot have
        model.register_state_dict_post_hook(functools.partial(self._add_to))
        model.register_load_state_dict_pre_hook(self._take_from)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Nearer to the parameters by `1 - decay`, in the shadows' dtype."""
        parameters = self._begin()
        if int(self.num_updates) == 0 or not parameters:
            return  # they have just been made equal
        shadows = [_local(self._tensors[fqn]) for fqn in parameters]
        torch._foreach_mul_(shadows, decay)
        torch._foreach_add_(shadows, [_local(p) for p in parameters.values()], alpha=1 - decay)

    @torch.no_grad()
    def _begin(self) -> dict[str, nn.Parameter]:
        """Every parameter has a shadow on its device, equal to it as long as there was no update.

        Until then shadows follow the parameters: weights may be loaded after the first state dict.
        """
        parameters = self._parameters()
        for fqn, parameter in parameters.items():
            if _is_stale(self._tensors.get(fqn), parameter):
                self._tensors[fqn] = self._new_shadow(parameter)
            _refuse_other_sharding(fqn, self._tensors[fqn], parameter)
            if int(self.num_updates) == 0:
                self._tensors[fqn].copy_(parameter)
        return parameters

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, or was when it got its shadow, by canonical name; tied ones once."""
        named = ((canonical_fqn(name), p) for name, p in self._model.named_parameters())
        return {fqn: p for fqn, p in named if p.requires_grad or fqn in self._tensors}

    def _new_shadow(self, parameter: nn.Parameter) -> Tensor:
        dtype = torch.float32 if self._dtype == "float32" else parameter.dtype
        return plain(parameter.detach()).to(dtype, copy=True)

    def _entries(self, prefix: str) -> dict[str, Tensor]:
        """Key to tensor, as a state dict of the model has them under this prefix."""
        entries = {f"{prefix}{SHADOWS}{fqn}": shadow for fqn, shadow in self._tensors.items()}
        if self._carries_count:
            entries[prefix + NUM_UPDATES] = self.num_updates
        return entries

    def _add_to(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object
    ) -> None:
        """State dict hook: the very shadows are in it, with the storages they keep."""
        self._begin()
        state_dict.update(self._entries(prefix))

    @torch.no_grad()
    def _take_from(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *report: Any
    ) -> None:
        """Load hook: shadows have the values given, which the module itself must not see."""
        _, strict, missing_keys, _, error_messages = report
        self._begin()
        for key, own in self._entries(prefix).items():
            value = state_dict.pop(key, None)
            if value is None:
                missing_keys.extend([key] if strict else [])
            elif value.shape != own.shape:
                error_messages.append(f"{key} has shape {value.shape}, expected {own.shape}")
            else:
                own.copy_(value)


def _is_stale(shadow: Tensor | None, parameter: nn.Parameter) -> bool:
    """Whether a shadow must be made: there is none, or the model has left the device it is on."""
    return shadow is None or shadow.device != parameter.device


def _refuse_other_sharding(fqn: str, shadow: Tensor, parameter: nn.Parameter) -> None:
    sharding = getattr(parameter, "placements", None)
    if getattr(shadow, "placements", None) != sharding or shadow.shape != parameter.shape:
        raise StateDictError(
            f"the average of {fqn} and the parameter are sharded differently",
            safe="neither was changed",
            do="shard the model before its first state_dict(), and call update() after "
            "optimizer.step(), when FSDP has the parameters sharded",
        )


def _in_place_of(own: Mapping[str, Any], shadows: Mapping[str, Any]) -> dict[str, Any]:
    """The shadows under the names and in the dtypes of what they follow."""
    orphans = sorted(set(shadows) - set(own))
    if orphans:
        raise StateDictError(
            f"averages of tensors that are not there: {', '.join(orphans)}",
            safe="nothing was written",
            do="give the whole state dict, in which EMA's own keys are the last to be undone",
        )
    return {fqn: shadow.to(own[fqn].dtype) for fqn, shadow in shadows.items()}


def _local(tensor: Tensor) -> Tensor:
    """The piece on this rank; it shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
