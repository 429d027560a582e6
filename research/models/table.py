"""One row per tensor: its name and layout in the checkpoint, its path and layout in the Decoder.

A row is used in both directions: ``pattern`` is an einops expression from the checkpoint's layout
to the Decoder's; from right to left it is the inverse.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import einops
import numpy as np

from layers.config import ConfigError
from layers.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of the checkpoint and its parameters in the Decoder.

    Attributes:
      name: the name in the checkpoint; ``{l}`` is the layer, ``{e}`` the expert.
      pattern: the checkpoint's layout → the Decoder's, with axes ``d h k c f v t`` as everywhere.
      paths: in the Decoder's tree, or in a layer's if ``name`` has ``{l}``. A row is left out if
        the model lacks a path (a bias, an untied head).
      join: the axis of the Decoder's layout along which the parts of a fused tensor are
        concatenated; they may differ in size there.
    """

    name: str
    pattern: str
    paths: tuple[str, ...]
    join: int = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """A row's tensor in a given model.

    Attributes:
      name: the name in the checkpoint, with the layer and the expert.
      paths: in the model's flat tree.
      index: of the tensor in the first axes of its parameters: the repeat of the stack and, for an
        expert's tensor, the expert; empty if the tensor is the whole parameter.
      sizes: of the parts along the axis that joins them.
      shape: of the tensor in the checkpoint.
    """

    name: str
    row: Row
    paths: tuple[str, ...]
    index: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


def targets(rows: tuple[Row, ...], config: DecoderConfig, parameters: Mapping) -> list[Target]:
    """All tensors of the checkpoint of a model with ``config``.

    Raises:
      ConfigError: no row names a parameter: the family does not support this model.
    """
    result = list(_targets(rows, config, parameters))
    named = {path for target in result for path in target.paths}
    for path in parameters:
        if path not in named:
            raise ConfigError(f"parameter {path}: must be in a row of the family")
    return result


def sizes(config: DecoderConfig) -> dict[str, int]:
    """Axis letter → size, for the letters that patterns may group."""
    if (attention := config.attention) is not None:
        return {
            "h": attention.num_heads,
            "k": attention.kv_heads,
            "c": attention.channels(config.width),
        }
    if config.latent is not None:
        # the channels of a head differ between the projections
        return {"h": config.latent.num_heads}
    return {"c": config.part("rwkv").head_dim} if "rwkv7" in config.pattern else {}


def from_theirs(target: Target, x: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    """The tensor ``x`` of the checkpoint, as one part for each of ``target.paths``."""
    pattern = target.row.pattern
    joined = einops.rearrange(x, pattern, **_used(pattern, config))
    return np.split(joined, np.cumsum(target.sizes)[:-1], axis=target.row.join)


def to_theirs(row: Row, parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    """The Decoder's ``parts`` as one tensor of the checkpoint."""
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=row.join)
    left, right = row.pattern.split("->")
    return einops.rearrange(joined, f"{right} -> {left}", **_used(row.pattern, config))


def _used(pattern: str, config: DecoderConfig) -> dict[str, int]:
    letters = re.findall("[a-z]", pattern)
    return {letter: size for letter, size in sizes(config).items() if letter in letters}


def _targets(rows, config, parameters) -> Iterator[Target]:
    experts = 0 if config.moe is None else config.moe.num_experts
    for row in rows:
        for layer in range(config.num_layers) if "{l}" in row.name else (None,):
            block, index = config.locate(layer or 0)
            prefix = "" if layer is None else f"blocks/{block}/"
            paths = tuple(prefix + path for path in row.paths)
            if not all(path in parameters for path in paths):
                continue
            repeat = () if layer is None or index is None else (index,)
            for expert in range(experts) if "{e}" in row.name else (None,):
                index = repeat if expert is None else (*repeat, expert)
                shape, *others = (parameters[path].shape[len(index) :] for path in paths)
                part_sizes = tuple(part[row.join] for part in (shape, *others))
                # an empty view: only its shape is used
                joined = (*shape[: row.join], sum(part_sizes), *shape[row.join + 1 :])
                empty = np.broadcast_to(np.zeros(()), joined)
                shape = to_theirs(row, [empty], config).shape
                yield Target(
                    row.name.format(l=layer, e=expert), row, paths, index, part_sizes, shape
                )
