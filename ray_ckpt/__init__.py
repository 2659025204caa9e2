"""The whole life of a checkpoint on a Ray cluster: save, verify, export, publish, resume, purge.

Importing this package imports neither torch nor ray; the first use of a name below imports what
that name needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_ckpt.core.config import LifecyclePolicy, SaveConfig
    from ray_ckpt.core.errors import RayCkptError
    from ray_ckpt.tensors.adapters import StateDictAdapter
    from ray_ckpt.tensors.converters import ModelConverter
    from ray_ckpt.tensors.manager import CheckpointManager, HfAssets, Run
    from ray_ckpt.tensors.model_wrapper import ModelWrapper, StateDictMode
    from ray_ckpt.tensors.states import TrainingState
    from ray_ckpt.tensors.transforms import StateDictTransforms

__all__ = [
    "CheckpointManager",
    "HfAssets",
    "LifecyclePolicy",
    "ModelConverter",
    "ModelWrapper",
    "RayCkptError",
    "Run",
    "SaveConfig",
    "StateDictAdapter",
    "StateDictMode",
    "StateDictTransforms",
    "TrainingState",
]

_HOME = {
    "CheckpointManager": "ray_ckpt.tensors.manager",
    "HfAssets": "ray_ckpt.tensors.manager",
    "LifecyclePolicy": "ray_ckpt.core.config",
    "ModelConverter": "ray_ckpt.tensors.converters",
    "ModelWrapper": "ray_ckpt.tensors.model_wrapper",
    "RayCkptError": "ray_ckpt.core.errors",
    "Run": "ray_ckpt.tensors.manager",
    "SaveConfig": "ray_ckpt.core.config",
    "StateDictAdapter": "ray_ckpt.tensors.adapters",
    "StateDictMode": "ray_ckpt.tensors.model_wrapper",
    "StateDictTransforms": "ray_ckpt.tensors.transforms",
    "TrainingState": "ray_ckpt.tensors.states",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ray_ckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
