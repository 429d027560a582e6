"""The state-space duality in plain XLA, on every platform: products of matrices, chunk by chunk.

A scan over chunks carries the state; all rows and heads of a chunk are one batch of products. What
is made of a chunk is as long as the chunk squared a head, and is never kept: the forward pass keeps
the state at the beginning of each chunk, the backward pass makes the rest anew.

Exponents. A decay over several tokens is ``exp`` of a difference of cumulative sums, which rounds
to the sum's size: after tokens that forgot everything, a decay of 1 would be off by the fourth
digit. So each logarithm is split in a multiple of 2^−9, whose sums and differences are exact, and a
rest below 2^−10 (`_decays`).

The gradient of the logarithm at token ``r`` is the sum of everything that crosses it: from before
``r``, or from the state at the beginning, to an output from ``r`` on, or to the state at the end.
Each of the four is summed as it is, so that a token that forgets everything gets 0. (The difference
of what goes out and what comes in, ``Σ_{t ≥ r} dy_t · y_t − df_t · f_t``, is cheaper, and leaves it
the rounding of the whole chunk.)
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# e^−64 is 0 beside any float32 of the sum, and 256 such tokens still add up exactly
LEAST_LOG = -64.0
GRAIN = 2.0**-9


def _cut(sizes: Mapping[str, int], groups: int, x, dt, b, c, reset, *like_x):
    """In chunks, time behind the heads: ``[chunks, b, g, r, q, …]`` (of ``b`` and ``c`` no ``r``).

    Chunks are of one length, at most ``sizes["chunk"]``; padding is tokens that change nothing.
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

    cuts = by_head(x), by_head(dt), cut(b, groups), cut(c, groups), cut(reset)
    return *cuts, *map(by_head, like_x)


def _joined(a, t: int, heads: int):
    """The inverse of `_cut`: ``heads`` axes, of the head or of its group, become one."""
    a = jnp.moveaxis(jnp.moveaxis(a, 2 + heads, 2), 0, 1)
    every = math.prod(a.shape[3 : 3 + heads])
    return a.reshape(a.shape[0], -1, every, *a.shape[3 + heads :])[:, :t]


def _decays(log, begins):
    """``exp(Σ log)`` over the tokens after ``u`` up to ``t``, ``[…, t, u]``.

    0 where ``u > t`` or where a segment begins in between.
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
    """``exp(Σ log)`` over the tokens up to each; 0 from where a segment begins."""
    opened = jnp.cumsum(begins.astype(jnp.int32), -1) == 0
    return jnp.where(opened, jnp.exp(jnp.cumsum(jnp.maximum(log, LEAST_LOG), -1)), 0)


def _products(operand, exact) -> Callable:
    """Einsums of operands rounded to ``operand``, summed in ``exact``."""

    def product(equation, left, right):
        return jnp.einsum(
            equation,
            left.astype(operand),
            right.astype(operand),
            precision=jax.lax.Precision.HIGHEST if operand == exact else None,
            preferred_element_type=exact,
        )

    return product


def _by_platform(run: Callable, exact, x, *arrays):
    """``run(operand, x, *arrays)``: a CPU multiplies what it computes in, other chips ``x``'s."""
    if x.dtype == exact:
        return run(exact, x, *arrays)
    return jax.lax.platform_dependent(
        x,
        *arrays,
        cpu=functools.partial(run, exact),
        default=functools.partial(run, x.dtype),
    )


def forward(sizes: Mapping[str, int], x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn):
    """``y_bthp``, the final ``state_bhpn``, and the states at the beginning of each chunk."""
    return _by_platform(
        functools.partial(_forward, sizes), dt_bth.dtype,
        x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn,
    )  # fmt: skip


