"""Compares the tensors of a checkpoint with those of a model, by their headers alone."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from layers.config import EXECUTION, PRECISION, TRAINING, ConfigError, check, decides
from layers.decoder import DecoderConfig
from research.models.families import Family
from research.models.fields import short
from research.models.table import Target

FLOATS = ("F64", "F32", "F16", "BF16")
# a tensor's name → its shape and dtype
Headers = Mapping[str, tuple[tuple[int, ...], str]]
# fields that are not the size of an array
_FREE = ("max_length", "window", "original_length", "length", "num_layers")


def canonical_names(names: Iterable[str], family: Family) -> dict[str, str]:
    """Name in the family's rows → name in the checkpoint.

    Checkpoints without a head lack the family's prefix, and some call a tensor by another name.
    Warns of a composite model's tensors that are left out.
    """
    canonical: dict[str, str] = {}
    for theirs in _of_text(names, family):
        name = family.renamed.get(theirs, theirs)
        beginning = next((part for part in family.nested if name.startswith(part)), "")
        name = family.nested.get(beginning, "") + name.removeprefix(beginning)
        if name != family.head and not name.startswith(family.prefix):
            name = family.prefix + name
        known = canonical.setdefault(name, theirs)
        if known != theirs:
            raise ConfigError(f"tensor={short(theirs)}: is in the checkpoint as {short(known)} too")
    return canonical


def _of_text(names: Iterable[str], family: Family) -> list[str]:
    """The names of a composite model's language model; warns of the others."""
    names = list(names)
    skipped = [name for name in names if name.startswith(family.skipped)]
    if skipped:
        of = [part for part in family.skipped if any(name.startswith(part) for name in skipped)]
        warnings.warn(
            f"{len(skipped)} tensors of {', '.join(of)} are not loaded: only the text part is",
            stacklevel=4,
        )
    return [name for name in names if not name.startswith(family.skipped)]


def check_sizes(config: DecoderConfig, family: Family, headers: Headers) -> None:
    """Check that the model is not larger than the checkpoint, before anything of it is made.

    Raises:
      ConfigError: the embedding has another shape, a layer or an expert is missing, or a size
        exceeds that of every tensor.
    """
    embedding = (config.vocab_size, config.width)
    check(family.embedding in headers, "tensor", family.embedding, "is missing from the checkpoint")
    _check_shape(family.embedding, headers, embedding)
    last = str(config.num_layers - 1)
    patterns = [_pattern(row.name, last, r"\d+") for row in family.rows if "{l}" in row.name]
    _check_any(patterns, headers, "num_layers", config.num_layers)
    if config.moe is not None and any("moe" in kinds for kinds in config.layers):
        expert = str(config.moe.num_experts - 1)
        patterns = [_pattern(row.name, r"\d+", expert) for row in family.rows if "{e}" in row.name]
        _check_any(patterns, headers, "moe.num_experts", config.moe.num_experts)
    largest = max(int(np.prod(shape, dtype=object)) for shape, _ in headers.values())
    skipped = {*decides(config, EXECUTION, PRECISION, TRAINING)}
    for field, value in _integers(config):
        if field not in skipped and field.rpartition(".")[2] not in _FREE:
            check(value <= largest, field, value, f"exceeds the {largest} of the largest tensor")


def _pattern(name: str, layer: str, expert: str) -> str:
    return re.escape(name).replace(r"\{l\}", layer).replace(r"\{e\}", expert)


def _check_any(patterns: list[str], headers: Headers, field: str, value: int) -> None:
    any_of = re.compile("|".join(patterns))
    exists = any(any_of.fullmatch(name) for name in headers)
    check(exists, field, value, f"must be their number in the checkpoint, which has no {value - 1}")


def _integers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted names and values of the integers in nested fields that are not their defaults."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _integers(value, f"{prefix}{field.name}.")
        elif isinstance(value, int) and value != field.default:
            yield prefix + field.name, value


def check_headers(
    headers: Headers, needed: Mapping[str, Target], family: Family, config: DecoderConfig
) -> None:
    """Check that all tensors of the model are there, in their shapes, and no unknown ones.

    Raises:
      ConfigError: names a tensor that is missing, unknown, or of a wrong shape or dtype.
    """
    for name, target in needed.items():
        exists = name in headers or name in family.absent
        check(exists, "tensor", name, "is missing from the checkpoint")
        if name in headers:
            _check_shape(name, headers, target.shape)
    for name in headers:
        known = name in needed or name.endswith(family.ignored)
        if config.tie_embeddings and name == family.head:
            # some checkpoints have a copy of the embedding as a tied head
            known = True
            _check_shape(name, headers, (config.vocab_size, config.width))
        known = known or _beyond(name, family, config.num_layers)
        if not known:
            requirement = f"is not part of a {family.architecture} with this config"
            raise ConfigError(f"tensor={short(name)}: {requirement}")


def _check_shape(name: str, headers: Headers, shape: tuple[int, ...]) -> None:
    actual, dtype = headers[name]
    if actual != shape:
        requirement = f"must have shape {list(shape)}"
        raise ConfigError(f"tensor {name}={short(list(actual))}: {requirement}")
    requirement = f"must be {', '.join(FLOATS)}; of quantised weights, only FP8 is supported"
    check(dtype in FLOATS, f"tensor {name}", dtype, requirement)


def _beyond(name: str, family: Family, num_layers: int) -> bool:
    if family.beyond is None or not name.startswith(family.beyond):
        return False
    number = name.removeprefix(family.beyond).split(".")[0]
    return number.isdecimal() and int(number) >= num_layers
