"""One row a weight: its name and layout there, its place and layout here.

A row serves both directions: ``pattern`` is an einops expression from the checkpoint's layout to
ours, and reading it from right to left gives the way back.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import einops
import jax
import numpy as np

from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of the checkpoint and where it goes.

    ``name``: in the checkpoint, ``{l}`` standing for the layer. ``pattern``: their layout → ours,
    with axes ``d h k c f v t`` as everywhere; a fused tensor splits into ``paths`` along a first
    axis ``n``. ``paths``: in our tree, of a block where ``name`` has ``{l}``. A row whose path the
    model lacks (a bias, an untied head) is left out.
    """

    name: str
    pattern: str
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """One tensor of a given model: ``paths`` in its flat tree, ``index`` in the stack or None."""

    name: str
    pattern: str
    paths: tuple[str, ...]
    index: int | None
    shape: tuple[int, ...]  # in the checkpoint


def flat(model: Decoder) -> dict[str, jax.Array]:
    """Path → parameter, e.g. ``blocks/0/mixer/query/weight``."""
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in leaves
    }


def targets(rows: tuple[Row, ...], config: DecoderConfig, parameters: Mapping) -> list[Target]:
    """Every tensor of the checkpoint of a model with ``config``.

    Raises:
      ConfigError: a parameter that no row names: the family cannot hold this model.
    """
    found = list(_targets(rows, config, parameters))
    named = {path for target in found for path in target.paths}
    for path in parameters:
        if path not in named:
            raise ConfigError(f"parameter {path}: this family has no place for it")
    return found


def sizes(config: DecoderConfig) -> dict[str, int]:
    """Letter → size, of the letters that patterns may group."""
    attention = config.part("attention")
    return {
        "h": attention.num_heads,
        "k": attention.kv_heads,
        "c": attention.channels(config.width),
    }


def forth(pattern: str, x: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """``x`` from the checkpoint's layout to ours."""
    return einops.rearrange(x, pattern, **_used(pattern, config))


def back(pattern: str, x: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """``x`` from our layout to the checkpoint's."""
    left, right = pattern.split("->")
    return einops.rearrange(x, f"{right} -> {left}", **_used(pattern, config))


def _used(pattern: str, config: DecoderConfig) -> dict[str, int]:
    return {
        letter: size
        for letter, size in sizes(config).items()
        if letter in pattern.split() or f"({letter}" in pattern or f"{letter})" in pattern
    }


def _targets(rows, config, parameters) -> Iterator[Target]:
    period = len(config.pattern)
    for row in rows:
        for layer in range(config.num_layers) if "{l}" in row.name else (None,):
            prefix = "" if layer is None else f"blocks/{layer % period}/"
            paths = tuple(prefix + path for path in row.paths)
            if not all(path in parameters for path in paths):
                continue
            index = None if layer is None else layer // period
            stacked = 0 if layer is None else 1
            ours = [parameters[path].shape[stacked:] for path in paths]
            shape = ours[0] if len(paths) == 1 else (len(paths), *ours[0])
            # a view of nothing: only the shape is wanted
            shape = back(row.pattern, np.broadcast_to(np.zeros(()), shape), config).shape
            yield Target(row.name.format(l=layer), row.pattern, paths, index, shape)
