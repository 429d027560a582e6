"""Logical axis names on arrays, turned into mesh axes by whatever rules are in force.

Layers name axes (``"batch"``, ``"heads"``, …) and never see a mesh. The table that maps names to
mesh axes lives in `research.parallel.rules`, which puts it in force with Flax's
`logical_axis_rules`; without rules every function here is the identity, so a single device pays
nothing.

Weights rest sharded over ``fsdp`` and are *computed with* gathered: `gather` is that all-gather,
and its transpose is the reduce-scatter of the gradient (ZeRO-3, Rajbhandari 2020, §5.3).
"""

import jax
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec


def spec(*axes: str | None) -> PartitionSpec | None:
    """Mesh axes for the logical ``axes`` of one array, or None when no rules are in force."""
    rules = dict(get_logical_axis_rules())
    if not rules:
        return None
    return PartitionSpec(*(None if axis is None else rules.get(axis) for axis in axes))


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` resharded so that its dimensions lie as the logical ``axes`` say; values unchanged."""
    target = spec(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight in the layout it is multiplied in: ``tensor`` sharding kept, ``fsdp`` gathered."""
    return place(weight, *axes)
