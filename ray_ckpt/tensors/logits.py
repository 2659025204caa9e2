"""What a model answers to a prompt: recorded by training with a step, compared with an export's.

    training    Run.reference, called on every rank whenever a step is saved   ->   hf_assets/
    export      transformers loads the folder before it is shown; the logits may differ by so much

The comparison holds the whole model in memory, as an export otherwise never does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from ray_ckpt.core.errors import IntegrityError, UsageError

_SAFE = "the checkpoint is untouched, and no reader sees a part of the export"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A prompt, and what the trained model makes of it."""

    input_ids: Tensor
    """`[batch, sequence]`, integers."""
    logits: Tensor
    """`[batch, sequence, vocabulary]`, floating point; the same on every rank."""

    def to_bytes(self) -> bytes:
        """A safetensors file.

        Raises:
            UsageError: the shapes do not fit each other.
        """
        if self.input_ids.ndim != 2 or self.logits.shape[:-1] != self.input_ids.shape:
            raise UsageError(
                f"a reference's logits are {list(self.logits.shape)} and its input_ids "
                f"{list(self.input_ids.shape)}",
                "Run.reference",
                "nothing was saved",
                "return input_ids [batch, sequence] and logits [batch, sequence, vocabulary]",
            )
        tensors = {"input_ids": self.input_ids, "logits": self.logits}
        return safetensors_torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reference":
        """What :meth:`to_bytes` made."""
        try:
            tensors: Mapping[str, Tensor] = safetensors_torch.load(data)
            return cls(input_ids=tensors["input_ids"], logits=tensors["logits"])
        except (SafetensorError, KeyError) as error:
            raise IntegrityError(f"the recorded logits cannot be read: {error}") from error


def expect_logits(folder: Path, reference: Reference, *, within: float) -> float:
    """The largest relative difference at any position, which is at most `within`.

    Raises:
        IntegrityError: it is larger, or transformers cannot load the folder.
        UsageError: transformers is not installed here.
    """
    logits = _logits_of(folder, reference.input_ids)
    if logits.shape != reference.logits.shape:
        raise IntegrityError(
            f"the export's logits are {list(logits.shape)}, recorded were "
            f"{list(reference.logits.shape)}",
            "export",
            _SAFE,
        )
    expected = reference.logits.double()
    apart = (logits.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(apart.max())
    if not worst <= within:  # NaN is no difference that anybody has allowed
        at = int(apart.nan_to_num(nan=torch.inf).argmax())
        row, position = divmod(at, apart.shape[1])
        raise IntegrityError(
            f"the export answers the recorded prompt in another way: at position {position} of row "
            f"{row} its logits differ by {worst:.3g}, allowed is {within:g}",
            "export",
            _SAFE,
            "compare them by hand, allow more, or leave --logits-within out",
        )
    return worst


def _logits_of(folder: Path, input_ids: Tensor) -> Tensor:
    try:
        from transformers import AutoModelForCausalLM  # heavy, and needed for this alone
    except ImportError as error:
        raise UsageError(
            "logits are compared by transformers, which is not installed here",
            "export",
            _SAFE,
            "pip install transformers on the nodes that export, or leave --logits-within out",
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        with torch.no_grad():
            return model(input_ids=input_ids).logits
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise IntegrityError(
            f"transformers cannot use the export: {error}", str(folder), _SAFE
        ) from error
