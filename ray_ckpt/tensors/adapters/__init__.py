"""Adapters give tensors other *names*: native <-> Hugging Face. One file a model family.

To add a family: `tensors/adapters/<family>.py` with a function `adapter(config)`, and a line in
ADAPTERS; `tests/tensors/test_adapters.py` then runs over it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.tensors.adapters import llama


class StateDictAdapter(Protocol):
    """Total and invertible: every tensor is spoken for, in both directions, or it is an error."""

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """HF names and values; pure. Part of a model will do."""
        ...

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit."""
        ...

    def sources(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """For a whole model: each HF name with the native names it is made of.

        Raises:
            StateDictError: a key that nothing speaks for, or an expected one that is not there.
        """
        ...


ADAPTERS: dict[str, Callable[[Mapping[str, Any]], StateDictAdapter]] = {
    "llama": llama.adapter,
}


def make_adapter(family: str, config: Mapping[str, Any]) -> StateDictAdapter:
    """The adapter of `family` for a model with this Hugging Face `config.json`.

    Raises:
        ConfigError: no such family, or the config lacks what the adapter needs.
    """
    if family not in ADAPTERS:
        raise ConfigError(
            f"no adapter for model family {family!r}",
            "tensors/adapters",
            "the checkpoint is untouched; only its export needs an adapter",
            f"known families: {', '.join(ADAPTERS)}",
        )
    try:
        return ADAPTERS[family](config)
    except KeyError as error:
        raise ConfigError(f"config.json of a {family} model lacks {error}", "hf_assets") from error
