"""What kind of export somebody wants, and how a finished one says it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from ray_ckpt.core.config import MAX_SHARD_BYTES, Device, Dtype, ExportFormat

_FLAVOR = "flavor."


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """What kind of export."""

    name: str
    dtype: Dtype = "bfloat16"
    flavors: Mapping[str, str] = field(default_factory=dict[str, str])
    """Converter to what it is exported as, for example `{"lora": "peft"}`; each has a default."""
    format: ExportFormat = "safetensors"
    """Of the files of weights: several safetensors files, or one that `torch.load` reads."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Of each safetensors file; one that holds a single larger tensor is as large as that."""
    device: Device = "cpu"
    """Where merges and what else is computed run; with `cuda` a task asks for one GPU."""
    logits_within: float | None = None
    """How far the logits of the run's prompt may be from those that training recorded with the
    step: at each position the norm of the difference, relative to theirs. None compares none."""
    license: str | None = None
    """As the Hub calls it, for the model card; None for the base model's, if that is known."""
    allow_non_finite: bool = False
    """Also export a step with NaN or Inf in its weights."""
    allow_zeros: bool = False
    """Also with a matrix that is nothing but zeros."""

    @property
    def num_gpus(self) -> int:
        """So many each task works with that makes a part of it."""
        return 1 if self.device == "cuda" else 0

    @property
    def recipe(self) -> dict[str, str]:
        """What the manifest of such an export says of how it was made."""
        flavors = {f"{_FLAVOR}{name}": flavor for name, flavor in self.flavors.items()}
        unusual = {
            key: str(value)
            for key, value, usual in (
                ("format", self.format, "safetensors"),
                ("max_shard_bytes", self.max_shard_bytes, MAX_SHARD_BYTES),
                ("device", self.device, "cpu"),
                ("logits_within", self.logits_within, None),
                ("license", self.license, None),
            )
            if value != usual
        }
        return {"name": self.name, "dtype": self.dtype, **flavors, **unusual}

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, str]) -> "ExportSpec":
        """What was asked for when an export of this recipe was made."""
        return cls(
            name=recipe["name"],
            dtype=cast(Dtype, recipe["dtype"]),
            flavors={
                key.removeprefix(_FLAVOR): flavor
                for key, flavor in recipe.items()
                if key.startswith(_FLAVOR)
            },
            format=cast(ExportFormat, recipe.get("format", "safetensors")),
            max_shard_bytes=int(recipe.get("max_shard_bytes", MAX_SHARD_BYTES)),
            device=cast(Device, recipe.get("device", "cpu")),
            logits_within=float(recipe["logits_within"]) if "logits_within" in recipe else None,
            license=recipe.get("license"),
        )
