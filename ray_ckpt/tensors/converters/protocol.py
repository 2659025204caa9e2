"""What a converter is: one change to a model, and the answer for the keys it adds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.recording import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLayout:
    """How the files of an export are called and described."""

    weights: str = "model"
    """Stem of the safetensors files; `adapter_model` for PEFT."""
    config_file: str = "config.json"
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Entries of the config file; they are added to the model's own where it is `config.json`."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """Entries for the header of every safetensors file, beside `format`."""


WHOLE_MODEL = ExportLayout()

SHADOWS = "ema."
"""Start of EMA's keys, which hold the names of other owners' keys: nobody else may claim them."""


class ModelConverter(Protocol):
    """One change to a model, and how its keys are saved and exported.

    Equal options make an equal converter: an export years later makes it anew from the manifest.
    """

    @property
    def name(self) -> str:
        """How manifests and messages call it."""
        ...

    def options(self) -> dict[str, Any]:
        """JSON values from which an equal converter is made: `CONVERTERS[name](**options)`.

        The flavor is none of them: it says how one export is made, not what the model is.
        """
        ...

    def convert(self, model: nn.Module) -> None:
        """The model, changed in place; called once a part, before it is wrapped or sharded.

        Raises:
            ConfigError: the options do not fit this model, or another converter came too early.
        """
        ...

    def key_filter(self, fqn: str) -> bool:
        """Whether this converter owns the key."""
        ...

    def has_part(self, fqn: str) -> bool:
        """Whether one of its own keys shapes an export of this flavor."""
        ...

    def state_dict_transform(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """`state_dict` as it is exported: LoRA merged, Float8 made plain. Pure: a new dict.

        It runs on DTensors, on meta tensors and under a recorder alike.
        """
        ...

    def state_dict_adapter(self, base: StateDictAdapter) -> StateDictAdapter | None:
        """Names of what its transform leaves, in its ecosystem's format (PEFT).

        None if the transform leaves a model that `base`, the model family's adapter, can name.
        """
        ...

    def layout(self, outputs: Mapping[str, TensorSpec]) -> ExportLayout:
        """How its export is written; `WHOLE_MODEL` unless it changes the format.

        Args:
            outputs: shape and dtype of every tensor of the export, by its final name.
        """
        ...
