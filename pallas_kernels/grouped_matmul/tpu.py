"""The grouped matmul on a TPU: Pallas kernels for the matrix unit, compiled by Mosaic.

The grid of the product is (columns, visits, inner): the list of visits (`visits`) is prefetched as
scalars and tells index maps which tile of rows and which group's weights to bring. Its length is
known when the kernel runs, so the grid is dynamic: no step is idle. The weights of one group stay
in VMEM over all its tiles if the inner axis is one block.

- A tile that two groups share stays in VMEM between their visits; each stores its own rows.
- Rows of no group are the rows of one more group, whose visits bring nothing and store zeros.
- dx is the same kernel; an index map reads the blocks of the weights across, and the product
  contracts their last axis, so no transposed weights are made.
- dweights: the grid is (inner, columns, visits), the sum over the tiles of one group is kept in
  VMEM. A group without rows is visited once, to store zeros.

Blocks: ``inner`` and ``columns`` count bfloat16 numbers, half as many of float32, whose products
are six of bfloat16 (and six times the code). An axis is cut into equal parts of at most a block.
The sizes come from arithmetic, not from a chip: rows and columns so that a step does more FLOPs a
byte than the chip's own ratio, which is highest on v6e, where a longer inner block keeps a group's
weights in VMEM for wider inputs.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.visits import bounds, touched, visit_groups

LANES = 128
# bfloat16 packs two rows into each of 8 sublanes
SUBLANES = 16
# contraction of the first axes, of the plain product, and with a transposed right side
FIRST, PLAIN, LAST = ((((a,), (b,)), ((), ())) for a, b in ((0, 0), (1, 0), (1, 1)))
# what a kernel may use in any case; a TPU has 64 MiB a core or more
LEAST_VMEM = 16 * 2**20


def refusal(x_md, weights_edf) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if x_md.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x_md.dtype}: the matrix unit takes bfloat16 and float32"
    if 0 in (*x_md.shape, *weights_edf.shape):
        return f"a size is 0: x_md {x_md.shape}, weights_edf {weights_edf.shape}"
    return None


def _even(length: int, block: int, unit: int) -> int:
    """The block that cuts ``length`` into equal parts, in whole units and at most ``block``."""
    if length <= block:
        return length
    most = max(block // unit, 1) * unit
    return pl.cdiv(pl.cdiv(length, pl.cdiv(length, most)), unit) * unit


def _cut(sizes, dtype, rows, inner, columns):
    """The sizes of a tile of rows and of blocks of the other axes."""
    share = 2 / dtype.itemsize
    return (
        _even(rows, sizes["rows"], SUBLANES),
        _even(inner, int(sizes["inner"] * share), LANES),
        _even(columns, int(sizes["columns"] * share), LANES),
    )


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
    )


def _inside(shape, axis, first, start, end):
    """Which of the places ``first, first + 1, …`` along ``axis`` are in ``[start, end)``."""
    at = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + first
    return (at >= start) & (at < end)


def _call(kernel, name, grid, in_specs, out_spec, out_shape, total, flops, scalars, arrays):
    blocks = [*zip(in_specs, arrays, strict=True), (out_spec, out_shape)]
    *brought, stored = (
        a.dtype.itemsize * math.prod(n for n in spec.block_shape if n) for spec, a in blocks
    )
    # two of each block, and what the product makes of those it is given: without the rows of other
    # groups, and in float32 the three bfloat16 parts of each number; the sum, and what is stored
    copies = 4 if out_shape.dtype == jnp.float32 else 3
    vmem = copies * sum(brought) + 2 * stored + 2 * 4 * math.prod(total)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(total, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(LEAST_VMEM, vmem + vmem // 4),
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            bytes_accessed=sum(a.size * a.dtype.itemsize for _, a in blocks),
            transcendentals=0,
        ),
        name=name,
    )(*scalars, *arrays)


def _product_kernel(groups, contract, inner, tile, *refs):
    bounds_g, group_v, tile_v, _, x_ref, w_ref, y_ref, total_ref = refs
    v, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    group, row = group_v[v], tile_v[v] * tile

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(group < groups)
    def _():
        x, w = x_ref[...], w_ref[...]
        block = x.shape[1]
        if inner % block:
            # beyond the end a block holds anything, and 0 · NaN is NaN
            left = inner - step * block
            x = jnp.where(_inside(x.shape, 1, 0, 0, left), x, 0)
            w = jnp.where(_inside(w.shape, contract[0][1][0], 0, 0, left), w, 0)
        total_ref[...] += _dot(x, w, contract)

    @pl.when(step == steps - 1)
    def _():
        start, end = bounds_g[group], bounds_g[group + 1]
        whole = (start <= row) & (row + tile <= end)

        @pl.when(whole)
        def _():
            y_ref[...] = total_ref[...].astype(y_ref.dtype)

        @pl.when(~whole)
        def _():
            own = _inside(y_ref.shape, 0, row, start, end)
            others = y_ref[...].astype(jnp.float32)
            y_ref[...] = jnp.where(own, total_ref[...], others).astype(y_ref.dtype)


def _product(name, sizes, x_mk, weights, group_sizes_e, transposed):
    """``x_mk`` times the weights of each row's group, or times their transposes."""
    (m, k), (e, *matrix) = x_mk.shape, weights.shape
    n = matrix[0] if transposed else matrix[1]
    tile, inner, columns = _cut(sizes, x_mk.dtype, m, k, n)
    steps = pl.cdiv(k, inner)

    bounds_g = bounds(group_sizes_e, m)
    first_g, number_g = touched(bounds_g, tile, empty=0)
    group_v, nth_v, count = visit_groups(number_g, pl.cdiv(m, tile) + e)
    tile_v = first_g[group_v] + nth_v
    # the last visit that brings something: those of the rest ask for the same again
    last = jnp.maximum(jnp.sum(number_g[:e]) - 1, 0)
    held = jnp.stack([jnp.minimum(group_v[last], e - 1), tile_v[last]])

    def bring(v, step, scalars):
        _, group_v, tile_v, held = scalars
        real = group_v[v] < e
        row = jnp.where(real, tile_v[v], held[1])
        group = jnp.where(real, group_v[v], held[0])
        return row, group, jnp.where(real, step, steps - 1)

    def x_index(column, v, step, *scalars):
        row, _, step = bring(v, step, scalars)
        return row, step

    def w_index(column, v, step, *scalars):
        _, group, step = bring(v, step, scalars)
        return (group, column, step) if transposed else (group, step, column)

    return _call(
        functools.partial(_product_kernel, e, LAST if transposed else PLAIN, k, tile),
        name,
        (pl.cdiv(n, columns), count, steps),
        [
            pl.BlockSpec((tile, inner), x_index),
            pl.BlockSpec((None, columns, inner) if transposed else (None, inner, columns), w_index),
        ],
        pl.BlockSpec((tile, columns), lambda column, v, step, *scalars: (scalars[2][v], column)),
        jax.ShapeDtypeStruct((m, n), x_mk.dtype),
        (tile, columns),
        2 * m * k * n,
        (bounds_g, group_v, tile_v, held),
        (x_mk, weights),
    )


