"""The grouped matmul and its two gradients without a kernel, on every platform.

Except on a CPU they are XLA's ragged products (`jax.lax.ragged_dot_general`). On a CPU XLA lowers
these as dense products of all rows with all experts, and copies the rows for each expert: with 8
experts they take several times as long as 8 dense products. So a program for a CPU iterates over
the groups with rows, copies a group's weights once, and multiplies its rows in chunks: full chunks
of ``rows``, then chunks of an eighth of it. The time is that of one dense product for each group
with static sizes, or slightly more, in both passes; only the weights of one group are copied. A
chunk may contain rows of other groups; it stores only rows of its group.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.visits import bounds

# contract d with d or f with f; the rows m are ragged
_FORWARD = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_INPUT = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
# contract the ragged rows: one product for each group
_WEIGHTS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def forward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e):
    """``y_mf``."""

    def on_cpu(x_md, weights_edf, group_sizes_e):
        return _rows_by_chunks(sizes["rows"], x_md, weights_edf, group_sizes_e, 0)

    def on_others(x_md, weights_edf, group_sizes_e):
        x_md = _grouped(x_md, group_sizes_e)
        y_mf = _grouped(_ragged(x_md, weights_edf, group_sizes_e, _FORWARD), group_sizes_e)
        return y_mf.astype(x_md.dtype)

    return jax.lax.platform_dependent(
        x_md, weights_edf, group_sizes_e, cpu=on_cpu, default=on_others
    )


def backward(sizes: Mapping[str, int], x_md, weights_edf, group_sizes_e, dy_mf):
    """``dx_md, dweights_edf``."""

    def on_cpu(x_md, weights_edf, group_sizes_e, dy_mf):
        dx_md = _rows_by_chunks(sizes["rows"], dy_mf, weights_edf, group_sizes_e, 1)
        return dx_md, _weights_by_chunks(sizes["rows"], x_md, dy_mf, group_sizes_e)

    def on_others(x_md, weights_edf, group_sizes_e, dy_mf):
        x_md, dy_mf = _grouped(x_md, group_sizes_e), _grouped(dy_mf, group_sizes_e)
        dx_md = _grouped(_ragged(dy_mf, weights_edf, group_sizes_e, _INPUT), group_sizes_e)
        dweights_edf = _ragged(x_md, dy_mf, group_sizes_e, _WEIGHTS)
        return dx_md.astype(x_md.dtype), dweights_edf.astype(weights_edf.dtype)

    return jax.lax.platform_dependent(
        x_md, weights_edf, group_sizes_e, dy_mf, cpu=on_cpu, default=on_others
    )


def _ragged(a, b, group_sizes_e, dimensions):
    return jax.lax.ragged_dot_general(
        a, b, group_sizes_e, dimensions, preferred_element_type=_wide(a)
    )


def _wide(a):
    return jnp.promote_types(a.dtype, jnp.float32)


def _grouped(a_m, group_sizes_e):
    """``a_m`` with rows of no group set to 0, also if they are NaN."""
    inside_m = jnp.arange(a_m.shape[0]) < jnp.sum(group_sizes_e)
    return jnp.where(inside_m[:, None], a_m, 0)


def _each_group(group_sizes_e, carry, visit: Callable):
    """``carry = visit(group, carry)`` for each group that has rows."""
    e = group_sizes_e.shape[0]
    (busy_e,) = jnp.nonzero(group_sizes_e, size=e, fill_value=0)
    count = jnp.sum(group_sizes_e > 0)
    return jax.lax.fori_loop(0, count, lambda n, carry: visit(busy_e[n], carry), carry)


def _each_chunk(start, end, rows: int, most: int, carry, visit: Callable):
    """``carry = visit(row_start, in_range, size, carry)`` for chunks of the rows ``[start, end)``.

    A chunk has ``size`` rows from ``row_start``; ``in_range``, ``[size, 1]``, masks those that
    belong to it. The last chunk begins earlier, so that it does not exceed the ``most`` rows.
    """
    full_size, small_size = min(rows, most), min(max(rows // 8, 1), most)
    # full chunks, then small ones, of which the last may be incomplete
    for size, round_up in ((full_size, 0), (small_size, small_size - 1)):
        chunks = (end - start + round_up) // size

        def visit_chunk(n, carry, start=start, size=size):
            begin = start + n * size
            row_start = jnp.minimum(begin, most - size)
            row = row_start + jnp.arange(size, dtype=jnp.int32)
            return visit(row_start, ((row >= begin) & (row < end))[:, None], size, carry)

        carry = jax.lax.fori_loop(0, chunks, visit_chunk, carry)
        start = start + chunks * size
    return carry


def _rows_by_chunks(rows, x_mk, weights, group_sizes_e, contracted: int):
    """The product of each row with its group's weights, along their axis ``contracted``."""
    m, n = x_mk.shape[0], weights.shape[2 - contracted]
    bounds_g = bounds(group_sizes_e, m)

    def group(g, y_mn):
        matrix = jax.lax.dynamic_index_in_dim(weights, g, keepdims=False).astype(_wide(weights))

        def chunk(row_start, in_range, size, y_mn):
            x = jax.lax.dynamic_slice_in_dim(x_mk, row_start, size).astype(matrix.dtype)
            y = jax.lax.dot_general(x, matrix, (((1,), (contracted,)), ((), ())))
            others = jax.lax.dynamic_slice_in_dim(y_mn, row_start, size)
            y = jnp.where(in_range, y.astype(y_mn.dtype), others)
            return jax.lax.dynamic_update_slice_in_dim(y_mn, y, row_start, 0)

        return _each_chunk(bounds_g[g], bounds_g[g + 1], rows, m, y_mn, chunk)

    return _each_group(group_sizes_e, jnp.zeros((m, n), x_mk.dtype), group)


def _weights_by_chunks(rows, x_md, dy_mf, group_sizes_e):
    """For each group, its rows of ``x_md`` transposed times those of ``dy_mf``."""
    (m, d), f = x_md.shape, dy_mf.shape[1]
    bounds_g = bounds(group_sizes_e, m)
    wide = _wide(x_md)

    def group(g, dweights_edf):
        def chunk(row_start, in_range, size, total_df):
            x, dy = (
                jnp.where(in_range, jax.lax.dynamic_slice_in_dim(a, row_start, size), 0).astype(
                    wide
                )
                for a in (x_md, dy_mf)
            )
            # on a CPU, XLA's product is fast over the last axis of its left factor only
            return total_df + x.T @ dy

        total_df = jnp.zeros((d, f), wide)
        total_df = _each_chunk(bounds_g[g], bounds_g[g + 1], rows, m, total_df, chunk)
        return jax.lax.dynamic_update_index_in_dim(
            dweights_edf, total_df.astype(dweights_edf.dtype), g, 0
        )

    zeros_edf = jnp.zeros((group_sizes_e.shape[0], d, f), x_md.dtype)
    return _each_group(group_sizes_e, zeros_edf, group)
