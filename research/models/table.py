"""One row a weight: its name and layout there, its place and layout here.

A row serves both directions: ``pattern`` is an einops expression from the checkpoint's layout to
ours, and reading it from right to left gives the way back.
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
    """A tensor of the checkpoint and where it goes.

    ``name``: in the checkpoint, ``{l}`` standing for the layer and ``{e}`` for the expert.
    ``pattern``: their layout → ours, with axes ``d h k c f v t`` as everywhere. ``paths``: in our
    tree, of a block where ``name`` has ``{l}``; the parts of a fused tensor follow one another
    along axis ``join`` of our layout, and may differ in size there. A row whose path the model
    lacks (a bias, an untied head) is left out.
    """

    name: str
    pattern: str
    paths: tuple[str, ...]
    join: int = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """A row's tensor in a given model: ``paths`` in its flat tree, ``index`` in their first axes.

    Those are the repeats of the stack and, for an expert's tensor, the experts; nothing is indexed
    where the tensor is all of the parameter. ``sizes`` are those of its parts along the axis that
    joins them.
    """

    name: str
    row: Row
    paths: tuple[str, ...]
    index: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]  # in the checkpoint


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
    if (attention := config.attention) is not None:
        return {
            "h": attention.num_heads,
            "k": attention.kv_heads,
            "c": attention.channels(config.width),
        }
    if config.latent is not None:
        # a head's channels differ from map to map
        return {"h": config.latent.num_heads}
    return {"c": config.part("rwkv").head_dim} if "rwkv7" in config.pattern else {}


def from_theirs(target: Target, x: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    """``x`` of the checkpoint as the parts that go to ``target.paths``."""
    pattern = target.row.pattern
    ours = einops.rearrange(x, pattern, **_used(pattern, config))
    return np.split(ours, np.cumsum(target.sizes)[:-1], axis=target.row.join)


def to_theirs(row: Row, parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    """``parts`` of ours as the one tensor of the checkpoint."""
    ours = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=row.join)
    left, right = row.pattern.split("->")
    return einops.rearrange(ours, f"{right} -> {left}", **_used(row.pattern, config))


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
                each = tuple(part[row.join] for part in (shape, *others))
                # a view of nothing: only the shape is wanted
                whole = (*shape[: row.join], sum(each), *shape[row.join + 1 :])
                empty = np.broadcast_to(np.zeros(()), whole)
                shape = to_theirs(row, [empty], config).shape
                yield Target(row.name.format(l=layer, e=expert), row, paths, index, each, shape)
