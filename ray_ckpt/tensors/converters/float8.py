"""Float8 training: linear layers multiply in float8, their weights stay in high precision.

torchao makes the layers. Its weights know how to travel in float8 when FSDP gathers them
(`all_gather="float8"`): these are of a class of torchao's, and every state dict holds the plain
tensor inside instead, on the same storage, so that a checkpoint needs no torchao.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters import choices, packages, torchao_files
from ray_ckpt.tensors.converters.linears import (
    find_linears,
    refuse_converted,
    refuse_other_matches,
    weights_of,
)
from ray_ckpt.tensors.converters.order import enter, refuse_late
from ray_ckpt.tensors.converters.protocol import WHOLE_MODEL, ExportLayout
from ray_ckpt.tensors.converters.subclasses import keep_state_dicts_plain, plain
from ray_ckpt.tensors.recording import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """Float8 arithmetic in some linear layers."""

    recipes: ClassVar[tuple[str, ...]] = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    gathers: ClassVar[tuple[str, ...]] = ("parameter", "float8")
    flavors: ClassVar[tuple[str, ...]] = ("plain", "fp8")

    targets: tuple[str, ...]
    """Patterns over names of linear layers: `layers.*`."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """How scales are chosen, by torchao's names."""
    all_gather: Literal["parameter", "float8"] = "parameter"
    """Dtype in which FSDP gathers weights; `float8` with the recipe `tensorwise` only."""
    emulate: bool = False
    """Compute with float8 values in float32, for devices that cannot multiply float8."""
    flavor: Literal["plain", "fp8"] = "plain"
    """`plain`: the weights that were trained. `fp8`: float8 weights, which torchao loads."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", choices.patterns("float8.targets", self.targets))
        choices.one_of("float8.recipe", self.recipe, self.recipes)
        gathers = self.gathers if self.recipe == "tensorwise" else ("parameter",)
        choices.one_of("float8.all_gather", self.all_gather, gathers)
        choices.one_of("float8.flavor", self.flavor, self.flavors)

    @property
    def name(self) -> str:
        """`float8`."""
        return "float8"

    def options(self) -> dict[str, Any]:
        """JSON values from which an equal converter is made."""
        return {
            "targets": list(self.targets),
            "recipe": self.recipe,
            "all_gather": self.all_gather,
            "emulate": self.emulate,
        }

    def convert(self, model: nn.Module) -> None:
        """The target layers are torchao's; names and parameters are as before."""
        float8 = packages.torchao("float8", converter=self.name)
        refuse_late(model, self.name)
        linears = find_linears(model, self.targets, converter=self.name)
        refuse_converted(linears, converter=self.name)
        refuse_other_matches(model, linears, self.targets, converter=self.name)
        enter(model, self.name)
        float8.convert_to_float8_training(
            model, module_filter_fn=lambda _, fqn: fqn in linears, config=self._config(float8)
        )
        keep_state_dicts_plain(model)

    def key_filter(self, fqn: str) -> bool:
        """None: there are no keys of its own."""
        return False

    def has_part(self, fqn: str) -> bool:
        """There are none."""
        return True

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Plain tensors; fp8: with codes and scales instead of the targets' weights."""
        tensors = {key: plain(value) for key, value in state_dict.items()}
        if self.flavor == "plain":
            return tensors
        weights = weights_of(tensors, self.targets)
        return torchao_files.in_place_of(tensors, {k: quantize(w) for k, w in weights.items()})

    def state_dict_adapter(self, base: StateDictAdapter) -> StateDictAdapter | None:
        """Names of torchao's for the fp8 flavor."""
        return torchao_files.TorchAoAdapter(base) if self.flavor == "fp8" else None

    def layout(self, outputs: Mapping[str, TensorSpec]) -> ExportLayout:
        """A model that transformers loads with torchao, for the fp8 flavor."""
        return WHOLE_MODEL if self.flavor == "plain" else torchao_files.layout(outputs, FLOAT8)

    def _config(self, float8: Any) -> Any:
        config = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
        fields["emulate"] = self.emulate
        fields["enable_fsdp_float8_all_gather"] = self.all_gather == "float8"
        return float8.Float8LinearConfig(**fields)


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Codes [out, in] in float8_e4m3fn and scales [out, 1] in float32, one a row.

    Source: torchao's `Float8Tensor.from_hp`, but that a row of zeros stays one instead of NaN.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (weight.abs().amax(dim=-1, keepdim=True) / largest).to(torch.float32)
    scale = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
    codes = (weight.to(torch.float32) / scale).clamp(min=-largest, max=largest)
    return {"qdata": codes.to(torch.float8_e4m3fn), "scale": scale}


def _attributes(parts: Mapping[str, TensorSpec]) -> dict[str, Any]:
    return {
        "block_size": [1, parts["qdata"].shape[1]],
        "mm_config": None,
        "act_quant_kwargs": None,
        "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
    }


FLOAT8 = torchao_files.WeightClass(
    name="Float8Tensor",
    parts=("qdata", "scale"),
    attributes=_attributes,
    quant_type={
        "_type": "Float8WeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": torchao_files.torch_dtype(torch.float8_e4m3fn),
            "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
            "set_inductor_config": True,
        },
    },
)
