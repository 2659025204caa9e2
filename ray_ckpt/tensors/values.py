"""What a load finds that is no tensor: nothing is unpickled before all that was read was compared.

Equal values are unpickled once: a hyper-parameter is there once for each parameter.
"""

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint._nested_dict import set_element

from ray_ckpt.core.errors import IntegrityError


class Values:
    """Of one load. Of a folder that is not ours, plain values alone are unpickled."""

    def __init__(self, where: str, *, runs_pickles: bool) -> None:
        self._where = where
        self._runs_pickles = runs_pickles
        self._arrived: dict[str, bytes] = {}
        self._loaded: dict[bytes, Any] = {}

    def arrived(self, name: str, pickled: bytes) -> None:
        """One of them, as it lies there."""
        self._arrived[name] = pickled

    def put(self, state_dict: dict[str, Any], paths: Mapping[str, Any]) -> None:
        """All that have arrived are in their places in the nested `state_dict`."""
        for name, pickled in self._arrived.items():
            value = self._value(name, pickled)
            own = value if _cannot_change(value) else copy.deepcopy(value)
            set_element(state_dict, paths[name], own)

    def _value(self, name: str, pickled: bytes) -> Any:
        try:
            if pickled not in self._loaded:
                stream = io.BytesIO(pickled)
                self._loaded[pickled] = torch.load(stream, weights_only=not self._runs_pickles)
        except pickle.UnpicklingError as error:
            raise IntegrityError(
                f"{name} holds a pickle that is more than plain values; it was not run",
                self._where,
                "storage was not changed; the model may hold some of the step's tensors",
                f"exclude its part from loading: LoadConfig(exclude=({name.partition('.')[0]!r},))",
            ) from error
        return self._loaded[pickled]


def _cannot_change(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_cannot_change, cast(tuple[Any, ...], value)))
    return value is None or type(value) in (bool, int, float, complex, str, bytes)