def _forward(sizes, operand, x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn):
    exact, groups = dt_bth.dtype, b_btgn.shape[2]
    product = _products(operand, exact)
    rates = a_h.reshape(groups, -1, 1)

    def chunk(state, arrays):
        x, dt, b, c, reset = arrays
        begins = reset[:, None, None]
        flow, log = x.astype(exact) * dt[..., None], dt * rates
        within, from_start = _decays(log, begins), _from_start(log, begins)
        weights = product("bgtn,bgun->bgtu", c, b)[:, :, None] * within
        y = product("bgrtu,bgrup->bgrtp", weights, flow)
        y += from_start[..., None] * product("bgtn,bgrpn->bgrtp", c, state)
        # what each token leaves in the state at the end
        left = within[..., -1, :, None] * flow
        end = from_start[..., -1, None, None] * state + product("bgrup,bgun->bgrpn", left, b)
        return end, (y, state)

    arrays = _cut(sizes, groups, x_bthp, dt_bth, b_btgn, c_btgn, reset_bt)
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
    exact, groups, t = dt_bth.dtype, b_btgn.shape[2], x_bthp.shape[1]
    product = _products(operand, exact)
    rates = a_h.reshape(groups, -1, 1)

    def chunk(carry, arrays):
        # g: the gradient of the state at the chunk's end
        g, d_rates = carry
        x, dt, b, c, reset, dy, state = arrays
        begins = reset[:, None, None]
        x = x.astype(exact)
        flow, log = x * dt[..., None], dt * rates
        # [u, t] from here on: a CPU's product is fast over the last axis of its left side only
        within, from_start = jnp.swapaxes(_decays(log, begins), -1, -2), _from_start(log, begins)
        scores = product("bgun,bgtn->bgut", b, c)[:, :, None]
        d_scores = product("bgrup,bgrtp->bgrut", flow, dy) * within

        # of the flow: to outputs of this chunk, and to the state at its end
        d_inside = product("bgrut,bgrtp->bgrup", scores * within, dy)
        left = within[..., -1, None]
        d_left = left * product("bgun,bgrpn->bgrup", b, g)
        # of what is read of the state at the chunk's beginning
        d_read = from_start[..., None] * product("bgrtp,bgrpn->bgrtn", dy, state)

        d_flow = d_inside + d_left
        d_pairs = d_scores.sum(2)
        d_b = product("bgut,bgtn->bgun", d_pairs, c) + product("bgrup,bgrpn->bgun", left * flow, g)
        d_c = product("bgut,bgun->bgtn", d_pairs, b) + d_read.sum(2)
        d_state = from_start[..., -1, None, None] * g
        d_state += product("bgrtp,bgtn->bgrpn", from_start[..., None] * dy, c)

        # what crosses each token: from before it in this chunk, from the chunk's beginning, on to
        # its end, and from the one to the other
        crossing = product("bgrut,st->bgrus", d_scores * scores, from_here)
        d_log = jnp.sum(jnp.where(from_here.T > 0, 0, crossing), -2)
        read = jnp.sum(d_read * c[:, :, None].astype(exact), -1)
        d_log += jnp.flip(jnp.cumsum(jnp.flip(read, -1), -1), -1)
        kept = jnp.cumsum(jnp.sum(d_left * flow, -1), -1)
        d_log += jnp.pad(kept[..., :-1], ((0, 0),) * 3 + ((1, 0),))
        d_log += (from_start[..., -1] * jnp.sum(g * state, (-1, -2)))[..., None]

        d_dt = jnp.sum(d_flow * x, -1) + rates * d_log
        d_rates += jnp.sum(d_log * dt, (0, -1))
        return (d_state, d_rates), (d_flow * dt[..., None], d_dt, d_b, d_c)

    arrays = _cut(sizes, groups, x_bthp, dt_bth, b_btgn, c_btgn, reset_bt, dy_bthp)
    # 1 where the second is at or after the first
    from_here = jnp.tri(arrays[0].shape[-2], dtype=exact).T
    carry = d_end_bhpn.reshape(starts.shape[1:]), jnp.zeros(rates.shape[:2], exact)
    carry, each = jax.lax.scan(chunk, carry, (*arrays, starts), reverse=True)
    d_first, d_rates = carry
    d_x, d_dt, d_b, d_c = (
        _joined(a, t, heads).astype(like.dtype)
        for a, heads, like in zip(each, (2, 2, 1, 1), (x_bthp, dt_bth, b_btgn, c_btgn), strict=True)
    )
    return d_x, d_dt, d_rates.reshape(-1), d_b, d_c, d_first.reshape(d_end_bhpn.shape)
