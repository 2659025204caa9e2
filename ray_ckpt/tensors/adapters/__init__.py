"""Adapters give tensors other *names*: native <-> Hugging Face. One file a model family.

Native names are TorchTitan's, Hugging Face ones those on disk: what `save_pretrained` writes.

To add a family: `tensors/adapters/<family>.py` with a function `adapter(config)`, and a line in
ADAPTERS; `tests/tensors/test_adapters.py` then runs over it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.tensors.adapters import (
    deepseek_v3,
    gpt_oss,
    identity,
    llama,
    mixtral,
    qwen3,
    qwen3_moe,
)


class StateDictAdapter(Protocol):
    """Total and invertible: every tensor is spoken for, in both directions, or it is an error."""

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """HF names and values; pure, and recordable. A part of a model made of whole rules will do.

        Raises:
            StateDictError: a tensor that nothing speaks for, or part of a rule's tensors.
        """
        ...

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Native names and values; undoes :meth:`to_hf` bit for bit."""
        ...

    def is_cast(self, native: str) -> bool:
        """Whether an export in another type casts the tensor of this native name."""
        ...

    def expect_whole(self, native: Iterable[str]) -> None:
        """Returns if these are the native names of a whole model.

        Raises:
            StateDictError: a name that nothing speaks for, or an expected one that is not there.
        """
        ...

    def expect_whole_hf(self, hf: Iterable[str]) -> None:
        """Returns if these are the HF names of a whole model; raises as :meth:`expect_whole`."""
        ...


ADAPTERS: dict[str, Callable[[Mapping[str, Any]], StateDictAdapter]] = {
    "deepseek_v3": deepseek_v3.adapter,
    "gpt_oss": gpt_oss.adapter,
    "identity": identity.adapter,
    "llama": llama.adapter,
    "mixtral": mixtral.adapter,
    "qwen3": qwen3.adapter,
    "qwen3_moe": qwen3_moe.adapter,
    "torchtitan_llama3": llama.torchtitan_adapter,
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
