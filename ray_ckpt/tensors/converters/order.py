"""In which order converters may change one model. The transforms of an export go backwards.

    float8, qat      what a linear layer computes with
      lora           low-rank layers beside it, which stay in high precision
        ema          averages of whatever is trained then

Knows names only. A converter that is not in the list may stand anywhere.
"""

from torch import nn

from ray_ckpt.core.errors import ConfigError

ORDER = ("float8", "qat", "lora", "ema")

_MARK = "_ray_ckpt_converters"


def refuse_late(model: nn.Module, name: str) -> None:
    """Returns if the converter `name` may change the model now.

    Raises:
        ConfigError: it has done so before, or one that must come later has.
    """
    late = [other for other in _done(model) if ORDER.index(other) >= ORDER.index(name)]
    if late:
        raise ConfigError(
            f"{name} cannot convert a model that {', '.join(late)} has converted",
            "converters",
            "the model was not changed by this call",
            f"convert once each, in this order: {', '.join(ORDER)}",
        )


def enter(model: nn.Module, name: str) -> None:
    """The model remembers that the converter `name` has changed it."""
    setattr(model, _MARK, [*_done(model), name])


def _done(model: nn.Module) -> list[str]:
    return getattr(model, _MARK, [])
