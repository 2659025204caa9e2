"""Quantization-aware training: linear layers compute with rounded weights, and train exact ones.

    scale  = max |w| of a group of a row / ((largest - smallest code) / 2)
    code   = round(w / scale), within the codes there are

torchao makes the layers, whose forward rounds like this and back. No new tensors: the exact
weights are saved and go on training. The low-precision flavors write the codes that were trained
for; int4 ones take a byte each in the file, the one form that torchao loads on any device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ray_ckpt.core.errors import ConfigError
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
from ray_ckpt.tensors.recording import TensorSpec

CODES = {"int4": (-8, 7), "int8": (-128, 127)}
"""Smallest and largest code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QAT:
    """Training for weights of few bits in some linear layers."""

    flavors: ClassVar[tuple[str, ...]] = ("plain", *CODES)

    targets: tuple[str, ...]
    """Patterns over names of linear layers: `layers.*`."""
    weights: Literal["int4", "int8"] = "int4"
    """What weights are rounded to, symmetrically around zero."""
    group_size: int = 32
    """Weights of a row that share a scale; it divides every target's inputs."""
    activations: Literal["none", "int8"] = "none"
    """What inputs of the layers are rounded to, each token by itself."""
    flavor: Literal["plain", "int4", "int8"] = "plain"
    """`plain`: the exact weights that were trained. Else codes and scales, which torchao loads."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", choices.patterns("qat.targets", self.targets))
        choices.one_of("qat.weights", self.weights, tuple(CODES))
        choices.one_of("qat.activations", self.activations, ("none", "int8"))
        choices.positive("qat.group_size", self.group_size)
        choices.one_of("qat.flavor", self.flavor, ("plain", self.weights))

    @property
    def name(self) -> str:
        """`qat`."""
        return "qat"

    def options(self) -> dict[str, Any]:
        """JSON values from which an equal converter is made."""
        return {
            "targets": list(self.targets),
            "weights": self.weights,
            "group_size": self.group_size,
            "activations": self.activations,
        }

    def convert(self, model: nn.Module) -> None:
        """The target layers are torchao's; names and parameters are as before."""
        qat = packages.torchao("quantization.qat", converter=self.name)
        refuse_late(model, self.name)
        linears = find_linears(model, self.targets, converter=self.name)
        refuse_converted(linears, converter=self.name)
        refuse_other_matches(model, linears, self.targets, converter=self.name)
        self._refuse_odd_groups(linears)
        enter(model, self.name)
        for linear in linears.values():
            self._round(linear, qat)

    def key_filter(self, fqn: str) -> bool:
        """None: there are no keys of its own."""
        return False

    def has_part(self, fqn: str) -> bool:
        """There are none."""
        return True

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors as they are; else with codes and scales instead of the targets' weights."""
        if self.flavor == "plain":
            return dict(state_dict)
        weights = weights_of(state_dict, self.targets)
        parts = {
            key: quantize(weight, codes=CODES[self.weights], group_size=self.group_size)
            for key, weight in weights.items()
        }
        return torchao_files.in_place_of(state_dict, parts)

    def state_dict_adapter(self, base: StateDictAdapter) -> StateDictAdapter | None:
        """Names of torchao's for the low-precision flavors."""
        return None if self.flavor == "plain" else torchao_files.TorchAoAdapter(base)

    def layout(self, outputs: Mapping[str, TensorSpec]) -> ExportLayout:
        """A model that transformers loads with torchao, for the low-precision flavors."""
        if self.flavor == "plain":
            return WHOLE_MODEL
        return torchao_files.layout(outputs, self._weight_class())

    def _round(self, linear: nn.Linear, qat: Any) -> None:
        """The very module gets torchao's class: parameters, hooks and names stay."""
        weight = qat.IntxFakeQuantizeConfig(
            getattr(torch, self.weights), group_size=self.group_size, is_symmetric=True
        )
        inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        quantizer = qat.FakeQuantizerBase.from_config
        linear.__class__ = qat.FakeQuantizedLinear
        linear.register_module("weight_fake_quantizer", quantizer(weight))
        rounds_inputs = self.activations == "int8"
        linear.register_module(
            "activation_fake_quantizer", quantizer(inputs) if rounds_inputs else None
        )

    def _refuse_odd_groups(self, linears: Mapping[str, nn.Linear]) -> None:
        odd = [
            f"{name} ({linear.in_features})"
            for name, linear in linears.items()
            if linear.in_features % self.group_size
        ]
        if odd:
            raise ConfigError(
                f"groups of {self.group_size} do not divide the inputs of {', '.join(odd)}",
                "qat.group_size",
                "the model was not changed",
                "choose a group size that divides them all, or leave these layers out",
            )

    def _weight_class(self) -> torchao_files.WeightClass:
        return torchao_files.WeightClass(
            name="IntxUnpackedToInt8Tensor",
            parts=("qdata", "scale", "zero_point"),
            attributes=self._attributes,
            quant_type=_QUANT_TYPES[self.activations](self.weights, self.group_size),
        )

    def _attributes(self, parts: Mapping[str, TensorSpec]) -> dict[str, Any]:
        rounds_inputs = self.activations == "int8"
        return {
            "target_dtype": torchao_files.torch_dtype(getattr(torch, self.weights)),
            "block_size": [1, self.group_size],
            "activation_quantization": "int8_asym_per_token" if rounds_inputs else None,
        }


def quantize(weight: Tensor, *, codes: tuple[int, int], group_size: int) -> dict[str, Tensor]:
    """Codes [out, in], scales and zero points [out, in / group_size] of a weight [out, in].

    The operations and their dtypes are those of torchao's fake quantizer, so that code times scale
    is, bit for bit, what the model was trained with.
    """
    smallest, largest = codes
    groups = weight.reshape(weight.shape[0], -1, group_size)
    reach = torch.maximum(-groups.amin(dim=-1), groups.amax(dim=-1)).clamp(min=0)
    scale = reach / ((largest - smallest) / 2)
    scale = scale.clamp(min=torch.finfo(weight.dtype).smallest_normal).to(torch.float32)
    rounded = torch.round(groups * (1.0 / scale).unsqueeze(-1)).clamp(smallest, largest)
    return {
        "qdata": rounded.to(torch.int8).reshape(weight.shape),
        "scale": scale,
        "zero_point": torch.zeros_like(scale, dtype=torch.int8),
    }


def _weight_only(weights: str, group_size: int) -> dict[str, Any]:
    data = {"granularity": _per_group(group_size), "mapping_type": _SYMMETRIC, "scale_dtype": None}
    return _quant_type("IntxWeightOnlyConfig", weights, data)


def _with_int8_inputs(weights: str, group_size: int) -> dict[str, Any]:
    data = {
        "weight_granularity": _per_group(group_size),
        "weight_mapping_type": _SYMMETRIC,
        "weight_scale_dtype": None,
        "act_mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
    }
    return _quant_type("Int8DynamicActivationIntxWeightConfig", weights, data)


def _quant_type(name: str, weights: str, data: Mapping[str, Any]) -> dict[str, Any]:
    common = {
        "weight_dtype": torchao_files.torch_dtype(getattr(torch, weights)),
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    return {"_type": name, "_version": 2, "_data": {**common, **data}}


def _per_group(group_size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group_size}}


_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
_QUANT_TYPES = {"none": _weight_only, "int8": _with_int8_inputs}
