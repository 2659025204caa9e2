"""What `import ray_ckpt` loads, and what it offers."""

import importlib.metadata
import subprocess
import sys

import pytest

import ray_ckpt
from ray_ckpt.core.version import __version__

PUBLIC = [
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
LIGHT_IMPORTS = """
import sys
import ray_ckpt, ray_ckpt.core.config, ray_ckpt.storage.backends
ray_ckpt.SaveConfig, ray_ckpt.LifecyclePolicy, ray_ckpt.RayCkptError
print(sorted({"torch", "ray", "s3fs", "huggingface_hub"} & set(sys.modules)))
"""


def test_the_public_names_are_these() -> None:
    assert ray_ckpt.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ray_ckpt, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CheckpointManger'"):
        _ = ray_ckpt.CheckpointManger


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_IMPORTS], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_what_was_installed_says_the_version_of_its_source() -> None:
    assert importlib.metadata.version("ray_ckpt") == __version__
