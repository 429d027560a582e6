"""Typed assignment to a `ConfigDict`: ``a.b=z`` from a command line, or an arm's values."""

import ast
from typing import Any

from ml_collections import ConfigDict

from layers.config import ConfigError
from pallas_kernels.names import did_you_mean, suggest
from research.ablation.parts import declared_type, is_optional


def assign(config: ConfigDict, field: str, value: Any) -> None:
    """Set the existing dotted ``field`` of ``config``. The type is kept; a None field takes any.

    Raises:
      ConfigError: no such field (the nearest one is suggested), or ``value`` has another type.
    """
    parent, name = _find(config, field)
    if isinstance(value, dict):
        value = ConfigDict(value)
    if isinstance(parent[name], bool) != isinstance(value, bool) and parent[name] is not None:
        raise ConfigError(_mismatch(field, value, parent[name]))
    try:
        parent[name] = value
    except (TypeError, ValueError):
        raise ConfigError(_mismatch(field, value, parent[name])) from None


def assign_text(config: ConfigDict, text: str) -> str:
    """Apply ``field=value`` from a command line; the type is that of the field's current value.

    Numbers, ``true``/``false``, ``None`` and tuples are written as in Python. A text field takes
    the text as it is. A tuple field also takes a single item, and items with commas between them. A
    None field takes any of these. A field of a language model that may be None takes ``None``.

    Returns:
      The field's name.

    Raises:
      ConfigError: no ``=``, no such field, a group of fields, or a value of another type.
    """
    field, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text}: write an override as --config.field=value")
    parent, name = _find(config, field)
    if value == "None" and is_optional(declared_type(config, field)):
        with parent.unlocked():
            parent[name] = None
        return field
    assign(config, field, _parse(field, value, parent[name]))
    return field


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field → value of a nested mapping; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (dict, ConfigDict)) and len(value):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _find(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    node: Any = config
    *parents, name = field.split(".")
    for depth, part in enumerate((*parents, name)):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"{field}: {'.'.join(parents[:depth])} has no fields")
        if part not in node:
            suggestion = did_you_mean(part, node) or did_you_mean(field, flatten(config))
            raise ConfigError(f"{field}: no such field; {suggestion or suggest(part, node)}")
        if depth < len(parents):
            node = node[part]
    return node, name


def _parse(field: str, text: str, current: Any) -> Any:
    if isinstance(current, ConfigDict):
        raise ConfigError(f"{field}={text}: a group; set one of its fields: {', '.join(current)}")
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # of `literal_eval`
        value = text
    if isinstance(current, (tuple, list)):
        if isinstance(value, str) and value == text:  # not written as in Python: a,b
            return tuple(filter(None, (item.strip() for item in text.split(","))))
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    expected = {bool: bool, int: int, float: (int, float)}.get(type(current), object)
    if not isinstance(value, expected):
        raise ConfigError(_mismatch(field, value, current))
    return value


def _mismatch(field: str, value: Any, current: Any) -> str:
    return f"{field}={value!r}: must be {type(current).__name__}, like {current!r}"
