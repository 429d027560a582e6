"""The grouped matmul on an NVIDIA GPU: Pallas kernels for tensor cores, compiled by Triton.

A kernel can address any row here, so blocks of rows begin where their group does: a visit
(`visits`) is a block of one group, and only rows of this group are stored. A program of the product
computes one visit and one block of columns. The grid has the largest possible number of visits;
those after the last do nothing. A few blocks of columns go through all visits before the next few,
so that consecutive programs share rows and weights in the cache.

Arrays are not padded to full blocks: the last block of rows, columns or the inner axis begins
earlier, so that it ends with the array. What it shares with the block before is computed twice with
the same result, or is masked in the sum. Only axes shorter than 16, the minimum of a tensor core,
are padded.

- dx is the same kernel over the other axis of the weights.
- dweights: a program computes a block of one group's weights as a sum over the rows of the group.
- Rows of no group are the rows of an additional group, whose visits store zeros.

Blocks: ``rows`` and ``columns`` are those that a program stores, ``inner`` those that it sums over
at a time; half as many for float32, whose products have two operands each (`triton_kernels`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.grouped_matmul.visits import bounds, visit_groups
from pallas_kernels.triton_kernels import FIRST, LAST, PLAIN, dot, named

# the minimum size of an axis in a product of tensor cores
LEAST = 16
# the number of blocks of columns that go through the visits together
BUNDLE = 8


def refusal(x_md, weights_edf) -> str | None:
    """What the kernels do not support in this call, or None."""
    if x_md.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {x_md.dtype}: must be bfloat16, float16 or float32"
    if 0 in (*x_md.shape, *weights_edf.shape):
        return f"a size of 0: x_md {x_md.shape}, weights_edf {weights_edf.shape}"
    return None


def _block(size: int, length: int, dtype) -> int:
    """A power of 2: at most ``length``, and ``size`` numbers of 2 bytes; at least `LEAST`."""
    most = min(size * 2 // dtype.itemsize, length)
    return max(1 << (most.bit_length() - 1), LEAST)


def _padded(a, *axes):
    """``a`` with ``axes`` padded to at least `LEAST`."""
    widths = [(0, max(LEAST - n, 0) if i in axes else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths)


def _begin_of_block(n, block: int, length: int):
    """The begin of block ``n``; the last block begins earlier if it would exceed ``length``."""
    return jnp.minimum(n * block, length - block)


def _product_kernel(groups, transposed, bundle, block_rows, inner, columns, *refs):
    begin_v, end_v, group_v, count, x_ref, w_ref, y_ref = refs
    v = jax.lax.div(pl.program_id(0), bundle)
    column = pl.program_id(1) * bundle + jax.lax.rem(pl.program_id(0), bundle)
    (m, k), n = x_ref.shape, y_ref.shape[1]

    @pl.when((v < count[0]) & (column * columns < n))
    def _():
        begin, end, group = begin_v[v], end_v[v], group_v[v]
        row_start = jnp.minimum(begin, m - block_rows)
        rows, column_slice = (
            pl.ds(row_start, block_rows),
            pl.ds(_begin_of_block(column, columns, n), columns),
        )

        def step(i, total):
            start = _begin_of_block(i, inner, k)
            inner_slice = pl.ds(start, inner)
            x = x_ref[rows, inner_slice]
            if k % inner:
                # without what the block before contains
                x = jnp.where(start + jnp.arange(inner) >= i * inner, x, 0)
            w = (
                w_ref[group, column_slice, inner_slice]
                if transposed
                else w_ref[group, inner_slice, column_slice]
            )
            return total + dot(x, w, LAST if transposed else PLAIN)

        # rows of no group: zero steps
        steps = (group < groups).astype(jnp.int32) * pl.cdiv(k, inner)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((block_rows, columns), jnp.float32))
        row = row_start + jnp.arange(block_rows)
        in_group = ((row >= begin) & (row < end))[:, None]
        triton.store(y_ref.at[rows, column_slice], total.astype(y_ref.dtype), mask=in_group)


def _product(name, sizes, x_mk, weights, group_sizes_e, transposed):
    """The product of ``x_mk`` with the weights of each row's group, or with their transposes."""
    m, e, n = x_mk.shape[0], weights.shape[0], weights.shape[1 if transposed else 2]
    x_mk, weights = _padded(x_mk, 0, 1), _padded(weights, 1, 2)
    k, wide = x_mk.shape[1], max(n, LEAST)
    block_rows, inner, columns = (
        _block(sizes[size], length, x_mk.dtype)
        for size, length in (("rows", x_mk.shape[0]), ("inner", k), ("columns", wide))
    )
    bounds_g = bounds(group_sizes_e, m)
    number_g = (bounds_g[1:] - bounds_g[:-1] + block_rows - 1) // block_rows
    most = pl.cdiv(m, block_rows) + e + 1
    group_v, nth_v, count = visit_groups(number_g, most)
    begin_v = bounds_g[group_v] + nth_v * block_rows
    end_v = jnp.minimum(begin_v + block_rows, bounds_g[group_v + 1])
    blocks = pl.cdiv(wide, columns)
    bundle = min(BUNDLE, blocks)
    y_mn = pl.pallas_call(
        named(name, _product_kernel, e, transposed, bundle, block_rows, inner, columns),
        # only the first axis of a grid may be longer than 65,535
        grid=(most * bundle, pl.cdiv(blocks, bundle)),
        out_shape=jax.ShapeDtypeStruct((x_mk.shape[0], wide), x_mk.dtype),
        compiler_params=triton.CompilerParams(num_warps=_warps(block_rows, columns), num_stages=3),
        name=name,
    )(begin_v, end_v, group_v, count[None], x_mk, weights)
    return y_mn[:m, :n]


