"""Configurations: frozen dataclasses that are made from mappings and check their fields.

The ``__post_init__`` of every configuration calls `check`. Only `from_mapping` makes dataclasses
from ``ml_collections`` values or parsed JSON; it reports unknown names and wrong types, in one
form, before anything compiles.
"""

import dataclasses
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
        raise ConfigError(f"{field}={value!r}: {allowed}")


def check_choice(field: str, value: Any, choices: typing.Iterable[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``; suggests a similar one."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{field}={value!r}: must be {one_of(value, choices)}")


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
    hints = typing.get_type_hints(cls)
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
    """``value`` as type ``hint`` (converts int → float and list → tuple), or a `ConfigError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, path)
            except ConfigError:
                continue
        if len(options) == 1:
            return _convert(options[0], value, path)
        try:
            return _convert(options[-1], value, path)
        except ConfigError:
            raise ConfigError(f"{path}={value!r}: must be {_spell(hint)}") from None
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_mapping(hint, value, path)  # type: ignore[type-var]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}: must be a list")
        item = args[0] if args else Any
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is Any:
        return dict(value) if origin in (dict, Mapping) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    # in Python a bool is an int, but `steps=True` is a mistake
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{path}={value!r}: must be {_spell(hint)}, not {type(value).__name__}")
    return value


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
