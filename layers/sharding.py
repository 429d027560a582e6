"""Sharding by logical axis names, which the current rules map to mesh axes.

Layers name logical axes (``"batch"``, ``"heads"``, …) and use no mesh. The rules are a table in
`research.parallel.rules`, which is set with Flax's `logical_axis_rules`. Without rules every
function here is the identity, so a single device has no cost.

The stored sharding of weights is over ``fsdp``; in their computed sharding they are replicated over
it. `gather` is the all-gather from one to the other; its transpose is the reduce-scatter of the
gradient (ZeRO-3, Rajbhandari 2020, §5.3).

A weight may also be ``reduced`` (of `PartitionSpec`) over the mesh axes that rows of the batch are
sharded over. Its gradient is then ``unreduced``: each device has the partial sum over its rows, and
the code that calls `jax.grad` does the sum over devices. Products, lookups and `per_device` support
this. For other uses `gather` returns a weight that is not ``reduced``, and the gradient is summed
at once.
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
ROWS = ("batch", "time")  # the logical axes that gradients of weights are summed over


def spec(*axes: str | None) -> PartitionSpec | None:
    """The mesh axes of the logical ``axes`` of an array; None if no rules are set."""
    rules = dict(get_logical_axis_rules())
    if not rules:
        return None
    return PartitionSpec(*(None if axis is None else rules.get(axis) for axis in axes))


def reshard(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` resharded to the logical ``axes`` of its dimensions; its values stay."""
    target = spec(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(
    weight: jax.Array, axes: tuple[str | None, ...], *, rows: tuple[str | None, ...] | None = None
) -> jax.Array:
    """A weight in its computed sharding: all-gathered over ``fsdp``, still sharded over ``tensor``.

    ``rows``: the logical axes that its gradient is summed over, if its use supports an unreduced
    gradient.
    """
    target = spec(*axes)
    if target is None:
        return weight
    if jax.sharding.get_abstract_mesh().manual_axes:
        # in a pipeline JAX does not support unreduced gradients
        return jax.sharding.reshard(weight, target)
    stored = axes_of(weight)
    gathered = named_axes(stored) - named_axes(target)
    if rows is None or not (stored.reduced or gathered):
        return jax.sharding.reshard(weight, target)
    # two reshards: the transpose is then a reduce-scatter over the gathered axes and a sum of its
    # result over the other axes of rows; one reshard would sum all of the gradient
    summed = named_axes(spec(*rows)) - named_axes(target)
    first = stored.reduced or summed - named_axes(stored)
    weight = jax.sharding.reshard(weight, PartitionSpec(*stored.partitions, reduced=first))
    return _reshard(weight, PartitionSpec(*target, reduced=summed))


def scatter(gradient: jax.Array, target: PartitionSpec) -> jax.Array:
    """``gradient`` resharded to ``target``: reduce-scattered, then summed over the other axes."""
    unreduced = axes_of(gradient).unreduced
    if unreduced > target.unreduced:
        first = unreduced - named_axes(target)
        gradient = _reshard(gradient, PartitionSpec(*target.partitions, unreduced=first))
    return jax.sharding.reshard(gradient, target)


def all_but_gathered(primitive, *operands, **options) -> bool:
    """A policy of `jax.checkpoint`: store everything except all-gathered weights.

    The backward pass all-gathers these again (ZeRO-3).
    """
    if primitive.name == "reshard":
        return not options["dst_sharding"].spec.reduced
    # a cast or transpose of such a weight; products have two operands
    return len(operands) != 1 or not operands[0].sharding.spec.reduced


def named_axes(axes: PartitionSpec | None) -> frozenset[str]:
    """The mesh axes that any dimension is sharded over."""
    names: set[str] = set()
    for axis in () if axes is None else axes.partitions:
        names |= {axis} if isinstance(axis, str) else set(axis or ())
    return frozenset(names)


def broadcast_to(weight: jax.Array, x: jax.Array) -> jax.Array:
    """``weight``, of ``x``'s last dimensions, as an array that broadcasts with ``x``.

    If its gradient stays unreduced, it becomes a product with ones, because products support
    unreduced gradients; XLA removes this product.
    """
    weight_axes = axes_of(weight)
    if not weight_axes.reduced:
        return weight
    x_axes = axes_of(x).partitions
    rows = PartitionSpec(*x_axes[: -weight.ndim])
    weight = jax.sharding.reshard(
        weight, PartitionSpec(*weight_axes.partitions, reduced=named_axes(rows))
    )
    ones = jax.sharding.reshard(jnp.ones(x.shape[: -weight.ndim], weight.dtype), rows)
    letters = "abcdefgh"[: x.ndim]
    first, last = letters[: -weight.ndim], letters[-weight.ndim :]
    return jnp.einsum(
        f"{first},{last}->{letters}", ones, weight, out_sharding=PartitionSpec(*x_axes)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scattered:
    """A parameter whose gradient has another sharding; ``[...]`` reads ``whole``.

    The gradient is reduce-scattered to the type of ``share``, whose values are not used. This
    happens where the parameter is read, so after the backward pass of each layer (ZeRO-2, §5.2).
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
    """``function(*arguments)`` computed per device, on its shards of all arrays (`jax.shard_map`).

    For operations that explicit sharding does not support: kernels, sorts, scatters. ``axes``: the
    logical axes of each argument: a tuple of names for an array; for a pytree the same pytree with
    such a tuple for each array (ignored if the array is None). ``out_axes``: of the result; a list
    if the function returns a tuple. ``function`` can use shards of other devices only by
    collectives over a `mesh_axis`.
    """
    if spec() is None:
        return function(*arguments)
    several = isinstance(out_axes, list)
    out_spec = tuple(spec(*axes) for axes in out_axes) if several else spec(*out_axes)
    arrays, structure = jax.tree.flatten(arguments, is_leaf=lambda a: a is None)
    names = structure.flatten_up_to(axes)
    present = [i for i, a in enumerate(arrays) if a is not None]
    # one copy for each device along a new first dimension, so that gradients are per device too
    copy_axes = {i: tuple(sorted(axes_of(arrays[i]).reduced)) for i in present}

    def run_shards(*shards):
        leaves: list = [None] * len(arrays)
        for i, shard in zip(present, shards, strict=True):
            leaves[i] = shard[0] if copy_axes[i] else shard
        return function(*jax.tree.unflatten(structure, leaves))

    def prepare(i):
        target = spec(*names[i])
        assert target is not None
        if not copy_axes[i]:
            return jax.sharding.reshard(arrays[i], target), target
        marked = PartitionSpec(*target, reduced=frozenset(copy_axes[i]))
        shard = jax.sharding.reshard(arrays[i], marked)
        target = PartitionSpec(copy_axes[i], *target)
        return replicate(shard, target), target

    inputs, in_specs = zip(*map(prepare, present), strict=True)
    mesh = jax.sharding.get_abstract_mesh()
    axis_names = set(mesh.axis_names) - set(mesh.manual_axes)  # the others are a pipeline's
    run = jax.shard_map(
        run_shards, in_specs=in_specs, out_specs=out_spec, axis_names=axis_names, check_vma=False
    )
    return run(*inputs)


def mesh_axis(axis: str) -> str | tuple[str, ...] | None:
    """The mesh axis that the logical ``axis`` is sharded over, for collectives in `per_device`."""
    target = spec(axis)
    return None if target is None else target[0]


def axes_of(a: jax.Array) -> PartitionSpec:
    """The mesh axes of each dimension of ``a``, from its type."""
    return jax.typeof(a).sharding.spec


def replicate(a: jax.Array, target: PartitionSpec) -> jax.Array:
    """``[n, *a.shape]``: a copy of ``a`` for each device along ``target``'s first dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    first = PartitionSpec(target[0])
    n = math.prod(mesh.shape[axis] for axis in named_axes(first))
    ones = jax.sharding.reshard(jnp.ones(n, a.dtype), first)
    letters = "abcdefgh"[: a.ndim]
    return jnp.einsum(f"n,{letters}->n{letters}", ones, a, out_sharding=target)


def _reshard(a: jax.Array, target: PartitionSpec) -> jax.Array:
    """`jax.sharding.reshard`, with the last dimension moved to the front if its sharding changes.

    XLA for TPUs compiles some reduce-scatters along the last dimension as all-reduces.
    """
    old, new = axes_of(a).partitions, target.partitions
    new = (*new, *(None,) * (a.ndim - len(new)))
    if a.ndim < 2 or old[-1] == new[-1]:
        return jax.sharding.reshard(a, target)
    moved = PartitionSpec(new[-1], *new[:-1], reduced=target.reduced, unreduced=target.unreduced)
    return jnp.moveaxis(jax.sharding.reshard(jnp.moveaxis(a, -1, 0), moved), 0, -1)
