"""LoRA: two low-rank layers beside a frozen linear one, under TorchTitan's names.

    layers.0.attention.wq.weight           [out, in]    frozen, its name unchanged
    layers.0.attention.wq.lora_a.weight    [rank, in]   trained
    layers.0.attention.wq.lora_b.weight    [out, rank]  trained, zero at first

Knows how the two are merged into the weight; `peft` knows the names of the other export.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters import choices, peft
from ray_ckpt.tensors.converters.linears import find_linears, matches
from ray_ckpt.tensors.converters.order import enter, refuse_late
from ray_ckpt.tensors.converters.protocol import SHADOWS, WHOLE_MODEL, ExportLayout
from ray_ckpt.tensors.recording import TensorSpec

LORA_A = ".lora_a.weight"
LORA_B = ".lora_b.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Low-rank adaptation of some linear layers; everything else is frozen."""

    saves_choices: ClassVar[tuple[str, ...]] = ("everything", "adapter")
    flavors: ClassVar[tuple[str, ...]] = ("merged", "peft")

    rank: int
    """Inner width of the two layers."""
    alpha: float
    """`alpha / rank` scales what they add; it is in no state dict."""
    targets: tuple[str, ...]
    """Patterns over names of linear layers: `layers.*.attention.wq`."""
    saves: Literal["everything", "adapter"] = "everything"
    """`adapter`: checkpoints hold LoRA's own keys, and name the base model."""
    base_model: str | None = None
    """Hub id of the base model, written into `adapter_config.json`."""
    flavor: Literal["merged", "peft"] = "merged"
    """`merged`: a plain model. `peft`: the two layers alone, as PEFT and vLLM load them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", choices.patterns("lora.targets", self.targets))
        choices.positive("lora.rank", self.rank)
        choices.positive("lora.alpha", self.alpha)
        choices.one_of("lora.saves", self.saves, self.saves_choices)
        choices.one_of("lora.flavor", self.flavor, self.flavors)

    @property
    def name(self) -> str:
        """`lora`."""
        return "lora"

    @property
    def scaling(self) -> float:
        """Factor of what the two layers add."""
        return self.alpha / self.rank

    def options(self) -> dict[str, Any]:
        """JSON values from which an equal converter is made."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "saves": self.saves,
            "base_model": self.base_model,
        }

    def convert(self, model: nn.Module) -> None:
        """The target layers have low-rank ones beside them, and nothing else is trained.

        On the meta device the new layers are there too: after `to_empty`, call
        :func:`init_lora_weights`.
        """
        refuse_late(model, self.name)
        linears = find_linears(model, self.targets, converter=self.name)
        enter(model, self.name)
        model.requires_grad_(requires_grad=False)
        for linear in linears.values():
            _add_low_rank(linear, self.rank, self.scaling)

    def key_filter(self, fqn: str) -> bool:
        """Whether it is one of the low-rank layers beside a target."""
        module = _module_of(fqn)
        return module is not None and matches(module, self.targets)

    def has_part(self, fqn: str) -> bool:
        """Every one: merged, or in PEFT's own file."""
        return True

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Merged: every key of the base, with `weight + scaling * b @ a` for the targets.

        The sum is made in float32 (or wider) and cast back. PEFT: LoRA's own keys alone.

        Raises:
            StateDictError: a low-rank layer without its other half or its base weight.
        """
        if self.flavor == "peft":
            _refuse_orphans(self._stems(state_dict), state_dict, needed=(LORA_A, LORA_B))
            return {key: value for key, value in state_dict.items() if self.key_filter(key)}
        stems = self._stems(state_dict)
        _refuse_orphans(stems, state_dict, needed=(LORA_A, LORA_B, ".weight"))
        merged = {key: value for key, value in state_dict.items() if not self.key_filter(key)}
        for stem in stems:
            weight = state_dict[f"{stem}.weight"]
            low_rank = (state_dict[stem + LORA_A], state_dict[stem + LORA_B])
            merged[f"{stem}.weight"] = merge(weight, *low_rank, scaling=self.scaling)
        return merged

    def state_dict_adapter(self, base: StateDictAdapter) -> StateDictAdapter | None:
        """PEFT's names for the PEFT flavor."""
        return peft.PeftAdapter(base) if self.flavor == "peft" else None

    def layout(self, outputs: Mapping[str, TensorSpec]) -> ExportLayout:
        """`adapter_model.safetensors` and `adapter_config.json` for the PEFT flavor."""
        if self.flavor == "merged":
            return WHOLE_MODEL
        return peft.layout(outputs, rank=self.rank, alpha=self.alpha, base_model=self.base_model)

    def _stems(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Names of the layers that have at least one low-rank layer, in order."""
        modules = (_module_of(key) for key in state_dict if self.key_filter(key))
        return list(dict.fromkeys(module for module in modules if module is not None))


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float) -> Tensor:
    """`weight + scaling * lora_b @ lora_a`, [out, in] in the dtype of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = lora_b.to(wide) @ lora_a.to(wide)
    return (weight.to(wide) + scaling * product).to(weight.dtype)


def init_lora_weights(model: nn.Module) -> None:
    """All low-rank layers of the model are as at the start: the model computes what its base does.

    For models made on the meta device, once they have storage; sharded ones too.
    """
    for name, module in model.named_modules():
        if name.endswith("lora_a") and isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif name.endswith("lora_b") and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)


def _add_low_rank(linear: nn.Linear, rank: int, scaling: float) -> None:
    """The very module gets a subclass of its class: parameters, hooks and names stay."""
    place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    linear.__class__ = _lora_class(type(linear))
    linear.lora_a = nn.Linear(linear.in_features, rank, bias=False, **place)
    linear.lora_b = nn.Linear(rank, linear.out_features, bias=False, **place)
    object.__setattr__(linear, "lora_scaling", scaling)  # a number: neither tensor nor module
    init_lora_weights(linear)


@functools.cache
def _lora_class(linear_class: type[nn.Linear]) -> type[nn.Linear]:
    """`linear_class`, which may be a quantized one, with the low-rank sum on top."""

    def forward(self: Any, x: Tensor) -> Tensor:
        low_rank = self.lora_b(self.lora_a(x))
        return linear_class.forward(self, x) + self.lora_scaling * low_rank

    return type(f"LoRA{linear_class.__name__}", (linear_class,), {"forward": forward})


def _module_of(fqn: str) -> str | None:
    """`layers.0.wq` for `layers.0.wq.lora_a.weight`, None for a key that is not of this form.

    Keys of EMA's shadows (`ema.layers.0.wq.lora_a.weight`) are EMA's, whatever the patterns match.
    """
    for suffix in (LORA_A, LORA_B):
        if fqn.endswith(suffix) and not fqn.startswith(SHADOWS):
            return fqn.removesuffix(suffix)
    return None


def _refuse_orphans(
    stems: list[str], state_dict: Mapping[str, Any], *, needed: tuple[str, ...]
) -> None:
    lacking = [stem + end for stem in stems for end in needed if stem + end not in state_dict]
    if lacking:
        raise StateDictError(
            f"LoRA layers are not complete, these tensors are lacking: {', '.join(lacking)}",
            safe="nothing was merged or written",
            do="give the base's weights and both halves of every LoRA layer",
        )
