"""Converters change the *model* (LoRA, Float8, QAT, EMA) and answer for the keys they add.

Every key of a model has exactly one owner: one converter, or the base. Two converters that claim
the same key are an error that names it; nothing is ever resolved by order or in silence.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray_ckpt.core.errors import ConfigError, StateDictError
from ray_ckpt.core.loading import BASE
from ray_ckpt.core.manifest import ConverterEntry
from ray_ckpt.tensors.converters.ema import EMA
from ray_ckpt.tensors.converters.float8 import Float8
from ray_ckpt.tensors.converters.lora import LoRA
from ray_ckpt.tensors.converters.protocol import WHOLE_MODEL, ExportLayout, ModelConverter
from ray_ckpt.tensors.converters.qat import QAT

__all__ = [
    "BASE",
    "CONVERTERS",
    "ExportLayout",
    "ModelConverter",
    "WHOLE_MODEL",
    "entries_of",
    "make_converters",
    "owners",
    "transform_for_export",
]

CONVERTERS: dict[str, Callable[..., ModelConverter]] = {
    "float8": Float8,
    "qat": QAT,
    "lora": LoRA,
    "ema": EMA,
}


def owners(keys: Iterable[str], converters: Sequence[ModelConverter]) -> dict[str, str]:
    """Key to the name of its one owner.

    Raises:
        StateDictError: two converters claim a key; each such key is listed.
    """
    owner_of: dict[str, str] = {}
    contested: list[str] = []
    for key in keys:
        claims = [converter.name for converter in converters if converter.key_filter(key)]
        if len(claims) > 1:
            contested.append(f"{key} ({', '.join(claims)})")
        owner_of[key] = claims[0] if claims else BASE
    if contested:
        raise StateDictError(
            f"{len(contested)} keys are claimed by more than one converter: {', '.join(contested)}",
            safe="nothing was read or written",
            do="make each key_filter match its own converter's keys only",
        )
    return owner_of


def transform_for_export(
    state_dict: Mapping[str, Any], converters: Sequence[ModelConverter]
) -> dict[str, Any]:
    """`state_dict` with every converter undone, the last conversion first."""
    for converter in reversed(converters):
        state_dict = converter.state_dict_transform(state_dict)
    return dict(state_dict)


def entries_of(converters: Iterable[ModelConverter]) -> tuple[ConverterEntry, ...]:
    """What a manifest says of them, in order; undone by :func:`make_converters`."""
    return tuple(ConverterEntry(name=c.name, options=c.options()) for c in converters)


def make_converters(
    entries: Sequence[ConverterEntry], flavors: Mapping[str, str]
) -> tuple[ModelConverter, ...]:
    """The converters that a manifest names, each set to export as its flavor says.

    Args:
        entries: in order of conversion.
        flavors: converter name to flavor; one that is not named exports as it does by default.

    Raises:
        ConfigError: a converter, an option or a flavor is not known here, or a flavor is given for
            a converter that the checkpoint does not have.
    """
    absent = sorted(set(flavors) - {entry.name for entry in entries})
    if absent:
        raise ConfigError(
            f"flavors are given for {', '.join(absent)}, which did not change this model",
            "flavors",
            "the checkpoint is untouched",
            f"its converters: {', '.join(entry.name for entry in entries) or 'none'}",
        )
    return tuple(_make(entry, flavors.get(entry.name)) for entry in entries)


def _make(entry: ConverterEntry, flavor: str | None) -> ModelConverter:
    if entry.name not in CONVERTERS:
        raise ConfigError(
            f"no converter is called {entry.name!r}",
            "converters",
            "the checkpoint is untouched",
            f"known converters: {', '.join(CONVERTERS)}; a newer ray_ckpt may know more",
        )
    make = CONVERTERS[entry.name]
    known = [name for name in inspect.signature(make).parameters if name != "flavor"]
    unknown = sorted(set(entry.options) - set(known))
    if unknown:
        raise ConfigError(
            f"{entry.name} has no option {', '.join(unknown)}",
            f"converters.{entry.name}",
            "the checkpoint is untouched",
            f"known options: {', '.join(known)}",
        )
    chosen = {} if flavor is None else {"flavor": flavor}
    try:
        return make(**entry.options, **chosen)
    except TypeError as error:
        raise ConfigError(
            f"{entry.name} cannot be made: {error}", f"converters.{entry.name}"
        ) from error
