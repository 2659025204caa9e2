"""Content transforms: pure functions `sd -> sd`. No I/O, no change of the input, no branch on data.

The order on export is fixed: converters undone (ModelWrapper's export mode), then the cast, then
the names. Loading from a Hugging Face folder goes the other way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_ckpt.core.config import Dtype
from ray_ckpt.tensors.adapters import StateDictAdapter

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDictTransforms:
    """What lies between a model's own tensors and the ones of an export."""

    adapter: StateDictAdapter
    dtype: Dtype = "bfloat16"
    """What floating-point tensors are cast to."""

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native tensors cast and renamed; part of a model will do."""
        return self.adapter.to_hf(cast_floating(state_dict, TORCH_DTYPES[self.dtype]))

    def from_hf(self, state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Hugging Face tensors renamed and cast to the model's own `dtype`."""
        return cast_floating(self.adapter.from_hf(state_dict), dtype)


def cast_floating(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`; integers, bools and tensors already in it as they are."""
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor
        for key, tensor in state_dict.items()
    }
