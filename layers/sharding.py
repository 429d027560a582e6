"""Logical axis names on arrays, turned into mesh axes by whatever rules are in force.

Layers name axes (``"batch"``, ``"heads"``, …) and never see a mesh. The table that maps names to
mesh axes lives in `research.parallel.rules`, which puts it in force with Flax's
`logical_axis_rules`; without rules every function here is the identity, so a single device pays
nothing.

Weights rest sharded over ``fsdp`` and are *computed with* gathered: `gather` is that all-gather,
and its transpose is the reduce-scatter of the gradient (ZeRO-3, Rajbhandari 2020, §5.3).
"""

from collections.abc import Callable

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


def island(function: Callable, arguments: tuple, axes: tuple, out_axes: tuple | list[tuple]):
    """``function(*arguments)``, each device with its own share of every argument.

    For what explicit sharding cannot follow: kernels, sorts, scatters. ``axes`` are the logical
    axes of each argument (those of None arguments are not looked at), ``out_axes`` of the result, a
    list of them where the function returns a tuple. Other devices' shares are had by collectives
    over a `mesh_axis` alone.
    """
    if spec() is None:
        return function(*arguments)
    several = isinstance(out_axes, list)
    out_spec = tuple(spec(*axes) for axes in out_axes) if several else spec(*out_axes)
    given = [i for i, a in enumerate(arguments) if a is not None]

    def local(*shares):
        every: list = [None] * len(arguments)
        for i, share in zip(given, shares, strict=True):
            every[i] = share
        return function(*every)

    run = jax.shard_map(
        local, in_specs=tuple(spec(*axes[i]) for i in given), out_specs=out_spec, check_vma=False
    )
    return run(*(place(arguments[i], *axes[i]) for i in given))


def mesh_axis(axis: str) -> str | tuple[str, ...] | None:
    """The mesh axis that splits the logical ``axis``, for collectives inside an `island`."""
    found = spec(axis)
    return None if found is None else found[0]
