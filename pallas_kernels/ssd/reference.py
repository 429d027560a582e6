"""The equation of the state-space duality, token by token."""

import jax
import jax.numpy as jnp


def scan(x_bthp, dt_bth, a_h, b_btgn, c_btgn, reset_bt, state_bhpn):
    """``y_bthp`` and the final state, in ``dt``'s dtype."""
    acc_dtype = dt_bth.dtype
    repeats = x_bthp.shape[2] // b_btgn.shape[2]
    b_bthn, c_bthn = (jnp.repeat(a, repeats, axis=2) for a in (b_btgn, c_btgn))

    def step(state_bhpn, token):
        x, dt, b, c, reset = token
        state_bhpn = jnp.where(reset[:, None, None, None], 0, state_bhpn)
        state_bhpn = jnp.exp(dt * a_h)[..., None, None] * state_bhpn
        state_bhpn = state_bhpn + (dt[..., None] * x)[..., None] * b[:, :, None]
        return state_bhpn, jnp.sum(state_bhpn * c[:, :, None], axis=-1)

    tokens = (
        x_bthp.astype(acc_dtype),
        dt_bth,
        b_bthn.astype(acc_dtype),
        c_bthn.astype(acc_dtype),
        reset_bt,
    )
    in_time = [jnp.moveaxis(array, 1, 0) for array in tokens]
    state_bhpn, y_tbhp = jax.lax.scan(step, state_bhpn, tuple(in_time))
    return jnp.moveaxis(y_tbhp, 0, 1), state_bhpn
