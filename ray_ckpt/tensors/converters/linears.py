"""Which linear layers of a model a converter changes: patterns over their names.

layers.*.attention.w[qv]      shell patterns; "*" also stands for dots
*                             every linear layer
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ray_ckpt.core.errors import ConfigError

log = logging.getLogger("ray_ckpt")

_WEIGHT = ".weight"


def matches(module: str, patterns: Sequence[str]) -> bool:
    """Whether the module of this name is meant."""
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def find_linears(
    model: nn.Module, patterns: Sequence[str], *, converter: str
) -> dict[str, nn.Linear]:
    """Name to layer, for every linear layer that a pattern matches.

    A pattern that matches none is logged: another part of the model may have what it means.

    Raises:
        ConfigError: no pattern matches; names of layers that come near are listed.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {name: linear for name, linear in linears.items() if matches(name, patterns)}
    idle = [pattern for pattern in patterns if not any(matches(n, [pattern]) for n in linears)]
    if not found:
        raise ConfigError(
            f"no linear layer is called {' or '.join(patterns) or '(nothing)'}",
            f"{converter}.targets",
            "the model was not changed",
            f"write a pattern for these, for example: {', '.join(_near(patterns, linears))}",
        )
    if idle:
        log.warning("%s patterns match no layer of this part: %s", converter, ", ".join(idle))
    return found


def refuse_converted(linears: Mapping[str, nn.Linear], *, converter: str) -> None:
    """Raises ConfigError for a layer that is no plain `nn.Linear`, or that is the whole model."""
    other = [
        f"{name or 'the model itself'} ({type(linear).__name__})"
        for name, linear in linears.items()
        if type(linear) is not nn.Linear or not name
    ]
    if other:
        raise ConfigError(
            f"{converter} replaces plain linear layers inside a model, and these are others: "
            + ", ".join(other),
            f"{converter}.targets",
            "the model was not changed",
            "leave them out of the targets",
        )


def refuse_other_matches(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    patterns: Sequence[str],
    *,
    converter: str,
) -> None:
    """Raises ConfigError if patterns match a module that :func:`weights_of` takes for a layer.

    An export knows names and shapes only: an embedding looks like a linear layer there.
    """
    names = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    matrices = weights_of({n: model.get_parameter(n) for n in names}, patterns)
    other = sorted({key.removesuffix(_WEIGHT) for key in matrices} - set(linears))
    if other:
        raise ConfigError(
            f"{converter} patterns also match modules that are no linear layers: "
            + ", ".join(other),
            f"{converter}.targets",
            "the model was not changed",
            "write patterns that leave them out",
        )


def weights_of(state_dict: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Key to weight of the layers that patterns match: matrices [out, in]."""
    return {
        key: value
        for key, value in state_dict.items()
        if key.endswith(_WEIGHT)
        and value.dim() == 2
        and matches(key.removesuffix(_WEIGHT), patterns)
    }


def _near(patterns: Sequence[str], names: Mapping[str, object], *, limit: int = 5) -> list[str]:
    near = [n for p in patterns for n in difflib.get_close_matches(p, names, n=limit, cutoff=0.3)]
    return list(dict.fromkeys(near))[:limit] or list(names)[:limit]
