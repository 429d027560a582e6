"""The grouped matmul on an NVIDIA GPU: Pallas kernels for its tensor cores, compiled by Triton.

Addresses are free here, so tiles of rows begin where their group does: a visit (`visits`) is a tile
of one group, and only its own rows are stored. A program of the product takes a visit and a block
of columns; the grid has as many visits as there may be, and those beyond the last do nothing. A few
blocks of columns go through all the visits before the next few begin, so that neighbours in time
share rows and weights in the cache.

Nothing is copied to make blocks fit: a last block, of rows, columns or the inner axis, begins early
rather than beyond the end, and what it has in common with the one before is computed twice alike or
left out of the sum. Only axes shorter than a tensor core's, 16, are padded.

- dx is the same kernel over the other axis of the weights.
- dweights: a program takes a block of one group's weights and sums over the rows of the group.
- Rows of no group are the rows of one more group, whose visits store zeros.

Blocks: ``rows`` and ``columns`` of what a program stores, ``inner`` of what it sums over at a time;
half as many of float32, whose products take twice the operands (`triton_kernels`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.grouped_matmul.visits import bounds, visit_groups
from pallas_kernels.triton_kernels import FIRST, LAST, PLAIN, dot, named

# the least side of a tensor core's product
LEAST = 16
# blocks of columns that go through the visits together
BUNDLE = 8


def refusal(x_md, weights_edf) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if x_md.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {x_md.dtype}: it takes bfloat16, float16 and float32"
    if 0 in (*x_md.shape, *weights_edf.shape):
        return f"a size is 0: x_md {x_md.shape}, weights_edf {weights_edf.shape}"
    return None


def _block(size: int, length: int, dtype) -> int:
    """A power of 2, at most ``size`` of 2 bytes and ``length``, and at least `LEAST`."""
    most = min(size * 2 // dtype.itemsize, length)
    return max(1 << (most.bit_length() - 1), LEAST)


def _fits(a, *axes):
    """``a`` with ``axes`` of at least `LEAST`."""
    widths = [(0, max(LEAST - n, 0) if i in axes else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths)


def _early(n, block: int, length: int):
    """Where block ``n`` begins: the last not beyond the end."""
    return jnp.minimum(n * block, length - block)


def _product_kernel(groups, transposed, bundle, tile, inner, columns, *refs):
    begin_v, end_v, group_v, count, x_ref, w_ref, y_ref = refs
    v = jax.lax.div(pl.program_id(0), bundle)
    column = pl.program_id(1) * bundle + jax.lax.rem(pl.program_id(0), bundle)
    (m, k), n = x_ref.shape, y_ref.shape[1]

    @pl.when((v < count[0]) & (column * columns < n))
    def _():
        begin, end, group = begin_v[v], end_v[v], group_v[v]
        at = jnp.minimum(begin, m - tile)
        rows, across = pl.ds(at, tile), pl.ds(_early(column, columns, n), columns)

        def step(i, total):
            start = _early(i, inner, k)
            here = pl.ds(start, inner)
            x = x_ref[rows, here]
            if k % inner:
                # what the block before had
                x = jnp.where(start + jnp.arange(inner) >= i * inner, x, 0)
            w = w_ref[group, across, here] if transposed else w_ref[group, here, across]
            return total + dot(x, w, LAST if transposed else PLAIN)

        # rows of no group multiply nothing
        steps = (group < groups).astype(jnp.int32) * pl.cdiv(k, inner)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile, columns), jnp.float32))
        row = at + jnp.arange(tile)
        own = ((row >= begin) & (row < end))[:, None]
        triton.store(y_ref.at[rows, across], total.astype(y_ref.dtype), mask=own)


def _product(name, sizes, x_mk, weights, group_sizes_e, transposed):
    """``x_mk`` times the weights of each row's group, or times their transposes."""
    m, e, n = x_mk.shape[0], weights.shape[0], weights.shape[1 if transposed else 2]
    x_mk, weights = _fits(x_mk, 0, 1), _fits(weights, 1, 2)
    k, wide = x_mk.shape[1], max(n, LEAST)
    tile, inner, columns = (
        _block(sizes[size], length, x_mk.dtype)
        for size, length in (("rows", x_mk.shape[0]), ("inner", k), ("columns", wide))
    )
    bounds_g = bounds(group_sizes_e, m)
    number_g = (bounds_g[1:] - bounds_g[:-1] + tile - 1) // tile
    most = pl.cdiv(m, tile) + e + 1
    group_v, nth_v, count = visit_groups(number_g, most)
    begin_v = bounds_g[group_v] + nth_v * tile
    end_v = jnp.minimum(begin_v + tile, bounds_g[group_v + 1])
    blocks = pl.cdiv(wide, columns)
    bundle = min(BUNDLE, blocks)
    y_mn = pl.pallas_call(
        named(name, _product_kernel, e, transposed, bundle, tile, inner, columns),
        # a grid's first axis alone may be longer than 65,535
        grid=(most * bundle, pl.cdiv(blocks, bundle)),
        out_shape=jax.ShapeDtypeStruct((x_mk.shape[0], wide), x_mk.dtype),
        compiler_params=triton.CompilerParams(num_warps=_warps(tile, columns), num_stages=3),
        name=name,
    )(begin_v, end_v, group_v, count[None], x_mk, weights)
    return y_mn[:m, :n]


def _warps(rows: int, columns: int) -> int:
    """One for each 32 × 32 numbers that a program sums, at most 8."""
    return min(max(rows * columns // 1024, 1), 8)


def forward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e):
    """``y_mf``."""
    return _product("grouped_matmul", sizes, x_md, weights_edf, group_sizes_e, False)


def _weights_kernel(rows, columns, inner, *refs):
    bounds_g, x_ref, dy_ref, dw_ref = refs
    group = pl.program_id(2)
    (m, d), f = x_ref.shape, dy_ref.shape[1]
    down = pl.ds(_early(pl.program_id(0), rows, d), rows)
    across = pl.ds(_early(pl.program_id(1), columns, f), columns)
    start, end = bounds_g[group], bounds_g[group + 1]

    def step(i, total):
        begin = start + i * inner
        at = jnp.minimum(begin, m - inner)
        row = at + jnp.arange(inner)
        own = ((row >= begin) & (row < end))[:, None]
        # both: what is not of the group may be NaN
        x = jnp.where(own, x_ref[pl.ds(at, inner), down], 0)
        dy = jnp.where(own, dy_ref[pl.ds(at, inner), across], 0)
        return total + dot(x, dy, FIRST)

    steps = (end - start + inner - 1) // inner
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    dw_ref[group, down, across] = total.astype(dw_ref.dtype)


def backward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e, dy_mf):
    """``dx_md, dweights_edf``."""
    dx_md = _product("grouped_matmul_dx", sizes, dy_mf, weights_edf, group_sizes_e, True)
    (m, d), (e, _, f) = x_md.shape, weights_edf.shape
    x_md, dy_mf = _fits(x_md, 0, 1), _fits(dy_mf, 0, 1)
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
