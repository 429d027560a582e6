"""Configurations: frozen dataclasses that are made from mappings and check their fields.

The ``__post_init__`` of every configuration calls `check_types`, then `check`. Only `from_mapping`
makes dataclasses from ``ml_collections`` values or parsed JSON; it reports unknown and missing
names. Errors have one form and are raised before anything compiles.
"""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pallas_kernels.names import one_of, suggest

T = TypeVar("T")

# Metadata of the fields that do not decide which function a model computes.
EXECUTION = {"decides": "execution"}  # execution-only: may change when a run is resumed
PRECISION = {"decides": "precision"}  # dtypes
TRAINING = {"decides": "training"}  # initial values, and losses that only training has

_LARGEST_FLOAT = int(sys.float_info.max)
_LONGEST = 1_000  # characters of a value in a message


def decides(config: Any, *kinds: Mapping[str, str]) -> Iterator[str]:
    """Dotted names of the fields of ``config``, a dataclass, whose metadata is one of ``kinds``."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if any(field.metadata.get("decides") == kind["decides"] for kind in kinds):
            yield field.name
        elif dataclasses.is_dataclass(value):
            yield from (f"{field.name}.{name}" for name in decides(value, *kinds))


class ConfigError(ValueError):
    """A value of a configuration is not allowed; the message is one line that names the field."""


def check(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raise `ConfigError`, ``field=value: allowed``, unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{field}={_shown(value)}: {allowed}")


def _shown(value: Any) -> str:
    """``repr(value)``, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def check_choice(field: str, value: Any, choices: typing.Iterable[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``; suggests a similar one."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{field}={value!r}: must be {one_of(value, choices)}")


def check_types(config: Any) -> None:
    """Raise `ConfigError` unless every field of ``config`` has a value of its annotated type.

    ``config``: a frozen dataclass, in its ``__post_init__``. An int in a float field becomes a
    float, a list a tuple and a mapping the annotated dataclass. A bool is not an int here, floats
    are finite, and integers have at most 64 bits.
    """
    for name, hint in _hints(type(config)).items():
        object.__setattr__(config, name, _convert(hint, getattr(config, name), name))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The name of each field of a dataclass → its annotated type."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def from_mapping(cls: type[T], mapping: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass ``cls`` from ``mapping``, recursing into nested dataclasses.

    Args:
      cls: a dataclass type.
      mapping: field name → value; a `ml_collections.ConfigDict` is fine. Lists become tuples.
      path: dotted prefix used in error messages, e.g. ``"model"``.

    Raises:
      ConfigError: unknown field, missing field, wrong type, or a value that ``cls`` does not allow.
    """
    prefix = f"{path}." if path else ""
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        raise ConfigError(f"{path or cls.__name__}={mapping!r}: must be a mapping of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _hints(cls)
    values = {}
    for name, value in mapping.items():
        if name not in fields:
            raise ConfigError(f"{prefix}{name}={value!r}: no such field; {suggest(name, fields)}")
        values[name] = _convert(hints[name], value, prefix + name)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{prefix}{name}: required, of type {_spell(hints[name])}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as type ``hint`` (see `check_types`), or a `ConfigError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        if value is None and len(options) < len(args):
            return None
        if len(options) == 1:
            return _convert(options[0], value, path)
        for option in options:
            try:
                return _convert(option, value, path)
            except ConfigError:
                continue
        raise _wrong_type(hint, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_mapping(hint, value, path)  # type: ignore[type-var]
    if hint is Any:
        return value
    if origin is tuple:
        check(isinstance(value, (list, tuple)), path, value, "must be a list")
        if args[-1] is not Ellipsis:
            check(len(value) == len(args), path, value, f"must hold {len(args)} values")
            pairs = enumerate(zip(args, value, strict=True))
            return tuple(_convert(arg, v, f"{path}[{i}]") for i, (arg, v) in pairs)
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        check(hasattr(value, "items"), path, value, "must be a mapping")
        return dict(value)
    is_bool = isinstance(value, bool)  # in Python a bool is an int, but `steps=True` is a mistake
    if hint is float and isinstance(value, (int, float)) and not is_bool:
        check(abs(value) <= _LARGEST_FLOAT, path, value, "must be a finite number")
        return float(value)
    if not isinstance(value, origin or hint) or (is_bool and hint is not bool):
        raise _wrong_type(hint, value, path)
    if hint is int:
        check(-(2**63) <= value < 2**63, path, value, "must be an integer of at most 64 bits")
    return value


def _wrong_type(hint: Any, value: Any, path: str) -> ConfigError:
    return ConfigError(
        f"{path}={value!r}: must be of type {_spell(hint)}, not {type(value).__name__}"
    )


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
