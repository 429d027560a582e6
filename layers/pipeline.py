"""Pipeline parallelism: layers are sharded over stages; micro-batches pass through the stages.

GPipe (Huang 2019, arXiv:1811.06965), and with more than one circuit the interleaved stages of
Narayanan 2021 (arXiv:2104.04473, §2.2): each of ``v`` groups of consecutive layers is sharded over
the ``S`` stages, and a micro-batch makes ``v`` circuits through them. In one tick each stage
applies its layers of one circuit to one micro-batch and sends the result to the next stage. ``M``
micro-batches require ``vM + S − 1`` ticks; each stage is idle in ``S − 1`` of them. The backward
pass has the same ticks in reverse order.

Outside the pipeline the batch is sharded over stages too, so that nothing is computed twice: rows
are all-gathered before the pipeline and reduce-scattered after it.
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
    """The number of stages that layers are sharded over; 1 if they are not sharded."""
    axis = mesh_axis(AXIS)
    return 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]


def idle(stages: int, microbatches: int, circuits: int) -> float:
    """The fraction of ticks in which a stage is idle (Narayanan 2021, §2.2)."""
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
    """Apply all layers to a batch, in micro-batches over the stages: ``(moving, reports)``.

    Args:
      layers: ``layers(blocks, moving, beside, key, first) -> (moving, report)`` applies the layers
        ``blocks``, the first of which has index ``first``, to one of ``microbatches``
        micro-batches. ``key`` is different for each.
      circuits: for each circuit a tree of parameters, stacked along their first axis, which is
        sharded over stages.
      moving, beside: trees of ``[b, …]`` arrays: those that layers change, and integers that they
        only read. The rows of a micro-batch are not consecutive in the batch.
      apart: True: ``layers`` runs per device along the mesh axes that only rows are sharded over,
        so that gradients are summed over these once and not in every tick. A report is then that
        of one device's rows.

    Returns ``moving`` after all layers, and the reports ``[layers, …]`` of all layers in order,
    summed over micro-batches. The leaves of one call's report begin with its layers.
    """
    axis = mesh_axis(AXIS)
    assert isinstance(axis, str)
    num_stages, num_circuits = stages(), len(circuits)
    batch_axes = _batch_axes(axis, circuits) if apart else ()
    manual = {axis, *batch_axes}
    depth = jax.tree.leaves(circuits[0])[0].shape[0]  # layers of a circuit
    ticks = num_circuits * microbatches + num_stages - 1
    ring = [(i, (i + 1) % num_stages) for i in range(num_stages)]

    def run_stage(circuits, moving, beside, key):
        stage = jax.lax.axis_index(axis)
        moving = jax.tree.map(lambda a: a[0], moving)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *circuits)

        def tick(carry, time):
            arrived, waiting = carry
            step = time - stage  # of this stage: how many micro-batches it had before
            busy = (step >= 0) & (step < num_circuits * microbatches)
            step = jnp.clip(step, 0, num_circuits * microbatches - 1)
            circuit, microbatch = step // microbatches, step % microbatches

            inputs = jax.tree.map(
                lambda stored, passed: jnp.where(stage == 0, _select(stored, microbatch), passed),
                waiting,
                arrived,
            )
            blocks = jax.tree.map(lambda a: _select(a, circuit), stacked)
            read_only = jax.tree.map(lambda a: _select(a, microbatch), beside)
            first = circuit * depth + stage * (depth // num_stages)
            microbatch_key = jax.tree.map(lambda k: jax.random.fold_in(k, microbatch), key)
            outputs, report = layers(blocks, inputs, read_only, microbatch_key, first)
            report = jax.tree.map(lambda a: jnp.where(busy, a, jnp.zeros_like(a)), report)
            arrived = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, ring), outputs)
            if num_circuits > 1:
                # what the last stage sends waits at the first for the next circuit
                returned = time - (num_stages - 1)

                def keep(stored, new):
                    slot = returned % microbatches
                    new = jnp.where(returned >= 0, new, _select(stored, slot))
                    return jax.lax.dynamic_update_index_in_dim(stored, new, slot, 0)

                waiting = jax.tree.map(keep, waiting, arrived)
            return (arrived, waiting), (outputs, report, circuit)

        # idle stages compute with real inputs too: gradients at 0 may not be finite
        start = jax.tree.map(lambda a: a[0], moving), moving
        _, (outputs, reports, circuit) = jax.lax.scan(tick, start, jnp.arange(ticks))
        results = jax.tree.map(lambda a: a[-microbatches:], outputs)
        results = jax.tree.map(lambda a: jnp.where(stage == num_stages - 1, a, 0)[None], results)
        of_circuit = circuit[:, None] == jnp.arange(num_circuits)

        def by_circuit(a):  # [ticks, layers, …] → [circuits, layers, …]
            return jnp.einsum("at,a...->t...", of_circuit.astype(a.dtype), a)

        return results, jax.tree.map(by_circuit, reports)

    def inside(*arguments):
        rules = [(name, _without(axes, manual)) for name, axes in get_logical_axis_rules()]
        with logical_axis_rules(tuple(rules)):
            return run_stage(*arguments)

    rows = PartitionSpec(axis, None, batch_axes or None)  # of [copies or stages, micro-batches, b]
    mesh = jax.sharding.get_abstract_mesh()
    results, reports = jax.shard_map(
        inside,
        in_specs=(PartitionSpec(axis), rows, PartitionSpec(*rows[1:]), PartitionSpec()),
        out_specs=(rows, PartitionSpec(None, axis)),
        axis_names=manual,
        check_vma=False,
    )(
        tuple(circuits),
        jax.tree.map(lambda a: _split_rows(a, microbatches, axis, mesh, copied=True), moving),
        jax.tree.map(lambda a: _split_rows(a, microbatches, axis, mesh, copied=False), beside),
        key,
    )

    def in_order(a):  # [circuits, layers, …] → [layers, …]
        a = jax.sharding.reshard(a, PartitionSpec(*(None,) * a.ndim))
        return a.reshape(-1, *a.shape[2:])

    moving = jax.tree.map(lambda a: _join_rows(a, axis, num_stages), results)
    return moving, jax.tree.map(in_order, reports)


def _select(a: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def _batch_axes(axis: str, parameters: Any) -> tuple[str, ...]:
    """The mesh axes that only rows of the batch are sharded over."""
    rules = dict(get_logical_axis_rules())
    rows = (rules.pop("batch"),)
    used_by_others = named_axes(PartitionSpec(*rules.values())).union(
        *(named_axes(axes_of(a)) for a in jax.tree.leaves(parameters))
    )
    return tuple(name for name in jax.tree.leaves(rows) if name not in used_by_others)


def _without(axes: Any, names: Collection[str]) -> Any:
    remaining = tuple(name for name in jax.tree.leaves(axes) if name not in names)
    return remaining[0] if len(remaining) == 1 else remaining or None


def _split_rows(a: jax.Array, microbatches: int, axis: str, mesh, *, copied: bool) -> jax.Array:
    """``[b, …]`` as ``[microbatches, b / microbatches, …]``, replicated over stages.

    A micro-batch has rows of one stage, so that no row is sent before the all-gather. ``copied``:
    one copy for each stage along a new first axis, whose gradients are scattered to the rows.
    """
    num_stages, partitions = mesh.shape[axis], axes_of(a).partitions
    rows, others = partitions[0], partitions[1:]
    inner = _without(rows, {axis})
    shape = (num_stages, a.shape[0] // microbatches, microbatches // num_stages, *a.shape[1:])
    a = jnp.reshape(a, shape, out_sharding=PartitionSpec(axis, inner, None, *others))
    shape = (microbatches, a.shape[1], *a.shape[3:])
    sharding = PartitionSpec(axis, inner, *others)
    a = jnp.reshape(jnp.moveaxis(a, 2, 1), shape, out_sharding=sharding)
    if not copied:
        return jax.sharding.reshard(a, PartitionSpec(None, inner, *others))
    replicated = jax.sharding.reshard(
        a, PartitionSpec(None, inner, *others, reduced=frozenset({axis}))
    )
    return replicate(replicated, PartitionSpec(axis, None, inner, *others))


def _join_rows(a: jax.Array, axis: str, num_stages: int) -> jax.Array:
    """The inverse of `_split_rows` for an array of all stages that is 0 except at the last one."""
    inner, *others = list(axes_of(a).partitions)[2:]
    letters = "abcdefgh"[: a.ndim - 1]
    ones = jax.sharding.reshard(jnp.ones(num_stages, a.dtype), PartitionSpec(axis))
    sharding = PartitionSpec(None, inner, *others, unreduced=frozenset({axis}))
    a = jnp.einsum(f"s,s{letters}->{letters}", ones, a, out_sharding=sharding)
    a = jax.sharding.reshard(a, PartitionSpec(axis, inner, *others))
    shape = (num_stages, a.shape[0] // num_stages, *a.shape[1:])
    a = jnp.reshape(a, shape, out_sharding=PartitionSpec(axis, None, inner, *others))
    rows = (axis,) if inner is None else (axis, inner) if isinstance(inner, str) else (axis, *inner)
    shape = (math.prod(a.shape[:3]), *a.shape[3:])
    return jnp.reshape(jnp.moveaxis(a, 1, 2), shape, out_sharding=PartitionSpec(rows, *others))
