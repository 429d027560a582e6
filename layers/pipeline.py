"""Pipeline parallelism: stages each hold some of the layers, and micro-batches pass through them.

GPipe (Huang 2019, arXiv:1811.06965), and with more than one circuit the interleaved stages of
Narayanan 2021 (arXiv:2104.04473, §2.2): a stage holds a part of each of ``v`` groups of consecutive
layers, and a micro-batch goes round the ``S`` stages ``v`` times. In one tick every stage takes one
micro-batch through one of its parts and hands it on; ``M`` micro-batches take ``vM + S − 1`` ticks,
in ``S − 1`` of which a stage has nothing to do. The backward pass is the same ticks backwards.

Outside the layers stages split the batch like any other axis, so that nothing is computed twice:
rows are gathered on the way in and scattered on the way out.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules, logical_axis_rules
from jax.sharding import PartitionSpec

from layers.sharding import axes_of, mesh_axis, named_axes, replicate

AXIS = "layers"  # logical, of stacked parameters


def stages() -> int:
    """How many stages the layers are split over; 1 without a mesh that splits them."""
    axis = mesh_axis(AXIS)
    return 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]


def idle(stages: int, microbatches: int, circuits: int) -> float:
    """The share of ticks in which a stage has nothing to do (Narayanan 2021, §2.2)."""
    return (stages - 1) / (circuits * microbatches + stages - 1)


def pipeline(
    layers: Callable[[Any, Any, Any, jax.Array | None, jax.Array], tuple[Any, Any]],
    circuits: Sequence[Any],
    moving: Any,
    beside: Any,
    key: jax.Array | None,
    microbatches: int,
    *,
    apart: bool,
) -> tuple[Any, Any]:
    """Take a batch through all layers: ``(moving, reports)``.

    Args:
      layers: ``layers(blocks, moving, beside, key, first) -> (moving, report)`` of the layers
        ``blocks``, the first of which is number ``first``, on one of ``microbatches`` parts of the
        batch, with a key of its own.
      circuits: a tree of parameters for each circuit, stacked along their first axis, which stages
        split.
      moving, beside: trees of ``[b, …]`` arrays: what layers change, and integers that they only
        read. A part of the batch is of rows from all over it.
      apart: whether rows may be kept apart that a mesh splits over an axis of their own, so that
        they sum their gradients once and not at every tick. Reports are then of a share of them.

    Returns ``moving`` after all layers, and the reports, whose leaves begin with the layers of one
    call, as ``[layers, …]`` of all layers in order, summed over micro-batches.
    """
    axis = mesh_axis(AXIS)
    assert isinstance(axis, str)
    count, turns = stages(), len(circuits)
    alone = _alone(axis, circuits) if apart else ()
    manual = {axis, *alone}
    depth = jax.tree.leaves(circuits[0])[0].shape[0]  # layers of a circuit
    ticks = turns * microbatches + count - 1
    ring = [(i, (i + 1) % count) for i in range(count)]

    def local(circuits, moving, beside, key):
        stage = jax.lax.axis_index(axis)
        moving = jax.tree.map(lambda a: a[0], moving)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *circuits)

        def tick(carry, time):
            arrived, waiting = carry
            number = time - stage  # how many this stage has had before
            busy = (number >= 0) & (number < turns * microbatches)
            number = jnp.clip(number, 0, turns * microbatches - 1)
            turn, part = number // microbatches, number % microbatches

            mine = jax.tree.map(
                lambda held, passed: jnp.where(stage == 0, _at(held, part), passed),
                waiting,
                arrived,
            )
            blocks = jax.tree.map(lambda a: _at(a, turn), stacked)
            own = jax.tree.map(lambda a: _at(a, part), beside)
            first = turn * depth + stage * (depth // count)
            part_key = jax.tree.map(lambda k: jax.random.fold_in(k, part), key)
            done, report = layers(blocks, mine, own, part_key, first)
            report = jax.tree.map(lambda a: jnp.where(busy, a, jnp.zeros_like(a)), report)
            arrived = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, ring), done)
            if turns > 1:  # what comes from the last stage waits at the first for its next turn
                back = time - (count - 1)

                def keep(held, new):
                    place = back % microbatches
                    new = jnp.where(back >= 0, new, _at(held, place))
                    return jax.lax.dynamic_update_index_in_dim(held, new, place, 0)

                waiting = jax.tree.map(keep, waiting, arrived)
            return (arrived, waiting), (done, report, turn)

        # idle stages too compute with something real: gradients at 0 need not be finite
        start = jax.tree.map(lambda a: a[0], moving), moving
        _, (done, reports, turn) = jax.lax.scan(tick, start, jnp.arange(ticks))
        ended = jax.tree.map(lambda a: a[-microbatches:], done)
        ended = jax.tree.map(lambda a: jnp.where(stage == count - 1, a, 0)[None], ended)
        of_turn = turn[:, None] == jnp.arange(turns)

        def by_turn(a):  # [ticks, layers, …] → [turns, layers, …]
            return jnp.einsum("at,a...->t...", of_turn.astype(a.dtype), a)

        return ended, jax.tree.map(by_turn, reports)

    def inside(*arguments):
        rules = [(name, _without(axes, manual)) for name, axes in get_logical_axis_rules()]
        with logical_axis_rules(tuple(rules)):
            return local(*arguments)

    rows = PartitionSpec(axis, None, alone or None)  # of copies or stages, parts and rows
    mesh = jax.sharding.get_abstract_mesh()
    ended, reports = jax.shard_map(
        inside,
        in_specs=(PartitionSpec(axis), rows, PartitionSpec(*rows[1:]), PartitionSpec()),
        out_specs=(rows, PartitionSpec(None, axis)),
        axis_names=manual,
        check_vma=False,
    )(
        tuple(circuits),
        jax.tree.map(lambda a: _deal(a, microbatches, axis, mesh, copied=True), moving),
        jax.tree.map(lambda a: _deal(a, microbatches, axis, mesh, copied=False), beside),
        key,
    )

    def in_order(a):  # [turns, layers, …] → [layers, …]
        a = jax.sharding.reshard(a, PartitionSpec(*(None,) * a.ndim))
        return a.reshape(-1, *a.shape[2:])

    moving = jax.tree.map(lambda a: _collect(a, axis, count), ended)
    return moving, jax.tree.map(in_order, reports)


def _at(a: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def _alone(axis: str, parameters: Any) -> tuple[str, ...]:
    """The mesh axes that split rows of a batch and nothing else."""
    rules = dict(get_logical_axis_rules())
    rows = (rules.pop("batch"),)
    taken = named_axes(PartitionSpec(*rules.values())).union(
        *(named_axes(axes_of(a)) for a in jax.tree.leaves(parameters))
    )
    return tuple(name for name in jax.tree.leaves(rows) if name not in taken)


def _without(axes: Any, names: Collection[str]) -> Any:
    rest = tuple(name for name in jax.tree.leaves(axes) if name not in names)
    return rest[0] if len(rest) == 1 else rest or None


def _deal(a: jax.Array, parts: int, axis: str, mesh, *, copied: bool) -> jax.Array:
    """``[b, …]`` as ``[parts, b / parts, …]`` with all parts on every stage.

    Every stage's rows are dealt out to parts of their own, so that none moves before the gather.
    ``copied``: one copy a stage along an axis in front, whose gradients are scattered to the rows.
    """
    count, partitions = mesh.shape[axis], axes_of(a).partitions
    rows, rest = partitions[0], partitions[1:]
    inner = _without(rows, {axis})
    shape = (count, a.shape[0] // parts, parts // count, *a.shape[1:])
    a = jnp.reshape(a, shape, out_sharding=PartitionSpec(axis, inner, None, *rest))
    shape = (parts, a.shape[1], *a.shape[3:])
    where = PartitionSpec(axis, inner, *rest)
    a = jnp.reshape(jnp.moveaxis(a, 2, 1), shape, out_sharding=where)
    if not copied:
        return jax.sharding.reshard(a, PartitionSpec(None, inner, *rest))
    whole = jax.sharding.reshard(a, PartitionSpec(None, inner, *rest, reduced=frozenset({axis})))
    return replicate(whole, PartitionSpec(axis, None, inner, *rest))


def _collect(a: jax.Array, axis: str, count: int) -> jax.Array:
    """``[stages, parts, b / parts, …]``, zero but for the last stage, as the ``[b, …]`` dealt."""
    inner, *rest = list(axes_of(a).partitions)[2:]
    letters = "abcdefgh"[: a.ndim - 1]
    ones = jax.sharding.reshard(jnp.ones(count, a.dtype), PartitionSpec(axis))
    where = PartitionSpec(None, inner, *rest, unreduced=frozenset({axis}))
    a = jnp.einsum(f"s,s{letters}->{letters}", ones, a, out_sharding=where)
    a = jax.sharding.reshard(a, PartitionSpec(axis, inner, *rest))
    shape = (count, a.shape[0] // count, *a.shape[1:])
    a = jnp.reshape(a, shape, out_sharding=PartitionSpec(axis, None, inner, *rest))
    rows = (axis,) if inner is None else (axis, inner) if isinstance(inner, str) else (axis, *inner)
    shape = (math.prod(a.shape[:3]), *a.shape[3:])
    return jnp.reshape(jnp.moveaxis(a, 1, 2), shape, out_sharding=PartitionSpec(rows, *rest))
