"""The state-space duality in plain XLA, on every platform: matrix products, chunk by chunk.

A scan over chunks carries the state; all rows and heads of a chunk are one batch of products.
Arrays within a chunk have its length squared for each head, and are not stored: the forward pass
stores the state at the beginning of each chunk, and the backward pass recomputes all else.

Exponents: a decay over several tokens is ``exp`` of a difference of cumulative sums, whose rounding
error is relative to the sums. After tokens with very strong decay, a decay of 1 would be wrong in
the fourth digit. So each logarithm is the sum of a multiple of 2^−9, whose sums and differences are
exact, and a remainder of at most 2^−10 (`_decays`).

The gradient of the logarithm at token ``r`` is the sum over all paths across it: from a token
before ``r`` or from the first state, to an output at or after ``r`` or to the last state. Each of
these four is summed separately, so that the gradient of a token with decay 0 is 0. (The difference
of outgoing and incoming terms, ``Σ_{t ≥ r} dy_t · y_t − df_t · f_t``, is cheaper, but has the
rounding error of all of the chunk.)
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# e^−64 is negligible in any float32 sum, and the logarithms of 256 such tokens have an exact sum
LEAST_LOG = -64.0
GRAIN = 2.0**-9


def _chunks(sizes: Mapping[str, int], groups: int, x, dt, b, c, reset, *like_x):
    """Arrays in chunks, with time after heads: ``[chunks, b, g, r, q, …]``; ``b``, ``c``: no ``r``.

    All chunks have the same length, at most ``sizes["chunk"]``; padding does not change the state.
    """
    t = x.shape[1]
    chunks = math.ceil(t / sizes["chunk"])
    length = math.ceil(t / chunks)

    def cut(a, *heads):
        a = jnp.pad(a, ((0, 0), (0, chunks * length - t), *[(0, 0)] * (a.ndim - 2)))
        a = a.reshape(a.shape[0], chunks, length, *heads, *a.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(a, 1, 0), 2, 2 + len(heads))

    def by_head(a):
        return cut(a, groups, a.shape[2] // groups)

    chunked = by_head(x), by_head(dt), cut(b, groups), cut(c, groups), cut(reset)
    return *chunked, *map(by_head, like_x)


def _joined(a, t: int, heads: int):
    """The inverse of `_chunks`; the ``heads`` axes, of groups and their heads, become one."""
    a = jnp.moveaxis(jnp.moveaxis(a, 2 + heads, 2), 0, 1)
    count = math.prod(a.shape[3 : 3 + heads])
    return a.reshape(a.shape[0], -1, count, *a.shape[3 + heads :])[:, :t]


def _decays(log, begins):
    """``exp(Σ log)`` over the tokens ``u + 1, …, t``: ``[…, t, u]``.

    It is 0 if ``u > t`` or if a segment begins in between.
    """
    log = jnp.maximum(log, LEAST_LOG)
    coarse = jnp.round(log / GRAIN) * GRAIN
    coarse, fine, segment = (
        jnp.cumsum(a, -1) for a in (coarse, log - coarse, begins.astype(jnp.int32))
    )

    def between(a):
        return a[..., :, None] - a[..., None, :]

    seen = jnp.tri(log.shape[-1], dtype=bool) & (between(segment) == 0)
    return jnp.exp(jnp.where(seen, between(coarse) + between(fine), -jnp.inf))


def _from_start(log, begins):
    """``exp(Σ log)`` over the tokens up to each; 0 from the first begin of a segment on."""
    continues = jnp.cumsum(begins.astype(jnp.int32), -1) == 0
    return jnp.where(continues, jnp.exp(jnp.cumsum(jnp.maximum(log, LEAST_LOG), -1)), 0)


def _products(operand, acc_dtype) -> Callable:
    """An einsum with operands of dtype ``operand``, accumulated in ``acc_dtype``."""

    def product(equation, left, right):
        return jnp.einsum(
            equation,
            left.astype(operand),
            right.astype(operand),
            precision=jax.lax.Precision.HIGHEST if operand == acc_dtype else None,
            preferred_element_type=acc_dtype,
        )

    return product


def _by_platform(run: Callable, acc_dtype, x, *arrays):
    """``run(operand, x, *arrays)``; ``operand``: ``acc_dtype`` on a CPU, ``x.dtype`` elsewhere."""
    if x.dtype == acc_dtype:
        return run(acc_dtype, x, *arrays)
    return jax.lax.platform_dependent(
        x,
        *arrays,
        cpu=functools.partial(run, acc_dtype),
        default=functools.partial(run, x.dtype),
    )


def forward(sizes: Mapping[str, int], x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn):
    """``y_bthp``, the final ``state_bhpn``, and the states at the beginning of each chunk."""
    return _by_platform(
        functools.partial(_forward, sizes), dt_bth.dtype,
        x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn,
    )  # fmt: skip


def _forward(sizes, operand, x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn):
    acc_dtype, groups = dt_bth.dtype, b_btgn.shape[2]
    product = _products(operand, acc_dtype)
    rates = a_h.reshape(groups, -1, 1)

    def chunk(state, arrays):
        x, dt, b, c, reset = arrays
        begins = reset[:, None, None]
        flow, log = x.astype(acc_dtype) * dt[..., None], dt * rates
        within, from_start = _decays(log, begins), _from_start(log, begins)
        weights = product("bgtn,bgun->bgtu", c, b)[:, :, None] * within
        y = product("bgrtu,bgrup->bgrtp", weights, flow)
        y += from_start[..., None] * product("bgtn,bgrpn->bgrtp", c, state)
        # what each token contributes to the state at the end
        to_end = within[..., -1, :, None] * flow
        end = from_start[..., -1, None, None] * state + product("bgrup,bgun->bgrpn", to_end, b)
        return end, (y, state)

    arrays = _chunks(sizes, groups, x_bthp, dt_bth, b_btgn, c_btgn, reset_bt)
    first = state_bhpn.reshape(state_bhpn.shape[0], groups, -1, *state_bhpn.shape[2:])
    end, (y, starts) = jax.lax.scan(chunk, first, arrays)
    return _joined(y, x_bthp.shape[1], 2), end.reshape(state_bhpn.shape), starts


def backward(
    sizes: Mapping[str, int],
    x_bthp,
    dt_bth,
    a_h,
    b_btgn,
    c_btgn,
    reset_bt,
    starts,
    dy_bthp,
    d_end_bhpn,
):
    """Gradients by x, Δ, A, B, C and the initial state."""
    return _by_platform(
        functools.partial(_backward, sizes), dt_bth.dtype,
        x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, starts, dy_bthp, d_end_bhpn,
    )  # fmt: skip


def _backward(
    sizes, operand, x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, starts, dy_bthp, d_end_bhpn
):
    acc_dtype, groups, t = dt_bth.dtype, b_btgn.shape[2], x_bthp.shape[1]
    product = _products(operand, acc_dtype)
    rates = a_h.reshape(groups, -1, 1)

    def chunk(carry, arrays):
        # g: the gradient of the state at the chunk's end
        g, d_rates = carry
        x, dt, b, c, reset, dy, state = arrays
        begins = reset[:, None, None]
        x = x.astype(acc_dtype)
        flow, log = x * dt[..., None], dt * rates
        # below as [u, t]: on a CPU a product is fast over the last axis of its left factor only
        within, from_start = jnp.swapaxes(_decays(log, begins), -1, -2), _from_start(log, begins)
        scores = product("bgun,bgtn->bgut", b, c)[:, :, None]
        d_scores = product("bgrup,bgrtp->bgrut", flow, dy) * within

        # the gradient of the flow: by outputs of this chunk, and by the state at its end
        d_inside = product("bgrut,bgrtp->bgrup", scores * within, dy)
        to_end = within[..., -1, None]
        d_to_end = to_end * product("bgun,bgrpn->bgrup", b, g)
        # the gradient of c by the state at the chunk's beginning
        d_read = from_start[..., None] * product("bgrtp,bgrpn->bgrtn", dy, state)

        d_flow = d_inside + d_to_end
        d_pairs = d_scores.sum(2)
        d_b = product("bgut,bgtn->bgun", d_pairs, c) + product(
            "bgrup,bgrpn->bgun", to_end * flow, g
        )
        d_c = product("bgut,bgun->bgtn", d_pairs, b) + d_read.sum(2)
        d_state = from_start[..., -1, None, None] * g
        d_state += product("bgrtp,bgtn->bgrpn", from_start[..., None] * dy, c)

        # the paths across each token: from earlier tokens to outputs, from the first state to
        # outputs, from earlier tokens to the last state, from the first state to the last
        crossing = product("bgrut,st->bgrus", d_scores * scores, from_here)
        d_log = jnp.sum(jnp.where(from_here.T > 0, 0, crossing), -2)
        read = jnp.sum(d_read * c[:, :, None].astype(acc_dtype), -1)
        d_log += jnp.flip(jnp.cumsum(jnp.flip(read, -1), -1), -1)
        passed = jnp.cumsum(jnp.sum(d_to_end * flow, -1), -1)
        d_log += jnp.pad(passed[..., :-1], ((0, 0),) * 3 + ((1, 0),))
        d_log += (from_start[..., -1] * jnp.sum(g * state, (-1, -2)))[..., None]

        d_dt = jnp.sum(d_flow * x, -1) + rates * d_log
        d_rates += jnp.sum(d_log * dt, (0, -1))
        return (d_state, d_rates), (d_flow * dt[..., None], d_dt, d_b, d_c)

    arrays = _chunks(sizes, groups, x_bthp, dt_bth, b_btgn, c_btgn, reset_bt, dy_bthp)
    # [s, t]: 1 if t ≥ s
    from_here = jnp.tri(arrays[0].shape[-2], dtype=acc_dtype).T
    carry = d_end_bhpn.reshape(starts.shape[1:]), jnp.zeros(rates.shape[:2], acc_dtype)
    carry, gradients = jax.lax.scan(chunk, carry, (*arrays, starts), reverse=True)
    d_first, d_rates = carry
    d_x, d_dt, d_b, d_c = (
        _joined(a, t, heads).astype(like.dtype)
        for a, heads, like in zip(
            gradients, (2, 2, 1, 1), (x_bthp, dt_bth, b_btgn, c_btgn), strict=True
        )
    )
    return d_x, d_dt, d_rates.reshape(-1), d_b, d_c, d_first.reshape(d_end_bhpn.shape)
