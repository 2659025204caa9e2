"""Converters change the *model* (LoRA, Float8, QAT, EMA) and answer for the keys they add.

Every key of a model has exactly one owner: one converter, or the base. Two converters that claim
the same key are an error that names it; nothing is ever resolved by order or in silence.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import nn

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.adapters import StateDictAdapter

BASE = "base"
"""Owner of every key that no converter claims."""


class ModelConverter(Protocol):
    """One change to a model, and how its keys are saved and exported."""

    @property
    def name(self) -> str:
        """How manifests and messages call it."""
        ...

    def convert(self, model: nn.Module) -> None:
        """The model, changed in place; called once, before it is sharded."""
        ...

    def key_filter(self, fqn: str) -> bool:
        """Whether this converter owns the key."""
        ...

    def state_dict_transform(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` as it is exported: LoRA merged, Float8 made plain. Pure: a new dict."""
        ...

    def state_dict_adapter(self) -> StateDictAdapter | None:
        """Names of its own keys in its ecosystem's format (PEFT); None if it has no keys left."""
        ...


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
    state_dict: dict[str, Any], converters: Sequence[ModelConverter]
) -> dict[str, Any]:
    """`state_dict` with every converter undone, the last conversion first."""
    for converter in reversed(converters):
        state_dict = converter.state_dict_transform(state_dict)
    return state_dict
