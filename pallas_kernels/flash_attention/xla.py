"""Flash attention as loops over blocks in plain XLA, on every platform; blocks fit a CPU's cache.

Loops have dynamic bounds: a block of queries visits only the keys that it may see. A few rows of
the batch are computed at a time, so that a block of scores stays in the cache.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.ranges import Extremes, Visit, all_see, extremes, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, biased_gradient, sees_a_key
from pallas_kernels.mask import Mask, sees

# The most numbers in a block of scores, over all heads and the rows that are computed at a time.
# A larger block would not stay in the last-level cache between the products.
SCORES = 2**20
# Causal calls with at least this many queries have blocks of at most a quarter of their length. On
# a CPU, 256 tokens then take 0.6 of the time of a single block; 128 tokens would take more.
CUT = 256


class _Blocks(NamedTuple):
    """Arrays of queries or of keys in ``n`` blocks, with the block's index first."""

    positions: jax.Array  # [n, rows, block]
    segments: jax.Array
    until: jax.Array | None
    see: Extremes  # over all rows, [n]


def _blocks(positions, segments, until, size: int) -> _Blocks:
    of_rows = extremes(positions, segments, size, until)  # [rows, n]
    see = Extremes(
        of_rows.low.min(0),
        of_rows.high.max(0),
        of_rows.lowest.min(0),
        of_rows.first_segment.min(0),
        of_rows.last_segment.max(0),
        None if of_rows.reach is None else of_rows.reach.max(0),
        None if of_rows.least_reach is None else of_rows.least_reach.min(0),
    )
    until = None if until is None else _split(until, size, 1)
    return _Blocks(_split(positions, size, 1), _split(segments, size, 1), until, see)


def _sides(mask: Mask, plan: "_Plan") -> tuple[_Blocks, _Blocks]:
    """The blocks of queries and of keys of a `_padded` mask."""
    q = mask.q_positions_bt, mask.q_segments_bt, mask.until_bt
    k = mask.k_positions_bs, mask.k_segments_bs, None
    return _blocks(*q, plan.query), _blocks(*k, plan.key)


def _split(a: jax.Array, size: int, axis: int) -> jax.Array:
    """``a`` with ``axis`` in blocks of ``size``; the block's index is the first axis."""
    shape = (*a.shape[:axis], -1, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a.reshape(shape), axis, 0)


def _join(a: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(a, 0, axis)
    return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])