def forward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e):
    """``y_mf``."""
    return _product("grouped_matmul", sizes, x_md, weights_edf, group_sizes_e, False)


def _weights_kernel(tile, *refs):
    bounds_g, group_v, tile_v, x_ref, dy_ref, dw_ref, total_ref = refs
    v, visits = pl.program_id(2), pl.num_programs(2)
    group, row = group_v[v], tile_v[v] * tile
    start, end = bounds_g[group], bounds_g[group + 1]
    whole = (start <= row) & (row + tile <= end)

    @pl.when((v == 0) | (group_v[jnp.maximum(v - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(whole)
    def _():
        total_ref[...] += _dot(x_ref[...], dy_ref[...], FIRST)

    @pl.when(~whole & (end > start))
    def _():
        # both: what is not of the group may be NaN
        x = jnp.where(_inside(x_ref.shape, 0, row, start, end), x_ref[...], 0)
        dy = jnp.where(_inside(dy_ref.shape, 0, row, start, end), dy_ref[...], 0)
        total_ref[...] += _dot(x, dy, FIRST)

    @pl.when((v == visits - 1) | (group_v[jnp.minimum(v + 1, visits - 1)] != group))
    def _():
        dw_ref[...] = total_ref[...].astype(dw_ref.dtype)


def backward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e, dy_mf):
    """``dx_md, dweights_edf``."""
    dx_md = _product("grouped_matmul_dx", sizes, dy_mf, weights_edf, group_sizes_e, True)
    (m, d), (e, _, f) = x_md.shape, weights_edf.shape
    tile, inner, columns = _cut(sizes, x_md.dtype, m, d, f)
    tiles = pl.cdiv(m, tile)

    bounds_g = bounds(group_sizes_e, m)
    first_e, number_e = touched(bounds_g[:-1], tile, empty=1)
    group_v, nth_v, count = visit_groups(number_e, tiles + e)
    # a group without rows may begin where they end
    tile_v = jnp.minimum(first_e[group_v] + nth_v, tiles - 1)
    dweights_edf = _call(
        functools.partial(_weights_kernel, tile),
        "grouped_matmul_dweights",
        (pl.cdiv(d, inner), pl.cdiv(f, columns), count),
        [
            pl.BlockSpec((tile, inner), lambda i, j, v, *scalars: (scalars[2][v], i)),
            pl.BlockSpec((tile, columns), lambda i, j, v, *scalars: (scalars[2][v], j)),
        ],
        pl.BlockSpec((None, inner, columns), lambda i, j, v, *scalars: (scalars[1][v], i, j)),
        jax.ShapeDtypeStruct((e, d, f), weights_edf.dtype),
        (inner, columns),
        2 * m * d * f,
        (bounds_g, group_v, tile_v),
        (x_md, dy_mf),
    )
    return dx_md, dweights_edf
