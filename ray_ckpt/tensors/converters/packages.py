"""Packages that only some converters need, imported when one of these changes a model."""

import importlib
from types import ModuleType

from ray_ckpt.core.errors import ConfigError


def torchao(module: str, *, converter: str) -> ModuleType:
    """`torchao.<module>`.

    Raises:
        ConfigError: torchao is not installed, or too old to have it.
    """
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise ConfigError(
            f"{converter} computes with torchao, which cannot be imported: {error}",
            f"converters.{converter}",
            "the model was not changed; exports do not need torchao",
            "pip install 'ray_ckpt[torchao]'",
        ) from error