def _pad(a: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """``a`` with ``axis`` padded to a multiple of ``size``."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % size)
    return jnp.pad(a, widths, constant_values=value) if widths[axis][1] else a


class _Plan(NamedTuple):
    """Block lengths of queries and of keys, and rows of the batch that are computed at a time."""

    query: int
    key: int
    rows: int


def _plan(spec: Spec, sizes: Mapping[str, int], b: int, t: int, h: int, s: int) -> _Plan:
    query, key = min(sizes["query"], t), min(sizes["key"], s)
    if spec.causal and t >= CUT:
        # nothing is skipped within a block: a single block would be twice the work
        quarter = 2 ** int(math.log2(max(t, s) / 4))
        query, key = min(query, quarter), min(key, quarter)
    most = max(1, SCORES // (h * query * key))
    rows = max(r for r in range(1, b + 1) if b % r == 0 and r <= most)
    return _Plan(query, key, rows)


def _heads_first(plan, q_bthc, k_bskc, v_bskc):
    """``q_bkgtc, k_bksc, v_bksc``, padded to full blocks."""
    b, _, h, c = q_bthc.shape
    k = k_bskc.shape[2]
    q = jnp.swapaxes(_pad(q_bthc, 1, plan.query), 1, 2).reshape(b, k, h // k, -1, c)
    return q, *(jnp.swapaxes(_pad(a, 1, plan.key), 1, 2) for a in (k_bskc, v_bskc))


def _padded(plan: "_Plan", mask: Mask) -> Mask:
    """``mask`` padded to full blocks."""
    t, s = mask.q_positions_bt.shape[1], mask.k_positions_bs.shape[1]
    return mask.padded(t + -t % plan.query, s + -s % plan.key)


def _by_rows(plan: _Plan, function, *arguments):
    """``function(*arguments)``, computed for ``plan.rows`` rows of the batch at a time."""
    b = jax.tree.leaves(arguments)[0].shape[0]
    if plan.rows == b:
        return function(*arguments)
    groups = jax.tree.map(lambda a: a.reshape(-1, plan.rows, *a.shape[1:]), arguments)
    results = jax.lax.map(lambda a: function(*a), groups)
    return jax.tree.map(lambda a: a.reshape(b, *a.shape[2:]), results)


def _slopes(slopes_h, k: int, dtype):
    return None if slopes_h is None else slopes_h.astype(dtype).reshape(k, -1)[..., None, None]


def _scores(spec, acc_dtype, slopes, q_rkgtc, k_rksc, q: _Blocks, k: _Blocks, i, j, masked: bool):
    """A block of scores ``[r, k, g, t, s]``, and whether each query sees each key (None: all)."""
    scores = jnp.einsum("rkgtc,rksc->rkgts", q_rkgtc, k_rksc, preferred_element_type=acc_dtype)
    q_at = q.positions[i][:, None, None, :, None]
    k_at = k.positions[j][:, None, None, None, :]
    scores = biased(spec, scores, q_at - k_at, slopes)
    if not masked:
        return scores, None
    q_in = k_in = until = None
    if spec.packed:
        q_in = q.segments[i][:, None, None, :, None]
        k_in = k.segments[j][:, None, None, None, :]
    if q.until is not None:
        until = q.until[i][:, None, None, :, None]
    return scores, sees(spec, q_at, k_at, q_in, k_in, until)


def forward(
    spec: Spec,
    sizes: Mapping[str, int],
    q_bthc,
    k_bskc,
    v_bskc,
    mask: Mask,
    slopes_h,
    sinks_h,
):
    """``y_bthc, lse_bht``; arguments as in `reference.attention`."""
    b, t, h, c = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    if t * h < k * c:
        return reference.attention(spec, q_bthc, k_bskc, v_bskc, mask, slopes_h, sinks_h)
    acc_dtype = jnp.promote_types(jnp.float32, q_bthc.dtype)
    plan = _plan(spec, sizes, b, t, h, s)
    slopes = _slopes(slopes_h, k, acc_dtype)
    sinks = None if sinks_h is None else sinks_h.astype(acc_dtype).reshape(k, h // k)[..., None]

    def rows(q_rkgtc, k_rksc, v_rksc, mask):
        q_side, k_side = _sides(mask, plan)
        q_n, k_n, v_n = (
            _split(q_rkgtc, plan.query, 3),
            _split(k_rksc, plan.key, 2),
            _split(v_rksc, plan.key, 2),
        )

        def block_of_queries(_, i):
            q_extremes = jax.tree.map(lambda a: a[i], q_side.see)
            q_i = q_n[i]
            visit = Visit.of(
                may_see(spec, q_extremes, k_side.see), all_see(spec, q_extremes, k_side.see)
            )

            def body(j, carry, masked):
                top, total, y = carry
                scores, seen = _scores(
                    spec, acc_dtype, slopes, q_i, k_n[j], q_side, k_side, i, j, masked
                )
                if seen is not None:
                    scores = jnp.where(seen, scores, MASKED)
                new_top = jnp.maximum(top, scores.max(-1))
                # a barrier: without it, XLA computes the exponentials once more for the sum
                weights = jax.lax.optimization_barrier(jnp.exp(scores - new_top[..., None]))
                shrink = jnp.exp(top - new_top)
                total = total * shrink + weights.sum(-1)
                y = y * shrink[..., None] + jnp.einsum(
                    "rkgts,rksc->rkgtc",
                    weights.astype(v_n.dtype),
                    v_n[j],
                    preferred_element_type=acc_dtype,
                )
                return new_top, total, y

            row = (plan.rows, k, h // k, plan.query)
            start = (
                jnp.full(row, MASKED, acc_dtype),
                jnp.zeros(row, acc_dtype),
                jnp.zeros((*row, c), acc_dtype),
            )
            masked, unmasked = (functools.partial(body, masked=m) for m in (True, False))
            top, total, y = visit.loop(masked, unmasked, start)
            sees_any = sees_a_key(top)
            if sinks is not None:
                new_top = jnp.maximum(top, sinks)
                shrink = jnp.where(sees_any, jnp.exp(top - new_top), 0)
                total = total * shrink + jnp.exp(sinks - new_top)
                y, top = y * shrink[..., None], new_top
            else:
                total = jnp.where(sees_any, total, 1)
            y = jnp.where(sees_any[..., None], y / total[..., None], 0).astype(q_bthc.dtype)
            return None, (y, top + jnp.log(total))

        _, (y, lse) = jax.lax.scan(block_of_queries, None, jnp.arange(q_n.shape[0]))
        return _join(y, 3), _join(lse, 3)

    y_bkgtc, lse_bkgt = _by_rows(
        plan,
        rows,
        *_heads_first(plan, q_bthc, k_bskc, v_bskc),
        _padded(plan, mask),
    )
    y_bthc = jnp.swapaxes(y_bkgtc.reshape(b, h, -1, c), 1, 2)[:, :t]
    return y_bthc, lse_bkgt.reshape(b, h, -1)[..., :t]


def backward(
    spec: Spec,
    sizes: Mapping[str, int],
    q_bthc,
    k_bskc,
    v_bskc,
    mask: Mask,
    slopes_h,
    sinks_h,
    lse_bht,
    delta_bht,
    dy_bthc,
):
    """``dq_bthc, dk_bskc, dv_bskc``; ``delta_bht`` is Δ in the docstring of the package."""
    del sinks_h  # the log-sum-exp contains them
    b, t, h, c = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    acc_dtype = lse_bht.dtype
    plan = _plan(spec, sizes, b, t, h, s)
    slopes = _slopes(slopes_h, k, acc_dtype)

    def rows(q_rkgtc, k_rksc, v_rksc, dy_rkgtc, lse, delta, mask):
        q_side, k_side = _sides(mask, plan)
        q_n, dy_n = (_split(a, plan.query, 3) for a in (q_rkgtc, dy_rkgtc))
        k_n, v_n = (_split(a, plan.key, 2) for a in (k_rksc, v_rksc))
        lse_n, delta_n = (_split(a, plan.query, 3) for a in (lse, delta))
        # channels first, once: otherwise XLA:CPU transposes every block of weights to sum over
        # queries, which costs more than the product
        q_channels_first, dy_channels_first = (jnp.moveaxis(a, -1, 3) for a in (q_n, dy_n))

        def block_of_keys(dq_n, j):
            k_extremes = jax.tree.map(lambda a: a[j], k_side.see)
            k_j, v_j = k_n[j], v_n[j]
            visit = Visit.of(
                may_see(spec, q_side.see, k_extremes), all_see(spec, q_side.see, k_extremes)
            )

            def body(i, carry, masked):
                dq_n, dk, dv = carry
                scores, seen = _scores(
                    spec, acc_dtype, slopes, q_n[i], k_j, q_side, k_side, i, j, masked
                )
                # ≤ 0, except for rounding of the recomputed scores, which must not overflow
                weights = jnp.exp(jnp.minimum(scores - lse_n[i][..., None], 0))
                if seen is not None:
                    weights = jnp.where(seen, weights, 0)
                d_weights = jnp.einsum(
                    "rkgtc,rksc->rkgts", dy_n[i], v_j, preferred_element_type=acc_dtype
                )
                d_scores = weights * (d_weights - delta_n[i][..., None])
                d_scores = biased_gradient(spec, scores, d_scores).astype(q_n.dtype)
                weights, d_scores = jax.lax.optimization_barrier(
                    (weights.astype(dy_n.dtype), d_scores)
                )

                def sum_queries(left, right):
                    return jnp.einsum(
                        "rkcgt,rkgts->rkcs", left[i], right, preferred_element_type=acc_dtype
                    )

                dq = jnp.einsum(
                    "rkgts,rksc->rkgtc", d_scores, k_j, preferred_element_type=acc_dtype
                )
                dk += sum_queries(q_channels_first, d_scores)
                dv += sum_queries(dy_channels_first, weights)
                return dq_n.at[i].add(dq), dk, dv

            zeros = jnp.zeros_like(k_n[0], acc_dtype).swapaxes(-1, -2)
            masked, unmasked = (functools.partial(body, masked=m) for m in (True, False))
            dq_n, dk, dv = visit.loop(masked, unmasked, (dq_n, zeros, zeros))
            dk, dv = (jnp.swapaxes(a, -1, -2) for a in (dk, dv))
            return dq_n, (dk.astype(k_n.dtype), dv.astype(v_n.dtype))

        dq_n = jnp.zeros(q_n.shape, acc_dtype)
        dq_n, (dk_n, dv_n) = jax.lax.scan(block_of_keys, dq_n, jnp.arange(k_n.shape[0]))
        return _join(dq_n, 3).astype(q_n.dtype), _join(dk_n, 2), _join(dv_n, 2)

    q, k_bksc, v_bksc = _heads_first(plan, q_bthc, k_bskc, v_bskc)
    dy = jnp.swapaxes(_pad(dy_bthc, 1, plan.query), 1, 2).reshape(q.shape)
    by_row = [_pad(a, 2, plan.query).reshape(b, k, h // k, -1) for a in (lse_bht, delta_bht)]
    mask = _padded(plan, mask)
    dq, dk, dv = _by_rows(plan, rows, q, k_bksc, v_bksc, dy, *by_row, mask)
    dq_bthc = jnp.swapaxes(dq.reshape(b, h, -1, c), 1, 2)[:, :t]
    return dq_bthc, *(jnp.swapaxes(a, 1, 2)[:, :length] for a, length in ((dk, s), (dv, s)))
