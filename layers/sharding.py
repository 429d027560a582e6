"""Logical axis names on arrays, turned into mesh axes by whatever rules are in force.

Layers name axes (``"batch"``, ``"heads"``, …) and never see a mesh. The table that maps names to
mesh axes lives in `research.parallel.rules`, which puts it in force with Flax's
`logical_axis_rules`; without rules every function here is the identity, so a single device pays
nothing.

Weights rest sharded over ``fsdp`` and are *computed with* gathered: `gather` is that all-gather,
and its transpose is the reduce-scatter of the gradient (ZeRO-3, Rajbhandari 2020, §5.3).

A weight may also be *reduced* over the axes that split rows (`PartitionSpec`'s ``reduced``): each
device then keeps its own rows' share of the gradient, *unreduced*, and whoever differentiates sums
the shares when it likes. Products, lookups and islands can; for everything else `gather` takes the
mark away, and the gradient is summed on the spot.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec

from pallas_kernels.derivatives import differentiable

Axes = tuple[str | None, ...]  # logical names of an array's dimensions
ROWS = ("batch", "time")  # of a batch: what gradients of weights are summed over


def spec(*axes: str | None) -> PartitionSpec | None:
    """Mesh axes for the logical ``axes`` of one array, or None when no rules are in force."""
    rules = dict(get_logical_axis_rules())
    if not rules:
        return None
    return PartitionSpec(*(None if axis is None else rules.get(axis) for axis in axes))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` resharded so that its dimensions lie as the logical ``axes`` say; values unchanged."""
    target = spec(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(
    weight: jax.Array, axes: tuple[str | None, ...], *, rows: tuple[str | None, ...] | None = None
) -> jax.Array:
    """A weight in the layout it is multiplied in: ``tensor`` sharding kept, ``fsdp`` gathered.

    ``rows``: the logical axes that its gradient is summed over, if what it is used in can leave
    that sum to whoever differentiates.
    """
    target = spec(*axes)
    if target is None:
        return weight
    if jax.sharding.get_abstract_mesh().manual_axes:
        # inside a pipeline JAX cannot leave gradients unreduced
        return jax.sharding.reshard(weight, target)
    rest = axes_of(weight)
    gathered = named_axes(rest) - named_axes(target)
    if rows is None or not (rest.reduced or gathered):
        return jax.sharding.reshard(weight, target)
    # In two moves, so that the transpose is a reduce-scatter over what is gathered and a sum over
    # other rows of what is left, rather than a sum of everything.
    summed = named_axes(spec(*rows)) - named_axes(target)
    first = rest.reduced or summed - named_axes(rest)
    weight = jax.sharding.reshard(weight, PartitionSpec(*rest.partitions, reduced=first))
    return _reshard(weight, PartitionSpec(*target, reduced=summed))


def scatter(gradient: jax.Array, target: PartitionSpec) -> jax.Array:
    """``gradient`` resharded to ``target``: scattered, and what is left summed over other rows."""
    waiting = axes_of(gradient).unreduced
    if waiting > target.unreduced:
        first = waiting - named_axes(target)
        gradient = _reshard(gradient, PartitionSpec(*target.partitions, unreduced=first))
    return jax.sharding.reshard(gradient, target)


def all_but_gathered(primitive, *operands, **options) -> bool:
    """A policy of `jax.checkpoint`: keep everything but weights gathered to be computed with.

    They are no activations; the backward pass gathers them again (ZeRO-3).
    """
    if primitive.name == "reshard":
        return not options["dst_sharding"].spec.reduced
    # a cast or transposition of one; products have two operands
    return len(operands) != 1 or not operands[0].sharding.spec.reduced


def named_axes(axes: PartitionSpec | None) -> frozenset[str]:
    """The mesh axes that split something."""
    names: set[str] = set()
    for axis in () if axes is None else axes.partitions:
        names |= {axis} if isinstance(axis, str) else set(axis or ())
    return frozenset(names)


def broadcast_to(weight: jax.Array, x: jax.Array) -> jax.Array:
    """``weight``, of ``x``'s last dimensions, as something that multiplies or adds to ``x``.

    Where its gradient is to stay unreduced it becomes a product with ones, which XLA takes out
    again: products know how to be unreduced.
    """
    own = axes_of(weight)
    if not own.reduced:
        return weight
    where = axes_of(x).partitions
    rows = PartitionSpec(*where[: -weight.ndim])
    weight = jax.sharding.reshard(weight, PartitionSpec(*own.partitions, reduced=named_axes(rows)))
    ones = jax.sharding.reshard(jnp.ones(x.shape[: -weight.ndim], weight.dtype), rows)
    letters = "abcdefgh"[: x.ndim]
    first, last = letters[: -weight.ndim], letters[-weight.ndim :]
    return jnp.einsum(
        f"{first},{last}->{letters}", ones, weight, out_sharding=PartitionSpec(*where)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scattered:
    """A parameter whose gradient lies elsewhere: read it as ``[...]`` and get ``whole``.

    The gradient is scattered to the type of ``share``, whose values nobody looks at, where the
    parameter is read: a layer's when that layer is done (ZeRO-2, §5.2).
    """

    whole: jax.Array
    share: jax.Array

    def __getitem__(self, index) -> jax.Array:
        axes = axes_of(self.share)
        target = PartitionSpec(*axes.partitions, unreduced=axes.reduced)
        return _scattered(target)(self.whole, self.share)[index]


@functools.lru_cache(maxsize=256)
def _scattered(target: PartitionSpec):
    return differentiable(
        lambda whole, share: (whole, None),
        lambda arguments, saved, gradient: (None, scatter(gradient, target)),
        lambda whole, share: whole,
    )


def per_device(function: Callable, arguments: tuple, axes: tuple, out_axes: tuple | list[tuple]):
    """``function(*arguments)``, each device with its own share of every array.

    For what explicit sharding cannot follow: kernels, sorts, scatters. ``axes`` are the logical
    axes of each argument: a tuple of names for an array, and for a pytree the same pytree with such
    a tuple at each array (those of None are not looked at). ``out_axes``: of the result, a list of
    them where the function returns a tuple. Shares of other devices are reached by collectives over
    a `mesh_axis` alone.
    """
    if spec() is None:
        return function(*arguments)
    several = isinstance(out_axes, list)
    out_spec = tuple(spec(*axes) for axes in out_axes) if several else spec(*out_axes)
    arrays, structure = jax.tree.flatten(arguments, is_leaf=lambda a: a is None)
    names = structure.flatten_up_to(axes)
    given = [i for i, a in enumerate(arrays) if a is not None]
    # one copy a device along a dimension in front, so that the gradient is one as well
    copied = {i: tuple(sorted(axes_of(arrays[i]).reduced)) for i in given}

    def local(*shares):
        every: list = [None] * len(arrays)
        for i, share in zip(given, shares, strict=True):
            every[i] = share[0] if copied[i] else share
        return function(*jax.tree.unflatten(structure, every))

    def enter(i):
        target = spec(*names[i])
        assert target is not None
        if not copied[i]:
            return jax.sharding.reshard(arrays[i], target), target
        marked = PartitionSpec(*target, reduced=frozenset(copied[i]))
        share = jax.sharding.reshard(arrays[i], marked)
        target = PartitionSpec(copied[i], *target)
        return replicate(share, target), target

    entering, in_specs = zip(*map(enter, given), strict=True)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)  # a pipeline has taken the others
    run = jax.shard_map(
        local, in_specs=in_specs, out_specs=out_spec, axis_names=free, check_vma=False
    )
    return run(*entering)


def mesh_axis(axis: str) -> str | tuple[str, ...] | None:
    """The mesh axis that splits the logical ``axis``, for collectives inside `per_device`."""
    found = spec(axis)
    return None if found is None else found[0]


def axes_of(a: jax.Array) -> PartitionSpec:
    """The mesh axes of each dimension of ``a``, by its type."""
    return jax.typeof(a).sharding.spec


def replicate(a: jax.Array, target: PartitionSpec) -> jax.Array:
    """``a`` once for each device of the axes that split the first dimension of ``target``."""
    mesh = jax.sharding.get_abstract_mesh()
    first = PartitionSpec(target[0])
    ways = math.prod(mesh.shape[axis] for axis in named_axes(first))
    ones = jax.sharding.reshard(jnp.ones(ways, a.dtype), first)
    letters = "abcdefgh"[: a.ndim]
    return jnp.einsum(f"n,{letters}->n{letters}", ones, a, out_sharding=target)


def _reshard(a: jax.Array, target: PartitionSpec) -> jax.Array:
    """`jax.sharding.reshard`, with the last dimension in front if it is its split that changes.

    XLA for TPUs makes all-reduces of some reduce-scatters along the last dimension.
    """
    now, then = axes_of(a).partitions, target.partitions
    then = (*then, *(None,) * (a.ndim - len(then)))
    if a.ndim < 2 or now[-1] == then[-1]:
        return jax.sharding.reshard(a, target)
    moved = PartitionSpec(then[-1], *then[:-1], reduced=target.reduced, unreduced=target.unreduced)
    return jnp.moveaxis(jax.sharding.reshard(jnp.moveaxis(a, -1, 0), moved), 0, -1)
