"""The selective scan in plain XLA, on every platform; optimised for a CPU.

It goes token by token with the state as ``[n, d]``: channels are the last axis, so that everything
except sums over channels in the backward pass is elementwise along it. Profiles on a CPU led to
these choices:

- Exponentials took most of the time. `pallas_kernels.exp2` takes a third of it.
- A sum over ``n``, which is neither the first nor the last axis, took half of the backward pass.
  Unrolled, it is fused with the loops around it. Sums over channels are matrix products.
- States of all tokens in memory, or an associative scan over them, take several times as long as
  the loop. So only the state at the beginning of each chunk is stored, and the backward pass
  recomputes the states of one chunk at a time, in the cache.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.exp2 import LOG2E, exp2


def _chunks(sizes: Mapping[str, int], *arrays):
    """Each ``[b, t, …]`` as ``[chunks, chunk, b, …]``; padding does not change the state."""
    t = arrays[0].shape[1]
    chunk = min(sizes["chunk"], t)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, -t % chunk), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a, 1, 0).reshape(-1, chunk, *a.shape[:1], *a.shape[2:])

    return [cut(a) for a in arrays]


def _joined(a, t: int):
    """The inverse of `_chunks` for one array: ``[b, t, …]``."""
    return jnp.moveaxis(a.reshape(-1, *a.shape[2:]), 0, 1)[:, :t]


def _decay(delta_bd, rate_nd, reset_b):
    """``exp(Δ A)``, and 0 where a segment begins; ``rate_nd`` is ``A log₂e``."""
    decay = exp2(delta_bd[:, None] * rate_nd)
    return jnp.where(reset_b[:, None, None], 0, decay)


def _over_states(state_bnd, weight):
    """``Σ_n weight(n) state_n``, unrolled."""
    return sum(weight(n) * state_bnd[:, n] for n in range(state_bnd.shape[1]))


def forward(sizes: Mapping[str, int], x_btd, delta_btd, a_dn, b_btn, c_btn, reset_bt, state_bdn):
    """``y_btd``, the final ``state_bdn``, and the states at the beginning of each chunk."""
    t = x_btd.shape[1]
    rate_nd = a_dn.T * LOG2E

    def token(state_bnd, arrays):
        x, delta, b, c, reset = arrays
        inflow = (delta * x)[:, None] * b[..., None]
        state_bnd = _decay(delta, rate_nd, reset) * state_bnd + inflow
        return state_bnd, _over_states(state_bnd, lambda n: c[:, n, None])

    def chunk(state_bnd, arrays):
        end, y = jax.lax.scan(token, state_bnd, arrays)
        return end, (y, state_bnd)

    arrays = _chunks(sizes, x_btd, delta_btd, b_btn, c_btn, reset_bt)
    end, (y, starts) = jax.lax.scan(chunk, jnp.swapaxes(state_bdn, 1, 2), tuple(arrays))
    return _joined(y, t), jnp.swapaxes(end, 1, 2), starts


def backward(
    sizes: Mapping[str, int],
    x_btd,
    delta_btd,
    a_dn,
    b_btn,
    c_btn,
    reset_bt,
    starts,
    dy_btd,
    d_end_bdn,
):
    """Gradients by x, Δ, A, B, C and the initial state."""
    t = x_btd.shape[1]
    a_nd = a_dn.T
    rate_nd = a_nd * LOG2E

    def recompute(state_bnd, arrays):
        x, delta, b, reset = arrays
        # the state after the decay, and the new state
        decayed = _decay(delta, rate_nd, reset) * state_bnd
        return decayed + (delta * x)[:, None] * b[..., None], decayed

    def token(carry, arrays):
        d_state, d_a = carry
        x, delta, b, c, reset, dy, decayed = arrays
        inflow = delta * x
        state = decayed + inflow[:, None] * b[..., None]
        d_state = d_state + dy[:, None] * c[..., None]
        d_c = jnp.einsum("bnd,bd->bn", state, dy)
        d_b = jnp.einsum("bnd,bd->bn", d_state, inflow)
        d_inflow = _over_states(d_state, lambda n: b[:, n, None])
        # the gradient of Δ A
        d_log = d_state * decayed
        d_delta = _over_states(d_log, lambda n: a_nd[n]) + d_inflow * x
        d_a = d_a + d_log * delta[:, None]
        d_state = _decay(delta, rate_nd, reset) * d_state
        return (d_state, d_a), (d_inflow * delta, d_delta, d_b, d_c)

    def chunk(carry, arrays):
        x, delta, b, c, reset, dy, start = arrays
        _, decayed = jax.lax.scan(recompute, start, (x, delta, b, reset))
        return jax.lax.scan(token, carry, (x, delta, b, c, reset, dy, decayed), reverse=True)

    arrays = _chunks(sizes, x_btd, delta_btd, b_btn, c_btn, reset_bt, dy_btd)
    d_end = jnp.swapaxes(d_end_bdn, 1, 2)
    carry, gradients = jax.lax.scan(
        chunk, (d_end, jnp.zeros_like(d_end)), (*arrays, starts), reverse=True
    )
    d_start, d_a = carry
    d_x, d_delta, d_b, d_c = (_joined(a, t) for a in gradients)
    return d_x, d_delta, d_a.sum(0).T, d_b, d_c, jnp.swapaxes(d_start, 1, 2)
