"""The equations of the recurrences, token by token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# the greatest exponent of an empty state: finite, so that ∞ − ∞ does not occur
EMPTY = -1e38


def exact(array):
    """The dtype to compute in."""
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def scan(op: str, constants, state, tokens, reset_bt):
    """``y`` and the final state of ``op`` over time, the second axis of ``tokens``."""
    in_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, reset_bt))
    state, y = jax.lax.scan(lambda s, x: STEPS[op](constants, s, *x), state, in_time)
    return jnp.moveaxis(y, 0, 1), state


def step4(constants, state, token, reset_b):
    """One token of `wkv4`: ``constants`` are the decay's logarithm and the bonus."""
    decay_d, u_d = constants
    k_bd, v_bd = token
    reset = reset_b[:, None]
    numerator, denominator, greatest = state
    numerator = jnp.where(reset, 0, numerator)
    denominator = jnp.where(reset, 0, denominator)
    greatest = jnp.where(reset, EMPTY, greatest)

    maximum = jnp.maximum(greatest, k_bd + u_d)
    old_weight, new_weight = jnp.exp(greatest - maximum), jnp.exp(k_bd + u_d - maximum)
    y = (old_weight * numerator + new_weight * v_bd) / (old_weight * denominator + new_weight)

    maximum = jnp.maximum(greatest + decay_d, k_bd)
    old_weight, new_weight = jnp.exp(greatest + decay_d - maximum), jnp.exp(k_bd - maximum)
    return (
        old_weight * numerator + new_weight * v_bd,
        old_weight * denominator + new_weight,
        maximum,
    ), y


def step7(constants, state, token, reset_b):
    """One token of `wkv7`; the state is values by keys."""
    del constants
    [matrix] = state
    r, w, k, v, a, b = token
    matrix = jnp.where(reset_b[:, None, None, None], 0, matrix)
    removed_bhc = jnp.sum(matrix * a[..., None, :], -1)
    matrix = (
        matrix * jnp.exp(-jnp.exp(w))[..., None, :]
        + removed_bhc[..., None] * b[..., None, :]
        + v[..., None] * k[..., None, :]
    )
    return (matrix,), jnp.sum(matrix * r[..., None, :], -1)


# step(constants, state, token, reset_b) -> (state, y): tuples of arrays
STEPS: dict[str, Callable] = {"wkv4": step4, "wkv7": step7}
