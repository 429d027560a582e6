"""Frozen dataclasses as configuration: built from plain mappings, validated field by field.

Every configuration in the house is a frozen dataclass whose ``__post_init__`` calls `check`.
`from_mapping` is the one door through which ``ml_collections`` values (or parsed JSON) become
dataclasses, so an unknown name or a wrong type is reported once, in one form, before any compile.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pallas_kernels.names import one_of, suggest

T = TypeVar("T")

# What a field of a configuration decides, where it is not what is computed: its metadata.
EXECUTION = {"decides": "execution"}  # how: may change from one start of a run to the next
PRECISION = {"decides": "precision"}  # in how many bits
TRAINING = {"decides": "training"}  # initial values and losses of training alone


def decides(config: Any, *kinds: Mapping[str, str]) -> Iterator[str]:
    """Dotted names of the fields of ``config``, a dataclass, whose metadata is one of ``kinds``."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if any(field.metadata.get("decides") == kind["decides"] for kind in kinds):
            yield field.name
        elif dataclasses.is_dataclass(value):
            yield from (f"{field.name}.{name}" for name in decides(value, *kinds))


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message is one line naming the field."""


def check(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raise `ConfigError` naming ``field``, ``value`` and what is ``allowed`` unless it holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: {allowed}")


def check_choice(field: str, value: Any, choices: typing.Iterable[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``; a near miss is suggested."""
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
      ConfigError: unknown field, missing field, wrong type, or a value ``cls`` refuses.
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
    """``value`` as ``hint`` asks (int → float and list → tuple only), or `ConfigError`."""
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
    # bool is an int to Python, but `steps=True` is a mistake
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{path}={value!r}: must be {_spell(hint)}, not {type(value).__name__}")
    return value


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
