"""The recurrences for `kernels`: the step of each, and arrays as tiles.

A part of `wkv4` is up to ``rows`` × 128 channels, along sublanes and lanes. A part of `wkv7` is one
head: a token is a row of ``c`` channels, and the matrix unit computes its products with the state.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.wkv import kernels
from pallas_kernels.wkv.reference import EMPTY

LANES = 128


def refusal(array) -> str | None:
    """What the kernels do not support in this call, or None."""
    if array.dtype != jnp.float32:
        return f"dtype {array.dtype}: must be float32"
    return None


def step4(constants, state, token):
    (decay, u), (k, v) = constants, token
    numerator, denominator, greatest = state
    maximum = jnp.maximum(greatest, k + u)
    old_weight, new_weight = jnp.exp(greatest - maximum), jnp.exp(k + u - maximum)
    y = (old_weight * numerator + new_weight * v) / (old_weight * denominator + new_weight)
    maximum = jnp.maximum(greatest + decay, k)
    old_weight, new_weight = jnp.exp(greatest + decay - maximum), jnp.exp(k - maximum)
    return (
        old_weight * numerator + new_weight * v,
        old_weight * denominator + new_weight,
        maximum,
    ), y


class _Channels:
    """`wkv4`: channels ``[…, d]`` as tiles ``[…, parts, rows, lanes]``."""

    step = staticmethod(step4)
    empty = (0.0, 0.0, EMPTY)

    def __init__(self, rows: int, tokens):
        self.d = tokens[0].shape[2]
        lines = pl.cdiv(self.d, LANES)
        self.rows = min(rows, lines)
        self.parts = pl.cdiv(lines, self.rows)

    def tiles(self, a):
        missing = self.parts * self.rows * LANES - self.d
        a = jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, missing)])
        return a.reshape(*a.shape[:-1], self.parts, self.rows, LANES)

    def flat(self, a):
        return a.reshape(*a.shape[:-3], -1)[..., : self.d]

    def token_tiles(self, a):
        return jnp.moveaxis(self.tiles(a), 2, 1)

    def flat_tokens(self, a):
        return self.flat(jnp.moveaxis(a, 1, 2))


def _step7(constants, state, token):
    del constants
    [matrix], (r, w, k, v, a, b) = state, token
    removed = _dot(a, matrix, 1)
    change = _dot(jnp.concatenate((removed, v)), jnp.concatenate((b, k)), 0)
    matrix = matrix * jnp.exp(-jnp.exp(w)) + change
    return (matrix,), _dot(r, matrix, 1)


def _dot(a, b, axis):
    """The product that contracts ``axis`` of both, in full float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axis,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class _Heads:
    """`wkv7`: each head is a part; heads are moved before time."""

    step = staticmethod(_step7)
    empty = (0.0,)

    def __init__(self, rows: int, tokens):
        del rows, tokens

    def tiles(self, a):
        return a

    flat = tiles

    def token_tiles(self, a):
        return jnp.swapaxes(a, 1, 2)

    flat_tokens = token_tiles


LAYOUTS = {"wkv4": _Channels, "wkv7": _Heads}


def forward(op: str, sizes: Mapping[str, int], constants, state, tokens, reset_bt):
    """``y``, the final state, and the states at the beginnings of chunks ``[chunks, b, …]``."""
    layout = LAYOUTS[op](sizes["rows"], tokens)
    y, end, starts = kernels.forward(
        op,
        layout.step,
        layout.empty,
        sizes["chunk"],
        tuple(map(layout.tiles, constants)),
        tuple(map(layout.tiles, state)),
        tuple(map(layout.token_tiles, tokens)),
        reset_bt,
    )
    return layout.flat_tokens(y), tuple(map(layout.flat, end)), tuple(map(layout.flat, starts))


def backward(op: str, sizes: Mapping[str, int], constants, tokens, reset_bt, starts, dy, d_end):
    """Gradients by constants, by the first state and by tokens."""
    layout = LAYOUTS[op](sizes["rows"], tokens)
    d_constants, d_first, d_tokens = kernels.backward(
        op,
        layout.step,
        layout.empty,
        sizes["chunk"],
        tuple(map(layout.tiles, constants)),
        tuple(map(layout.tiles, starts)),
        tuple(map(layout.token_tiles, tokens)),
        reset_bt,
        layout.token_tiles(dy),
        tuple(map(layout.tiles, d_end)),
    )
    return (
        tuple(map(layout.flat, d_constants)),
        tuple(map(layout.flat, d_first)),
        tuple(map(layout.flat_tokens, d_tokens)),
    )
