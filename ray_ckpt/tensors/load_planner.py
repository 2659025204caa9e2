"""DCP's planner of a load, which unpickles nothing before all that was read has been compared.

Equal values are unpickled once: a hyper-parameter is there once for each parameter.
"""

import copy
import io
import pickle
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import ReadItem

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.storage.progress import Progress


class ValueLoadPlanner(DefaultLoadPlanner):
    """For one load. Of a folder that is not ours, plain values alone are unpickled."""

    def __init__(self, reader: StorageReader, progress: Progress) -> None:
        super().__init__(flatten_sharded_tensors=False)  # a look at every value, for FSDP1 alone
        self._progress = progress
        self._where = str(getattr(reader, "uri", ""))
        self._runs_pickles = bool(getattr(reader, "runs_pickles", False))
        self._arrived: list[tuple[ReadItem, bytes]] = []
        self._loaded: dict[bytes, Any] = {}
        """Values by their pickles: a hyper-parameter is there once for each parameter."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Torch calls this once a piece has arrived."""
        self._progress.advance(tensor.nbytes)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """One value that is no tensor has arrived; no pickle is run before all was compared."""
        self._arrived.append((read_item, value.getvalue()))

    def put_values(self) -> None:
        """All values that have arrived are in their places."""
        for read_item, pickled in self._arrived:
            self._put(read_item, pickled)

    def _put(self, read_item: ReadItem, pickled: bytes) -> None:
        name = read_item.dest_index.fqn
        try:
            if pickled not in self._loaded:
                value = io.BytesIO(pickled)
                self._loaded[pickled] = torch.load(value, weights_only=not self._runs_pickles)
        except pickle.UnpicklingError as error:
            raise IntegrityError(
                f"{name} holds a pickle that is more than plain values; it was not run",
                self._where,
                "storage was not changed; the model may hold some of the step's tensors",
                f"exclude its part from loading: LoadConfig(exclude=({name.partition('.')[0]!r},))",
            ) from error
        value = self._loaded[pickled]
        own = value if _cannot_change(value) else copy.deepcopy(value)
        set_element(self.original_state_dict, self.mappings[name], own)


def _cannot_change(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_cannot_change, cast(tuple[Any, ...], value)))
    return value is None or type(value) in (bool, int, float, complex, str, bytes)
