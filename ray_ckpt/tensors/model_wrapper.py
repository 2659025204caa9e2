"""A model, or its pipeline parts, as one flat state dict under canonical names.

Holds no state dict of its own: each call asks the modules, whose tensors keep their storages, so
that staging buffers keyed by storage stay valid.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

from torch import nn

from ray_ckpt.core.errors import StateDictError
from ray_ckpt.tensors.converters import BASE, ModelConverter, owners, transform_for_export

_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class StateDictMode(StrEnum):
    """Which of a model's tensors, and with which values."""

    FULL = "full"
    """All of them, as they train: what a resume needs."""
    BASE = "base"
    """Without the keys that converters own: the container for loading base weights."""
    EXPORT = "export"
    """With every converter undone: what an export holds."""


class ModelWrapper:
    """One module or several parts that share no key; a DCP `Stateful`."""

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        converters: Sequence[ModelConverter] = (),
    ) -> None:
        self.parts = [model] if isinstance(model, nn.Module) else list(model)
        self._converters = tuple(converters)

    def state_dict(self, mode: str = StateDictMode.FULL) -> dict[str, Any]:
        """Tensors by canonical FQN; they share storage with the parameters, except in export mode.

        Raises:
            StateDictError: no such mode, or a key that two parts or two converters claim.
        """
        if mode not in list(StateDictMode):
            raise StateDictError(
                f"no state dict mode {mode!r}", do=f"use one of: {', '.join(StateDictMode)}"
            )
        tensors = self._gather()
        owner_of = owners(tensors, self._converters)
        if mode == StateDictMode.BASE:
            return {key: tensor for key, tensor in tensors.items() if owner_of[key] == BASE}
        if mode == StateDictMode.EXPORT:
            return transform_for_export(tensors, self._converters)
        return tensors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every tensor of every part has the value given; all of them must be given, and no other.

        Raises:
            StateDictError: lists what is missing and what is unexpected; nothing is loaded.
        """
        names = [dict(_canonical_names(part)) for part in self.parts]
        expected = {key for part in names for key in part}
        missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
        if missing or unexpected:
            raise StateDictError(
                f"the state dict does not fit: missing {missing}, unexpected {unexpected}",
                safe="no parameter was changed",
                do="load it into the model that was saved, or name another source for these keys",
            )
        for part, own in zip(self.parts, names, strict=True):
            part.load_state_dict({raw: state_dict[key] for key, raw in own.items()})

    def _gather(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for part in self.parts:
            for raw, tensor in part.state_dict().items():
                key = canonical_fqn(raw)
                if key in tensors:
                    raise StateDictError(f"two parts of the model have a tensor called {key}")
                tensors[key] = tensor
        return tensors


def canonical_fqn(name: str) -> str:
    """`name` without the segments that activation checkpointing and torch.compile put in."""
    for segment in _WRAPPER_SEGMENTS:
        name = name.replace(segment, "")
    return name


def _canonical_names(part: nn.Module) -> Iterator[tuple[str, str]]:
    return ((canonical_fqn(raw), raw) for raw in part.state_dict())
