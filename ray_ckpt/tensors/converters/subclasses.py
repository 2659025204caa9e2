"""Plain tensors out of torchao's float8 weights, so that no checkpoint needs torchao to be read.

Told by their name, not by their type: whoever has such a weight has imported torchao already.
"""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

_FLOAT8_WEIGHT = "WeightWithDynamicFloat8CastTensor"


def plain(value: Any) -> Any:
    """`value`, or the high-precision tensor inside it: same storage, same sharding."""
    inner: Any = value.to_local() if isinstance(value, DTensor) else value
    if type(inner).__name__ != _FLOAT8_WEIGHT:
        return value
    if not isinstance(value, DTensor):
        return inner._tensor
    return DTensor.from_local(
        inner._tensor,
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def keep_state_dicts_plain(model: nn.Module) -> None:
    """State dicts of the model hold plain tensors from now on, and are loaded from such."""
    model.register_state_dict_post_hook(_make_plain)


def _make_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object
) -> None:
    state_dict.update({key: plain(value) for key, value in state_dict.items()})
