"""What the plan of a rank depends on, without planning: equal signatures, equal items.

Whatever decides an item is in it: keys and their order, whether a value is a tensor, dtype, shapes,
placements, the mesh. What a value is does not matter, its bytes are looked at when it is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.tensor import DTensor

from ray_ckpt.tensors.save_columns import Paths


@dataclass(frozen=True, slots=True)
class Signature:
    """To be compared."""

    keys: list[str]
    values: list[Any]
    """What is told of each key's value."""
    paths: Paths

    @classmethod
    def of(cls, state_dict: Mapping[str, Any], paths: Paths) -> "Signature":
        """Of a flat state dict, and DCP's way back to the nested one."""
        with torch.no_grad():
            values = [_told(key, value) for key, value in state_dict.items()]
        return cls(list(state_dict), values, dict(paths))


def _told(key: str, value: Any) -> Any:
    if type(value) is DTensor:
        local = value.to_local()
        return (value.shape, value.placements, value.device_mesh, *_of_tensor(local))
    if hasattr(value, "__create_write_items__") or isinstance(value, ShardedTensor):
        return create_default_local_save_plan({key: value}, False).items
    return _of_tensor(value) if isinstance(value, Tensor) else None


def _of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """What DCP writes down of it."""
    return (
        tensor.shape,
        tensor.dtype,
        tensor.layout,
        tensor.requires_grad,
        tensor.is_pinned(),
    )
