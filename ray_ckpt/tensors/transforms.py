"""Content transforms: pure functions `sd -> sd`. No I/O, no change of the input, no branch on data.

    native  --converters undone-->  --cast-->  --names-->  Hugging Face

The order on export is fixed: converters are undone in full precision, the last conversion first;
then floating-point tensors are cast, but for those that the model family's adapter holds back; then
names and layouts are exchanged, by the adapter of the one converter that has a format of its own
(PEFT), else by the family's. Loading from a Hugging Face folder goes the other way, without
converters.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_ckpt.core.config import Dtype
from ray_ckpt.core.errors import UsageError
from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters import ModelConverter, transform_for_export

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDictTransforms:
    """What lies between a model's own tensors and the ones of an export."""

    adapter: StateDictAdapter
    """Of the model's family."""
    dtype: Dtype = "bfloat16"
    """What floating-point tensors are cast to."""
    converters: tuple[ModelConverter, ...] = ()
    """In order of conversion."""

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native tensors undone, cast and renamed. A part of a model will do."""
        return self.names().to_hf(self._values(state_dict))

    def whole_to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for a whole model.

        Raises:
            StateDictError: what the converters leave is not all that the names are made for.
        """
        values, names = self._values(state_dict), self.names()
        names.expect_whole(values)
        return names.to_hf(values)

    def from_hf(self, state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Hugging Face tensors renamed and cast to the model's own `dtype`."""
        return cast_floating(self.adapter.from_hf(state_dict), dtype)

    def names(self) -> StateDictAdapter:
        """What names the tensors of the export.

        Raises:
            UsageError: two converters have formats of their own.
        """
        own = {c.name: c.state_dict_adapter(self.adapter) for c in self.converters}
        given = {name: adapter for name, adapter in own.items() if adapter is not None}
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)} each ask for a format of their own",
                "export",
                "the checkpoint is untouched",
                f"export one of them in another form: --as {next(iter(given))}=...",
            )
        return next(iter(given.values()), self.adapter)

    def _values(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        undone = transform_for_export(state_dict, self.converters)
        names = self.names()
        to_cast = {key: value for key, value in undone.items() if names.is_cast(key)}
        return {**undone, **cast_floating(to_cast, TORCH_DTYPES[self.dtype])}


def cast_floating(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`; integers and bools as they are."""
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in state_dict.items()
    }
