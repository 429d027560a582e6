"""The grouped matmul on a TPU: Pallas kernels for the matrix unit, compiled by Mosaic.

The grid of the product is (columns, visits, inner). The list of visits (`visits`) is prefetched as
scalars; index maps read from it which block of rows and which group's weights to copy. The grid has
the actual number of visits (it is dynamic), so no step is idle. The weights of a group stay in VMEM
for all its blocks if the inner axis is one block.

- A block that two groups share stays in VMEM between their visits; each stores rows of its group.
- Rows of no group are the rows of an additional group, whose visits copy nothing and store zeros.
- dx is the same kernel: an index map exchanges the axes of the weights' blocks, and the product
  contracts the last axis of the weights, so that they are not transposed in memory.
- dweights: the grid is (inner, columns, visits); the sum over the blocks of a group is in VMEM. A
  group without rows is visited once, to store zeros.

Block sizes: ``inner`` and ``columns`` count bfloat16 numbers; half as many for float32, whose
products are six of bfloat16 (and six times the code). An axis has equal blocks of at most this
size. The sizes are computed, not measured on a chip: with these rows and columns a step has more
FLOPs per byte than the chip. That ratio is highest on v6e, where a longer inner block keeps the
weights of a group in VMEM for wider inputs.
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
# contractions: of both first axes, of the plain product, of both last axes
FIRST, PLAIN, LAST = ((((a,), (b,)), ((), ())) for a, b in ((0, 0), (1, 0), (1, 1)))
# the VMEM limit of a kernel is at least this; a TPU has 64 MiB per core or more
LEAST_VMEM = 16 * 2**20


def refusal(x_md, weights_edf) -> str | None:
    """What the kernels do not support in this call, or None."""
    if x_md.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {x_md.dtype}: must be bfloat16 or float32"
    if 0 in (*x_md.shape, *weights_edf.shape):
        return f"a size of 0: x_md {x_md.shape}, weights_edf {weights_edf.shape}"
    return None


def _even(length: int, block: int, unit: int) -> int:
    """The size of equal blocks of ``length``: a multiple of ``unit``, at most ``block``."""
    if length <= block:
        return length
    most = max(block // unit, 1) * unit
    return pl.cdiv(pl.cdiv(length, pl.cdiv(length, most)), unit) * unit


def _block_sizes(sizes, dtype, rows, inner, columns):
    """The block sizes of rows, of the inner axis and of columns."""
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
    """Which of the indices ``first, first + 1, …`` along ``axis`` are in ``[start, end)``."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + first
    return (index >= start) & (index < end)


def _call(kernel, name, grid, in_specs, out_spec, out_shape, total, flops, scalars, arrays):
    blocks = [*zip(in_specs, arrays, strict=True), (out_spec, out_shape)]
    *inputs, output = (
        a.dtype.itemsize * math.prod(n for n in spec.block_shape if n) for spec, a in blocks
    )
    # two buffers for each block; masked copies of the inputs, and for float32 their three bfloat16
    # parts; the sum, and the result in its dtype
    copies = 4 if out_shape.dtype == jnp.float32 else 3
    vmem = copies * sum(inputs) + 2 * output + 2 * 4 * math.prod(total)
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


def _product_kernel(groups, contract, inner, block_rows, *refs):
    bounds_g, group_v, block_v, _, x_ref, w_ref, y_ref, total_ref = refs
    v, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    group, row = group_v[v], block_v[v] * block_rows

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(group < groups)
    def _():
        x, w = x_ref[...], w_ref[...]
        block = x.shape[1]
        if inner % block:
            # beyond the end a block has undefined values, and 0 · NaN is NaN
            remaining = inner - step * block
            x = jnp.where(_inside(x.shape, 1, 0, 0, remaining), x, 0)
            w = jnp.where(_inside(w.shape, contract[0][1][0], 0, 0, remaining), w, 0)
        total_ref[...] += _dot(x, w, contract)

    @pl.when(step == steps - 1)
    def _():
        start, end = bounds_g[group], bounds_g[group + 1]
        is_full = (start <= row) & (row + block_rows <= end)

        @pl.when(is_full)
        def _():
            y_ref[...] = total_ref[...].astype(y_ref.dtype)

        @pl.when(~is_full)
        def _():
            in_group = _inside(y_ref.shape, 0, row, start, end)
            others = y_ref[...].astype(jnp.float32)
            y_ref[...] = jnp.where(in_group, total_ref[...], others).astype(y_ref.dtype)


