"""The whole life of a checkpoint on a Ray cluster: save, verify, export, publish, resume, purge.

Importing this package imports neither torch nor ray; the first use of a name below imports what
that name needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_ckpt.core.errors import RayCkptError
    from ray_ckpt.core.loading import FromScratch, FromSources, FromWeights, LoadConfig, Source
    from ray_ckpt.core.policy import LifecyclePolicy
    from ray_ckpt.core.saving import Everything, HuggingFace, ModelOnly, SaveConfig
    from ray_ckpt.tensors.adapters import StateDictAdapter
    from ray_ckpt.tensors.converters import ModelConverter
    from ray_ckpt.tensors.logits import Reference
    from ray_ckpt.tensors.manager import CheckpointManager
    from ray_ckpt.tensors.model_wrapper import ModelWrapper, StateDictMode
    from ray_ckpt.tensors.run import HfAssets, Run
    from ray_ckpt.tensors.states import TrainingState
    from ray_ckpt.tensors.transforms import StateDictTransforms

__all__ = [
    "CheckpointManager",
    "Everything",
    "FromScratch",
    "FromSources",
    "FromWeights",
    "HfAssets",
    "HuggingFace",
    "LifecyclePolicy",
    "LoadConfig",
    "ModelConverter",
    "ModelOnly",
    "ModelWrapper",
    "RayCkptError",
    "Reference",
    "Run",
    "SaveConfig",
    "Source",
    "StateDictAdapter",
    "StateDictMode",
    "StateDictTransforms",
    "TrainingState",
]

_HOME = {
    "CheckpointManager": "ray_ckpt.tensors.manager",
    "Everything": "ray_ckpt.core.saving",
    "FromScratch": "ray_ckpt.core.loading",
    "FromSources": "ray_ckpt.core.loading",
    "FromWeights": "ray_ckpt.core.loading",
    "HfAssets": "ray_ckpt.tensors.run",
    "HuggingFace": "ray_ckpt.core.saving",
    "LifecyclePolicy": "ray_ckpt.core.policy",
    "LoadConfig": "ray_ckpt.core.loading",
    "ModelConverter": "ray_ckpt.tensors.converters",
    "ModelOnly": "ray_ckpt.core.saving",
    "ModelWrapper": "ray_ckpt.tensors.model_wrapper",
    "RayCkptError": "ray_ckpt.core.errors",
    "Reference": "ray_ckpt.tensors.logits",
    "Run": "ray_ckpt.tensors.run",
    "SaveConfig": "ray_ckpt.core.saving",
    "Source": "ray_ckpt.core.loading",
    "StateDictAdapter": "ray_ckpt.tensors.adapters",
    "StateDictMode": "ray_ckpt.tensors.model_wrapper",
    "StateDictTransforms": "ray_ckpt.tensors.transforms",
    "TrainingState": "ray_ckpt.tensors.states",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ray_ckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
