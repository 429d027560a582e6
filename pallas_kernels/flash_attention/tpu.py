"""Flash attention on a TPU: Pallas kernels for the matrix unit, compiled by Mosaic.

A program of the forward grid ``(b, h, queries, keys)`` has one block of queries; its running
maximum, sum and values stay in VMEM while the last axis streams the keys. Scores are transposed,
``[keys, queries]``: the numbers of each query are then in a row, and reductions are over sublanes.

The blocks of keys that a block of queries visits are computed before the kernel runs (`ranges`) and
prefetched as scalars. A step after the last one has the index of the block that is in VMEM already,
so it copies nothing, and it computes nothing. A pair of blocks in which every query sees every key
is not masked.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.ranges import (
    Extremes,
    all_see,
    extremes,
    first_and_last,
    may_see,
)
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, sees_a_key
from pallas_kernels.mask import Mask, sees

LANES = 128
# contractions: of both first axes, of both last axes, of the plain product
FIRST, LAST = (((0,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
PLAIN = (((1,), (0,)), ((), ()))


def refusal(q) -> str | None:
    """What the kernels do not support in a call with the queries ``q``, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype}: must be bfloat16 or float32"
    if q.shape[-1] > 256:
        return f"{q.shape[-1]} channels per head: at most 256 fit in VMEM with the scores"
    return None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a call after padding to full blocks."""

    query: int
    key: int
    q_blocks: int
    k_blocks: int
    group: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], t: int, s: int, group: int) -> "Shape":
        query, key = (min(sizes[n], up(length)) for n, length in (("query", t), ("key", s)))
        return cls(up(query), up(key), pl.cdiv(t, up(query)), pl.cdiv(s, up(key)), group)


def up(size: int) -> int:
    """``size`` rounded up to full lanes: positions of a block are along lanes."""
    return pl.cdiv(size, LANES) * LANES


def pad(a: jax.Array, axis: int, length: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, length - a.shape[axis])
    return jnp.pad(a, widths, constant_values=value) if widths[axis][1] else a


def dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
    )


def column(row: jax.Array) -> jax.Array:
    """``[1, n]`` as ``[n, 1]``: Mosaic transposes only full tiles of the hardware."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scalars:
    """Prefetched scalars of a kernel: flat int32 arrays in SMEM.

    ``first``, ``last``: the blocks of keys that each block of queries visits, or the blocks of
    queries of each block of keys. ``k``, ``q``: the extremes of all blocks.
    """

    first: Any
    last: Any
    k: Extremes
    q: Extremes

    @staticmethod
    def count(spec: Spec) -> int:
        """The number of arrays."""
        return 14 if spec.limits else 12

    @classmethod
    def compute(cls, spec: Spec, shape: Shape, mask: Mask, by: str) -> "Scalars":
        """The scalars of a kernel whose programs have a block of side ``by``: query or key."""
        q = extremes(mask.q_positions_bt, mask.q_segments_bt, shape.query, mask.until_bt)
        k = extremes(mask.k_positions_bs, mask.k_segments_bs, shape.key)
        each_q, each_k = (
            jax.tree.map(functools.partial(jnp.expand_dims, axis=axis), side)
            for side, axis in ((q, 2), (k, 1))
        )
        see = may_see(spec, each_q, each_k)
        first, last = first_and_last(see if by == "query" else jnp.swapaxes(see, 1, 2))
        return jax.tree.map(lambda a: a.reshape(-1), cls(first, last, k, q))

    @classmethod
    def of(cls, refs) -> "Scalars":
        """The scalars from the `count` references that a kernel or an index map receives."""
        return cls(refs[0], refs[1], Extremes(*refs[2:7]), Extremes(*refs[7:]))

    def visit(self, spec: Spec, shape: Shape, b, i, j, inside, body):
        """Run ``body(masked)`` if queries ``i`` of row ``b`` may see keys ``j``, and ``inside``."""
        # a step after the last block must not read extremes beyond the end
        q_index = b * shape.q_blocks + jnp.minimum(i, shape.q_blocks - 1)
        k_index = b * shape.k_blocks + jnp.minimum(j, shape.k_blocks - 1)
        q = jax.tree.map(lambda a: a[q_index], self.q)
        k = jax.tree.map(lambda a: a[k_index], self.k)
        see = may_see(spec, q, k) & inside
        clear = all_see(spec, q, k)

        @pl.when(see & clear)
        def _():
            body(False)

        @pl.when(see & ~clear)
        def _():
            body(True)


