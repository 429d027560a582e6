"""The equation of the selective scan, token by token."""

import jax
import jax.numpy as jnp


def scan(x_btd, delta_btd, a_dn, b_btn, c_btn, reset_bt, state_bdn):
    """``y_btd`` and the final state; all arrays of one floating dtype."""

    def step(state_bdn, token):
        x, delta, b, c, reset = token
        state_bdn = jnp.where(reset[:, None, None], 0, state_bdn)
        state_bdn = jnp.exp(delta[..., None] * a_dn) * state_bdn
        state_bdn = state_bdn + (delta * x)[..., None] * b[:, None]
        return state_bdn, jnp.sum(state_bdn * c[:, None], axis=-1)

    tokens = (x_btd, delta_btd, b_btn, c_btn, reset_bt)
    in_time = [jnp.moveaxis(array, 1, 0) for array in tokens]
    state_bdn, y_tbd = jax.lax.scan(step, state_bdn, tuple(in_time))
    return jnp.moveaxis(y_tbd, 0, 1), state_bdn