def _warps(rows: int, columns: int) -> int:
    """The number of warps: one for each 32 × 32 numbers that a program sums, at most 8."""
    return min(max(rows * columns // 1024, 1), 8)


def forward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e):
    """``y_mf``."""
    return _product("grouped_matmul", sizes, x_md, weights_edf, group_sizes_e, False)


def _weights_kernel(rows, columns, inner, *refs):
    bounds_g, x_ref, dy_ref, dw_ref = refs
    group = pl.program_id(2)
    (m, d), f = x_ref.shape, dy_ref.shape[1]
    row_slice = pl.ds(_begin_of_block(pl.program_id(0), rows, d), rows)
    column_slice = pl.ds(_begin_of_block(pl.program_id(1), columns, f), columns)
    start, end = bounds_g[group], bounds_g[group + 1]

    def step(i, total):
        begin = start + i * inner
        row_start = jnp.minimum(begin, m - inner)
        row = row_start + jnp.arange(inner)
        in_group = ((row >= begin) & (row < end))[:, None]
        # both are masked: rows of other groups may be NaN
        x = jnp.where(in_group, x_ref[pl.ds(row_start, inner), row_slice], 0)
        dy = jnp.where(in_group, dy_ref[pl.ds(row_start, inner), column_slice], 0)
        return total + dot(x, dy, FIRST)

    steps = (end - start + inner - 1) // inner
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    dw_ref[group, row_slice, column_slice] = total.astype(dw_ref.dtype)


def backward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e, dy_mf):
    """``dx_md, dweights_edf``."""
    dx_md = _product("grouped_matmul_dx", sizes, dy_mf, weights_edf, group_sizes_e, True)
    (m, d), (e, _, f) = x_md.shape, weights_edf.shape
    x_md, dy_mf = _padded(x_md, 0, 1), _padded(dy_mf, 0, 1)
    tall, wide = x_md.shape[1], dy_mf.shape[1]
    rows, columns, inner = (
        _block(sizes[size], length, x_md.dtype)
        for size, length in (("rows", tall), ("columns", wide), ("inner", x_md.shape[0]))
    )
    name = "grouped_matmul_dweights"
    dweights_edf = pl.pallas_call(
        named(name, _weights_kernel, rows, columns, inner),
        grid=(pl.cdiv(tall, rows), pl.cdiv(wide, columns), e),
        out_shape=jax.ShapeDtypeStruct((e, tall, wide), weights_edf.dtype),
        compiler_params=triton.CompilerParams(num_warps=_warps(rows, columns), num_stages=3),
        name=name,
    )(bounds(group_sizes_e, m), x_md, dy_mf)
    return dx_md, dweights_edf[:, :d, :f]
