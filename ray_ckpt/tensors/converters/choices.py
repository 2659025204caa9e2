"""What converters ask of their options, and the one way they refuse."""

from collections.abc import Sequence

from ray_ckpt.core.errors import ConfigError


def one_of(field: str, value: object, known: Sequence[str]) -> None:
    """Raises ConfigError unless `value` is one of `known`; `field` says where: `lora.flavor`."""
    if value not in known:
        raise ConfigError(f"{field} is {value!r}", field, do=f"choose one of: {', '.join(known)}")


def positive(field: str, value: float) -> None:
    """Raises ConfigError unless `value` is more than zero."""
    if not value > 0:
        raise ConfigError(f"{field} must be more than 0, got {value!r}", field)


def patterns(field: str, value: Sequence[str]) -> tuple[str, ...]:
    """`value`, a list in JSON; ConfigError for a single string, which is a sequence of letters."""
    if isinstance(value, str) or not value:
        raise ConfigError(f"{field} is {value!r}", field, do=f"give a list: [{value!r}]")
    return tuple(value)
