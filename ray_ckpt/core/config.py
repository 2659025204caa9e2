"""Configuration: frozen dataclasses, built from a plain mapping and refused early.

Any dataclass will do: every key of the mapping must be a field, every value must have the field's
type, and a class may refuse combinations by raising ConfigError in `__post_init__`. Reads no file
and no environment: the text of a TOML file and the overrides come in as arguments.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.names import is_word

Config = TypeVar("Config")
Dtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["safetensors", "torch"]
Device = Literal["cpu", "cuda"]
MAX_SHARD_BYTES = 5_000_000_000
"""Of one file of weights, unless somebody asks for another size."""


def load_toml(
    config_type: type[Config], text: str, *, where: str, overrides: Sequence[str] = ()
) -> Config:
    """`config_type` from the TOML in `text` with `section.field=value` overrides on top.

    Raises:
        ConfigError: no TOML, an unknown key, a value of the wrong type or one that is refused.
    """
    document = parse_toml(text, where=where)
    for override in overrides:
        _apply_override(document, override)
    return build(config_type, document, where=where)


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The TOML in `text` as a plain mapping.

    Raises:
        ConfigError: no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"not valid TOML: {error}",
            where,
            "nothing was begun",
            "mend that line: text stands in quotes, a table begins with its [name]",
        ) from error


def build(config_type: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """`config_type` with `values` as fields; nested dataclasses and tuples of them included.

    Raises:
        ConfigError: naming the field, what was expected and what was given.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, config_type))}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {key!r}", where, do=hint)
    for name, field in fields.items():
        if name not in values and _is_required(field):
            raise ConfigError(f"{name!r} is missing", where, do=f"add {name} = ...")
    hints = typing.get_type_hints(config_type)
    return config_type(
        **{
            key: _convert(hints[key], value, where=f"{where}: {key}")
            for key, value in values.items()
        }
    )


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(expected: Any, value: Any, *, where: str) -> Any:
    origin = get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in get_args(expected) if option is not type(None)]
        if value is None:
            return None
        return _convert(_chosen(options, value, where), value, where=where)
    if origin is Literal:
        return _one_of(get_args(expected), value, where=where)
    if origin is tuple and isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return tuple(
            _convert(get_args(expected)[0], v, where=f"{where}[{i}]") for i, v in enumerate(items)
        )
    if origin is Mapping and isinstance(value, Mapping):
        return _mapping(get_args(expected)[1], cast(Mapping[Any, Any], value), where=where)
    if dataclasses.is_dataclass(expected) and type(value) is expected:
        return value
    if dataclasses.is_dataclass(expected) and isinstance(value, Mapping):
        return build(cast(type[Any], expected), cast(Mapping[str, Any], value), where=where)
    return _scalar(expected, value, where=where)


def _mapping(expected: Any, values: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    return {
        _scalar(str, key, where=where): _convert(expected, value, where=f"{where}.{key}")
        for key, value in values.items()
    }


def _chosen(options: Sequence[Any], value: Any, where: str) -> Any:
    """The one option, or the dataclass among several whose `kind` the value names."""
    if len(options) == 1:
        return options[0]
    for option in options:
        if type(value) is option:
            return option
    kinds = {get_args(typing.get_type_hints(option)["kind"])[0]: option for option in options}
    kind = cast(Mapping[str, Any], value).get("kind") if isinstance(value, Mapping) else value
    if kind not in kinds:
        raise ConfigError(f"kind is {kind!r}, none of {', '.join(map(repr, kinds))}", where)
    return kinds[kind]


def _one_of(options: Sequence[Any], value: Any, *, where: str) -> Any:
    if value not in options:
        raise ConfigError(f"{value!r} is none of {', '.join(map(repr, options))}", where)
    return value


def _scalar(expected: Any, value: Any, *, where: str) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(expected, type) or type(value) is not expected:
        wanted = getattr(expected, "__name__", str(expected))
        raise ConfigError(f"expected {wanted}, got {type(value).__name__} {value!r}", where)
    if isinstance(value, float) and math.isnan(value):  # it would pass every comparison
        raise ConfigError("expected float, got nan", where)
    return value


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is no override", do="write section.field=value")
    *parents, leaf = path.split(".")
    section = document
    for parent in parents:
        inner = section.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{parent!r} is a value, not a section", override)
        section = cast(dict[str, Any], inner)
    section[leaf] = _override_value(text)


def _override_value(text: str) -> Any:
    """A TOML value if `text` is one, else `text` itself, so that plain words need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def at_least(minimum: float, **fields: float | None) -> None:
    """Nothing, if every field that is set is at least `minimum`; else a ConfigError names it."""
    for name, value in fields.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {value}", name)


def a_word(field: str, value: str) -> None:
    """Nothing, if `value` can be part of a folder name; else a ConfigError names the field."""
    if not is_word(value):
        raise ConfigError(
            f"{value!r} cannot be part of a folder name",
            field,
            do="use letters, digits, '.', '_' and '-'",
        )
