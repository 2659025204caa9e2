"""A model, or its pipeline parts, as one flat state dict under canonical names.

Holds no tensor between two calls: each asks the modules anew, once. What it remembers are names.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ray_ckpt.core.errors import StateDictError, UsageError
from ray_ckpt.tensors.converters import BASE, ModelConverter, owners, transform_for_export
from ray_ckpt.tensors.fqn import canonical_fqn


class StateDictMode(StrEnum):
    """Which of a model's tensors, and with which values."""

    FULL = "full"
    """All of them, as they train: what a resume needs."""
    BASE = "base"
    """Without the keys that converters own: the container for loading base weights."""
    EXPORT = "export"
    """With every converter undone: what an export holds."""


class ModelWrapper:
    """One module or several parts that share no key; a DCP `Stateful`.

    Raises:
        UsageError: a part is wrapped in FSDP1, whose parameters are flat and have no names.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        converters: Sequence[ModelConverter] = (),
    ) -> None:
        self.parts = [
            _unwrapped(part) for part in ([model] if isinstance(model, nn.Module) else model)
        ]
        self.converters = tuple(converters)
        self._names: list[dict[str, str]] = []
        """For each part the module's own name of each canonical one, as of the last gathering."""
        self._tied: dict[str, str] = {}

    def state_dict(self, mode: str = StateDictMode.FULL) -> dict[str, Any]:
        """Tensors by canonical FQN; they share storage with the parameters, except in export mode.

        A tensor that several names share is there once, under the first of them; see `tied`.

        Raises:
            StateDictError: no such mode, or a key that two parts or two converters claim.
        """
        if mode not in list(StateDictMode):
            raise StateDictError(
                f"no state dict mode {mode!r}", do=f"use one of: {', '.join(StateDictMode)}"
            )
        tensors = self._gather()
        owner_of = self.owners(tensors)
        if mode == StateDictMode.BASE:
            return {key: tensor for key, tensor in tensors.items() if owner_of[key] == BASE}
        if mode == StateDictMode.EXPORT:
            return transform_for_export(tensors, self.converters)
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Every tensor of every part has the value given; all of them must be given, and no other.

        Raises:
            StateDictError: lists what is missing and what is unexpected; nothing is loaded.
        """
        if not self._names:
            self._gather()
        expected = {key for names in self._names for key in names} - set(self._tied)
        missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
        if missing or unexpected:
            raise StateDictError(
                f"the state dict does not fit: missing {missing}, unexpected {unexpected}",
                safe="no parameter was changed",
                do="load it into the model that was saved, or name another source for these keys",
            )
        for part, names in zip(self.parts, self._names, strict=True):
            part.load_state_dict(
                {raw: state_dict[self._tied.get(key, key)] for key, raw in names.items()}
            )

    @property
    def tied(self) -> dict[str, str]:
        """Names that are left out to the name whose tensor they share, as of the last call."""
        return dict(self._tied)

    def owners(self, keys: Iterable[str]) -> dict[str, str]:
        """Key to the name of its one owner: a converter, or the base.

        Raises:
            StateDictError: two converters claim a key; each such key is listed.
        """
        return owners(keys, self.converters)

    def _gather(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        self._names, self._tied = [], {}
        for part in self.parts:
            raws = {canonical_fqn(raw): (raw, tensor) for raw, tensor in part.state_dict().items()}
            twice = sorted(set(raws) & set(tensors))
            if twice:
                raise StateDictError(
                    f"two parts of the model have tensors called {', '.join(twice)}"
                )
            self._names.append({key: raw for key, (raw, _) in raws.items()})
            self._tied.update(_tied(part, raws))
            tensors.update((key, tensor) for key, (_, tensor) in raws.items())
        return {key: tensor for key, tensor in tensors.items() if key not in self._tied}


def _unwrapped(part: nn.Module) -> nn.Module:
    """The module that has the parameters' own names."""
    if any(isinstance(module, FullyShardedDataParallel) for module in part.modules()):
        raise UsageError(
            "the model is wrapped in FullyShardedDataParallel, whose flat parameters have no names",
            "ModelWrapper",
            "nothing was saved or loaded",
            "shard it with torch.distributed.fsdp.fully_shard (FSDP2)",
        )
    return part.module if isinstance(part, DistributedDataParallel) else part


def _tied(part: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Each name in `keys` whose very parameter or buffer has an earlier name there."""
    identity = {
        canonical_fqn(name): id(tensor)
        for tensors in (
            part.named_parameters(remove_duplicate=False),
            part.named_buffers(remove_duplicate=False),
        )
        for name, tensor in tensors
    }
    first: dict[int, str] = {}
    return {
        key: first[identity[key]]
        for key in keys
        if key in identity and first.setdefault(identity[key], key) != key
    }
