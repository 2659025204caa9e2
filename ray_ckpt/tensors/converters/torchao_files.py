"""Quantized weights in the files of an export, as torchao and transformers read them back.

    <module>._weight_qdata        codes, one for each weight   int8 or float8
    <module>._weight_scale        what codes are multiplied by
    <module>._weight_zero_point   integers only

The header of each safetensors file says for every tensor of the model which class it is made into,
and `config.json` that torchao did it. Knows names and headers; the numbers are their converter's.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters.protocol import ExportLayout
from ray_ckpt.tensors.recording import TensorSpec

WEIGHT = ".weight"
_PART = "._weight_"
_QDATA = f"{_PART}qdata"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightClass:
    """The class of torchao's that a weight is made into."""

    name: str
    """For example `Float8Tensor`."""
    parts: tuple[str, ...]
    """Tensors it consists of, `qdata` first."""
    attributes: Callable[[Mapping[str, TensorSpec]], Mapping[str, Any]]
    """What else it takes, in JSON, for parts of these shapes; `dtype` left out."""
    quant_type: Mapping[str, Any]
    """The config of torchao's that quantizes a model like this, in JSON."""


def in_place_of(
    state_dict: Mapping[str, Any], parts_of: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """`state_dict` with the parts of some modules instead of their weights."""
    quantized = {key: value for key, value in state_dict.items() if key not in parts_of}
    for key, parts in parts_of.items():
        module = key.removesuffix(WEIGHT)
        quantized.update({f"{module}{_PART}{part}": tensor for part, tensor in parts.items()})
    return quantized


def is_part(name: str) -> bool:
    """Whether it is a part of a quantized weight: its codes, its scales."""
    return _PART in name


class TorchAoAdapter:
    """A StateDictAdapter for a quantized model, made of the model family's.

    Each part is given to it as if it were the weight: all have one row per output.
    """

    def __init__(self, base: StateDictAdapter) -> None:
        self._base = base

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """HF names and values, parts beside what is plain."""
        return _by_part(state_dict, self._base.to_hf)

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit."""
        return _by_part(state_dict, self._base.from_hf)

    def is_cast(self, native: str) -> bool:
        """What the family's adapter says; codes and scales never are."""
        return not is_part(native) and self._base.is_cast(native)

    def expect_whole(self, native: Iterable[str]) -> None:
        """As the family's adapter says of the weights."""
        self._base.expect_whole(_weights(native))

    def expect_whole_hf(self, hf: Iterable[str]) -> None:
        """As the family's adapter says of the weights."""
        self._base.expect_whole_hf(_weights(hf))


def layout(outputs: Mapping[str, TensorSpec], weight_class: WeightClass) -> ExportLayout:
    """Header and config for tensors of these names, shapes and dtypes."""
    modules = [name.removesuffix(_QDATA) for name in outputs if name.endswith(_QDATA)]
    plain = {name: spec for name, spec in outputs.items() if not is_part(name)}
    dtype = _compute_dtype(plain)
    classes = {
        f"{module}{WEIGHT}": _class_entry(weight_class, _parts(outputs, module), dtype)
        for module in modules
    }
    entries = {**classes, **{name: {"_type": "Tensor"} for name in plain}}
    header = {name: json.dumps(entry) for name, entry in entries.items()}
    untouched = sorted(
        name.removesuffix(WEIGHT)
        for name, spec in plain.items()
        if name.endswith(WEIGHT) and len(spec.shape) == 2
    )
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": weight_class.quant_type},
        "modules_to_not_convert": untouched,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    return ExportLayout(
        config={"quantization_config": config},
        metadata={**header, "tensor_names": json.dumps(list(entries))},
    )


def torch_dtype(dtype: torch.dtype) -> dict[str, str]:
    """A dtype as torchao writes it in JSON."""
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def _class_entry(
    weight_class: WeightClass, parts: Mapping[str, TensorSpec], dtype: torch.dtype
) -> dict[str, Any]:
    attributes = {**weight_class.attributes(parts), "dtype": torch_dtype(dtype)}
    names = list(weight_class.parts)
    return {"_type": weight_class.name, "_data": attributes, "_tensor_data_names": names}


def _parts(outputs: Mapping[str, TensorSpec], module: str) -> dict[str, TensorSpec]:
    prefix = module + _PART
    names = (name for name in outputs if name.startswith(prefix))
    return {name.removeprefix(prefix): outputs[name] for name in names}


def _compute_dtype(plain: Mapping[str, TensorSpec]) -> torch.dtype:
    """Of what is not quantized, hence of what the weights are multiplied with."""
    floating = (spec.dtype for spec in plain.values() if spec.dtype.is_floating_point)
    return next(floating, torch.float32)


def _weights(names: Iterable[str]) -> list[str]:
    """The name of the weight for each quantized one, other names as they are."""
    return list(
        dict.fromkeys(
            name.partition(_PART)[0] + WEIGHT if is_part(name) else name for name in names
        )
    )


def _by_part(
    state_dict: Mapping[str, Tensor],
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Plain tensors renamed, and every kind of part as if it were the weights."""
    renamed = rename({name: value for name, value in state_dict.items() if not is_part(name)})
    endings = dict.fromkeys(name.partition(_PART)[2] for name in state_dict if is_part(name))
    for ending in endings:
        suffix = _PART + ending
        weights = {
            name.removesuffix(suffix) + WEIGHT: value
            for name, value in state_dict.items()
            if name.endswith(suffix)
        }
        for name, value in rename(weights).items():
            _refuse_other_layout(name, value, weights)
            renamed[name.removesuffix(WEIGHT) + suffix] = value
    return renamed


def _refuse_other_layout(name: str, value: Tensor, given: Mapping[str, Tensor]) -> None:
    """Raises StateDictError if rows are no rows any more, for example after a transposition."""
    columns = {tensor.shape[-1] for tensor in given.values()}
    if not name.endswith(WEIGHT) or value.dim() != 2 or value.shape[1] not in columns:
        raise StateDictError(
            f"{name} cannot hold a quantized weight: its rows are not rows there",
            safe="nothing was written",
            do="export the plain flavor, or leave the layer out of the targets",
        )