def split_scalars(spec: Spec, refs) -> tuple[Scalars, Any]:
    """The `Scalars` at the begin of a kernel's references, and the other references."""
    count = Scalars.count(spec)
    return Scalars.of(refs[:count]), refs[count:]


def nearest(first, last, step):
    """The index of the block of a step; after the last it stays, so that nothing is copied."""
    return jnp.maximum(jnp.minimum(first + step, last), 0)


def scores(spec: Spec, shape: Shape, q, k, places, slope, i, j, masked: bool):
    """Scores ``[keys, queries]``, and whether each query sees each key (None: all)."""
    q_positions, k_positions, q_segments, k_segments, *until = places
    scores = dot(k, q, LAST)
    size = (shape.key, shape.query)
    q_at = jnp.broadcast_to(q_positions[0], size)
    k_at = jnp.broadcast_to(column(k_positions[0]), size)
    scores = biased(spec, scores, q_at - k_at, slope)
    if not masked:
        return scores, None
    q_in = k_in = limit = None
    if spec.packed:
        q_in = jnp.broadcast_to(q_segments[0], size)
        k_in = jnp.broadcast_to(column(k_segments[0]), size)
    if spec.limits:
        limit = jnp.broadcast_to(until[0][0], size)
    return scores, sees(spec, q_at, k_at, q_in, k_in, limit)


