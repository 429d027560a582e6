"""The parts of a language model's configuration and the dataclass of each."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from layers.config import from_mapping
from layers.decoder import DecoderConfig
from research.data import DataConfig
from research.parallel import MeshConfig
from research.training import TrainingConfig

PARTS: Mapping[str, Any] = {
    "model": DecoderConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "mesh": MeshConfig,
}


def check_parts(config: Any) -> None:
    """Raise `ConfigError` for a value that the dataclass of a part of ``config`` refuses."""
    for name, part in _parts(config):
        from_mapping(part, config[name], name)


def declared_type(config: Any, field: str) -> Any:
    """The declared type of the dotted ``field`` of ``config``; `Any` if it is in no part."""
    part, *names = field.split(".")
    declared = dict(_parts(config)).get(part, Any)
    for name in names:
        options = [declared, *typing.get_args(declared)]
        group = next((option for option in options if dataclasses.is_dataclass(option)), None)
        hints = {} if group is None else typing.get_type_hints(group)
        declared = hints.get(name, Any)
    return declared


def is_optional(declared: Any) -> bool:
    """Whether the type ``declared`` allows None."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return union and type(None) in typing.get_args(declared)


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """Name and dataclass of the parts of ``config``: groups with all fields of the dataclass."""
    for name, part in PARTS.items():
        fields = {field.name for field in dataclasses.fields(part)}
        if name in config and hasattr(config[name], "keys") and set(config[name]) == fields:
            yield name, part
