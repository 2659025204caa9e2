"""LoRA layers under PEFT's names, and the `adapter_config.json` beside them.

    layers.0.attention.wq.lora_a.weight   [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

PEFT's names hold the module names of the Hugging Face model. They come from the model family's own
adapter, which is given `lora_b` as if it were the module's weight: both have one row per output, so
that a reordering of rows, or a split of a fused module, happens to `lora_b` as it must. `lora_a`
has no rows of outputs: it stays as it is, in each of the modules that a fused one is split into.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.adapters import StateDictAdapter
from ray_ckpt.tensors.converters.protocol import ExportLayout

PREFIX = "base_model.model."
NATIVE_A, NATIVE_B = ".lora_a.weight", ".lora_b.weight"
PEFT_A, PEFT_B = ".lora_A.weight", ".lora_B.weight"


class PeftAdapter:
    """A StateDictAdapter for LoRA's keys alone, made of the model family's."""

    def __init__(self, base: StateDictAdapter) -> None:
        self._base = base

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's names and values; the input is left as it is."""
        renamed: dict[str, Tensor] = {}
        for stem, (lora_a, lora_b) in _pairs(state_dict, NATIVE_A, NATIVE_B).items():
            for module, rows in self._split(stem, lora_b).items():
                renamed[f"{PREFIX}{module}{PEFT_A}"] = lora_a
                renamed[f"{PREFIX}{module}{PEFT_B}"] = rows
        return renamed

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit.

        Raises:
            StateDictError: modules that are one natively have different `lora_A`.
        """
        pairs = _pairs(
            dict(zip(_without_prefix(state_dict), state_dict.values(), strict=True)), PEFT_A, PEFT_B
        )
        weights = {f"{module}.weight": lora_b for module, (_, lora_b) in pairs.items()}
        native: dict[str, Tensor] = {}
        for key, lora_b in self._base.from_hf(weights).items():
            stem = key.removesuffix(".weight")
            modules = list(self._split(stem, lora_b))
            native[stem + NATIVE_A] = _shared_a(stem, {m: pairs[m][0] for m in modules})
            native[stem + NATIVE_B] = lora_b
        return native

    def is_cast(self, native: str) -> bool:
        """Every tensor of an adapter."""
        return True

    def expect_whole(self, native: Iterable[str]) -> None:
        """Returns if every LoRA layer has both halves; any set of layers is a whole adapter."""
        _refuse_incomplete(native, NATIVE_A, NATIVE_B)

    def expect_whole_hf(self, hf: Iterable[str]) -> None:
        """Returns if these are PEFT's names, and every LoRA layer has both halves."""
        _refuse_incomplete(_without_prefix(hf), PEFT_A, PEFT_B)

    def _split(self, stem: str, lora_b: Tensor) -> dict[str, Tensor]:
        """Hugging Face module to its rows of `lora_b`."""
        split = self._base.to_hf({f"{stem}.weight": lora_b})
        rank, rows = lora_b.shape[1], sum(part.shape[0] for part in split.values())
        if rows != lora_b.shape[0] or any(part.shape[1] != rank for part in split.values()):
            raise StateDictError(
                f"{stem} has no LoRA in Hugging Face's form: its rows are not rows there",
                safe="nothing was written",
                do="export the merged model instead",
            )
        return {name.removesuffix(".weight"): part for name, part in split.items()}


def layout(
    outputs: Iterable[str], *, rank: int, alpha: float, base_model: str | None
) -> ExportLayout:
    """The files that `peft.PeftModel.from_pretrained` looks for, for tensors of these names."""
    modules = [
        name.removeprefix(PREFIX).removesuffix(PEFT_A) for name in outputs if name.endswith(PEFT_A)
    ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return ExportLayout(weights="adapter_model", config_file="adapter_config.json", config=config)


def _pairs(
    state_dict: Mapping[str, Tensor], ending_a: str, ending_b: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to its two tensors."""
    _refuse_incomplete(state_dict, ending_a, ending_b)
    stems = [key.removesuffix(ending_a) for key in state_dict if key.endswith(ending_a)]
    return {stem: (state_dict[stem + ending_a], state_dict[stem + ending_b]) for stem in stems}


def _refuse_incomplete(keys: Iterable[str], ending_a: str, ending_b: str) -> None:
    """Raises StateDictError for a key of another form, and for one half without the other."""
    given, endings = set(keys), (ending_a, ending_b)
    strange = sorted(key for key in given if not key.endswith(endings))
    stems = {key.removesuffix(ending_a).removesuffix(ending_b) for key in given - set(strange)}
    lacking = sorted({stem + ending for stem in stems for ending in endings} - given)
    if strange or lacking:
        raise StateDictError(
            "not the tensors of a LoRA adapter: "
            f"no LoRA keys {strange or '(none)'}, lacking {lacking or '(none)'}",
            safe="nothing was loaded or written",
            do="give both halves of every LoRA layer and nothing else (bias and DoRA are unknown)",
        )


def _without_prefix(keys: Iterable[str]) -> list[str]:
    names = list(keys)
    strange = [name for name in names if not name.startswith(PREFIX)]
    if strange:
        raise StateDictError(
            f"not PEFT's names, which start with {PREFIX!r}: {', '.join(strange)}",
            safe="nothing was loaded",
            do="give the folder that PeftModel.save_pretrained wrote",
        )
    return [name.removeprefix(PREFIX) for name in names]


def _shared_a(stem: str, by_module: Mapping[str, Tensor]) -> Tensor:
    """The `lora_A` that all these modules have."""
    first, *others = by_module.values()
    if not all(first is other or _equal(first, other) for other in others):
        raise StateDictError(
            f"{', '.join(by_module)} are one module natively ({stem}), but their lora_A differ",
            safe="nothing was loaded",
            do="merge the adapter into its base with PEFT, and load the merged model",
        )
    return first


def _equal(first: Tensor, other: Tensor) -> bool:
    """Meta tensors, which hold no values, count as equal."""
    return first.shape == other.shape and (first.is_meta or bool(torch.equal(first, other)))