def _forward_kernel(spec: Spec, shape: Shape, has: tuple[bool, bool], *refs):
    scalars, refs = split_scalars(spec, refs)
    slopes, sinks, q_ref, k_ref, v_ref, *mask_refs, y_ref, lse_ref, top_ref, total_ref, acc_ref = (
        refs
    )
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    row = b * shape.q_blocks + i
    j = scalars.first[row] + step

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(masked):
        slope = slopes[h] if has[0] else None
        s, seen = scores(spec, shape, q_ref[0, 0], k_ref[0, 0], mask_refs, slope, i, j, masked)
        if seen is not None:
            s = jnp.where(seen, s, MASKED)
        top = top_ref[...]
        new_top = jnp.maximum(top, s.max(0, keepdims=True))
        weights = jnp.exp(s - new_top)
        shrink = jnp.exp(top - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * shrink + weights.sum(0, keepdims=True)
        y = dot(v_ref[0, 0], weights.astype(v_ref.dtype), FIRST)
        acc_ref[...] = acc_ref[...] * shrink + y

    scalars.visit(spec, shape, b, i, j, j <= scalars.last[row], body)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        top, total = top_ref[...], total_ref[...]
        sees_any = sees_a_key(top)
        keep = jnp.where(sees_any, 1.0, 0.0)
        if has[1]:
            new_top = jnp.maximum(top, sinks[h])
            keep *= jnp.exp(top - new_top)
            total = total * keep + jnp.exp(sinks[h] - new_top)
            top = new_top
        else:
            total = jnp.where(sees_any, total, 1.0)
        y_ref[0, 0] = (acc_ref[...] * (keep / total)).T.astype(y_ref.dtype)
        lse_ref[0, 0] = top + jnp.log(total)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arrays of a call, padded to full blocks, with heads before time."""

    spec: Spec
    shape: Shape
    q_bhtc: jax.Array
    k_bksc: jax.Array
    v_bksc: jax.Array
    mask: Mask
    slopes: jax.Array | None
    sinks: jax.Array | None

    @classmethod
    def of(cls, spec, sizes, q_bthc, k_bskc, v_bskc, mask: Mask, slopes, sinks):
        h, k = q_bthc.shape[2], k_bskc.shape[2]
        shape = Shape.of(sizes, q_bthc.shape[1], k_bskc.shape[1], h // k)
        t, s = shape.q_blocks * shape.query, shape.k_blocks * shape.key
        q_bhtc, k_bksc, v_bksc = (
            pad(jnp.swapaxes(a, 1, 2), 2, length)
            for a, length in ((q_bthc, t), (k_bskc, s), (v_bskc, s))
        )
        return cls(spec, shape, q_bhtc, k_bksc, v_bksc, mask.padded(t, s), slopes, sinks)

    def run(self, kernel, name, by, grid, q_block, k_block, arrays, out_shape, out, scratch):
        """Run ``kernel`` over ``grid``, whose first three axes are independent.

        ``q_block`` and ``k_block`` map a program's ids and scalars to ``(row, head, block)`` of
        queries and of keys. ``arrays``: pairs of a side, ``"q"`` or ``"k"``, and an array of
        vectors ``[b, heads, length, c]`` or of numbers ``[b, heads, 1, length]``; ``out``: sides
        of the results.
        """
        scalars = jax.tree.leaves(Scalars.compute(self.spec, self.shape, self.mask, by))
        mask_arrays = self.mask.arrays()
        size = {"q": self.shape.query, "k": self.shape.key}
        block_of = {"q": q_block, "k": k_block}

        def block(side, array):
            is_numbers = array.shape[2] == 1

            def index(*ids_and_refs):
                ids, refs = ids_and_refs[: len(grid)], ids_and_refs[len(grid) :]
                row, head, n = block_of[side](*ids, Scalars.of(refs))
                return (row, head, 0, n) if is_numbers else (row, head, n, 0)

            shape = (1, size[side]) if is_numbers else (size[side], array.shape[3])
            return pl.BlockSpec((1, 1, *shape), index)

        def mask_spec(side):
            def index(*ids_and_refs):
                ids, refs = ids_and_refs[: len(grid)], ids_and_refs[len(grid) :]
                row, _, n = block_of[side](*ids, Scalars.of(refs))
                return (row, 0, n)

            return pl.BlockSpec((1, 1, size[side]), index)

        in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
        by_head = [
            jnp.zeros((1,), jnp.float32) if a is None else a.astype(jnp.float32)
            for a in (self.slopes, self.sinks)
        ]
        has = (self.slopes is not None, self.sinks is not None)
        return pl.pallas_call(
            functools.partial(kernel, self.spec, self.shape, has),
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[
                    *(in_smem for _ in by_head),
                    *(block(side, a) for side, a in arrays),
                    *(mask_spec(side) for side, _ in mask_arrays),
                ],
                out_specs=[block(side, a) for side, a in zip(out, out_shape, strict=True)],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
            ),
            name=name,
        )(*scalars, *by_head, *(a for _, a in arrays), *(a[:, None] for _, a in mask_arrays))


def forward(spec: Spec, sizes: Mapping[str, int], *arrays):
    """``y_bthc, lse_bht``; ``arrays`` as in `reference.attention`."""
    call = Call.of(spec, sizes, *arrays)
    shape = call.shape
    b, h, t, c = call.q_bhtc.shape

    def q_block(b, h, i, step, scalars):
        return b, h, i

    def k_block(b, h, i, step, scalars):
        row = b * shape.q_blocks + i
        return b, jax.lax.div(h, shape.group), nearest(scalars.first[row], scalars.last[row], step)

    y_bhtc, lse = call.run(
        _forward_kernel,
        "flash_attention",
        "query",
        (b, h, shape.q_blocks, shape.k_blocks),
        q_block,
        k_block,
        (("q", call.q_bhtc), ("k", call.k_bksc), ("k", call.v_bksc)),
        [
            jax.ShapeDtypeStruct((b, h, t, c), call.q_bhtc.dtype),
            jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32),
        ],
        ("q", "q"),
        [(1, shape.query), (1, shape.query), (c, shape.query)],
    )
    length = arrays[0].shape[1]
    return jnp.swapaxes(y_bhtc[:, :, :length], 1, 2), lse[:, :, 0, :length]