def _product(name, sizes, x_mk, weights, group_sizes_e, transposed):
    """The product of ``x_mk`` with the weights of each row's group, or with their transposes."""
    (m, k), (e, *matrix) = x_mk.shape, weights.shape
    n = matrix[0] if transposed else matrix[1]
    block_rows, inner, columns = _block_sizes(sizes, x_mk.dtype, m, k, n)
    steps = pl.cdiv(k, inner)

    bounds_g = bounds(group_sizes_e, m)
    first_g, number_g = touched(bounds_g, block_rows, empty=0)
    group_v, nth_v, count = visit_groups(number_g, pl.cdiv(m, block_rows) + e)
    block_v = first_g[group_v] + nth_v
    # the last visit that copies blocks; visits of rows of no group repeat its indices: no copy
    last = jnp.maximum(jnp.sum(number_g[:e]) - 1, 0)
    last_copied = jnp.stack([jnp.minimum(group_v[last], e - 1), block_v[last]])

    def copied_blocks(v, step, scalars):
        _, group_v, block_v, last_copied = scalars
        has_group = group_v[v] < e
        row = jnp.where(has_group, block_v[v], last_copied[1])
        group = jnp.where(has_group, group_v[v], last_copied[0])
        return row, group, jnp.where(has_group, step, steps - 1)

    def x_index(column, v, step, *scalars):
        row, _, step = copied_blocks(v, step, scalars)
        return row, step

    def w_index(column, v, step, *scalars):
        _, group, step = copied_blocks(v, step, scalars)
        return (group, column, step) if transposed else (group, step, column)

    return _call(
        functools.partial(_product_kernel, e, LAST if transposed else PLAIN, k, block_rows),
        name,
        (pl.cdiv(n, columns), count, steps),
        [
            pl.BlockSpec((block_rows, inner), x_index),
            pl.BlockSpec((None, columns, inner) if transposed else (None, inner, columns), w_index),
        ],
        pl.BlockSpec(
            (block_rows, columns), lambda column, v, step, *scalars: (scalars[2][v], column)
        ),
        jax.ShapeDtypeStruct((m, n), x_mk.dtype),
        (block_rows, columns),
        2 * m * k * n,
        (bounds_g, group_v, block_v, last_copied),
        (x_mk, weights),
    )


def forward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e):
    """``y_mf``."""
    return _product("grouped_matmul", sizes, x_md, weights_edf, group_sizes_e, False)


def _weights_kernel(block_rows, *refs):
    bounds_g, group_v, block_v, x_ref, dy_ref, dw_ref, total_ref = refs
    v, visits = pl.program_id(2), pl.num_programs(2)
    group, row = group_v[v], block_v[v] * block_rows
    start, end = bounds_g[group], bounds_g[group + 1]
    is_full = (start <= row) & (row + block_rows <= end)

    @pl.when((v == 0) | (group_v[jnp.maximum(v - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(is_full)
    def _():
        total_ref[...] += _dot(x_ref[...], dy_ref[...], FIRST)

    @pl.when(~is_full & (end > start))
    def _():
        # both are masked: rows of other groups may be NaN
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
    block_rows, inner, columns = _block_sizes(sizes, x_md.dtype, m, d, f)
    num_blocks = pl.cdiv(m, block_rows)

    bounds_g = bounds(group_sizes_e, m)
    first_e, number_e = touched(bounds_g[:-1], block_rows, empty=1)
    group_v, nth_v, count = visit_groups(number_e, num_blocks + e)
    # a group without rows may begin after the last row
    block_v = jnp.minimum(first_e[group_v] + nth_v, num_blocks - 1)
    dweights_edf = _call(
        functools.partial(_weights_kernel, block_rows),
        "grouped_matmul_dweights",
        (pl.cdiv(d, inner), pl.cdiv(f, columns), count),
        [
            pl.BlockSpec((block_rows, inner), lambda i, j, v, *scalars: (scalars[2][v], i)),
            pl.BlockSpec((block_rows, columns), lambda i, j, v, *scalars: (scalars[2][v], j)),
        ],
        pl.BlockSpec((None, inner, columns), lambda i, j, v, *scalars: (scalars[1][v], i, j)),
        jax.ShapeDtypeStruct((e, d, f), weights_edf.dtype),
        (inner, columns),
        2 * m * d * f,
        (bounds_g, group_v, block_v),
        (x_md, dy_mf),
    )
    return dx_md, dweights_edf
