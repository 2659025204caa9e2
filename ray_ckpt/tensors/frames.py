"""What stands around the tensors of one file of weights, in each format that exports know.

safetensors    names and places in front, then the tensors without a byte between them
torch          the zip file that `torch.save` writes: names and places in front, a few bytes before
               each tensor, a directory at the end
"""

from collections.abc import Callable, Mapping
from typing import BinaryIO, Protocol

from ray_ckpt.core.config import ExportFormat
from ray_ckpt.tensors.recording import TensorSpec
from ray_ckpt.tensors.safetensors_file import SafetensorsFrame, specs_in_safetensors
from ray_ckpt.tensors.torch_file import TorchFrame, specs_in_torch_file


class Frame(Protocol):
    """All bytes of a file but those of its tensors, in the order in which they are written."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors, in the order in which they follow upon `front`."""
        ...

    @property
    def front(self) -> bytes:
        """What comes before the first tensor."""
        ...

    def look(self, block: memoryview) -> None:
        """At the next bytes of the tensor that is written."""
        ...

    def behind(self, name: str) -> bytes:
        """What comes between this tensor, which was looked at, and the next, or the file's end."""
        ...


FRAMES: Mapping[ExportFormat, Callable[[Mapping[str, TensorSpec], Mapping[str, str]], Frame]] = {
    "safetensors": SafetensorsFrame,
    "torch": TorchFrame,
}
"""By format: from the tensors of a file, and what the file says of itself."""

SPECS_IN: Mapping[ExportFormat, Callable[[BinaryIO], dict[str, TensorSpec]]] = {
    "safetensors": specs_in_safetensors,
    "torch": specs_in_torch_file,
}
"""By format: what a file says that it holds, by name; no tensor is read."""
