"""A transformers model trained as it is: native names are Hugging Face names.

It cannot know which tensors a model has: a whole model is what is given. Names that share one
tensor are saved under one of them (`ModelEntry.tied`), as `save_pretrained` does.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


class IdentityAdapter:
    """Every name stays, and so does every value."""

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors in a new dict."""
        return dict(state_dict)

    def from_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors in a new dict."""
        return dict(state_dict)

    def is_cast(self, native: str) -> bool:
        """All but the routers that transformers keeps in float32 where it has routing biases."""
        return not native.endswith(("e_score_correction_bias", "mlp.gate.weight"))

    def expect_whole(self, native: Iterable[str]) -> None:
        """Returns: any set of names is a model."""

    def expect_whole_hf(self, hf: Iterable[str]) -> None:
        """Returns: any set of names is a model."""


def adapter(config: Mapping[str, Any]) -> IdentityAdapter:
    """The adapter; it needs nothing of the config."""
    return IdentityAdapter()
