"""Adafactor's second moments (Shazeer 2018, arXiv:1804.04235): two vectors per matrix.

optax factors the two longest dimensions of an array if both are at least 128. Here an array may
contain the matrices of many layers and experts, and one side of a matrix may have several
dimensions, such as heads × channels. So the declared role of a parameter (`layers.roles`) decides.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layers.weights import Declared, map_declared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """Means over one side of a matrix, float32; the dimensions of that side have size 1."""

    rows: jax.Array
    columns: jax.Array


class FactoredState(NamedTuple):
    """``moments`` has the parameters' structure: `Factored` for those with a role, else arrays."""

    count: jax.Array
    moments: Any


def scale_by_factored_rms(
    decay: float = 0.8, clip: float = 1.0, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Algorithms 4 and 5, without a relative step size: gradients over the root of ``V̂``, clipped.

    ``V̂ = R C / mean(R)``, where ``R`` and ``C`` are the running means of ``G² + eps`` over the two
    sides, and ``β₂ = 1 − t^−decay`` (§7.2). ``clip``: the largest root mean square of the update of
    one matrix or vector (§6).
    """

    def init(params):
        def moment(a, declared):
            def zeros(over=()):
                shape = tuple(1 if i in over else n for i, n in enumerate(a.shape))
                return jnp.zeros(shape, jnp.float32)

            dimensions = _sides(a, declared)
            return (
                zeros()
                if dimensions is None
                else Factored(zeros(dimensions[1]), zeros(dimensions[0]))
            )

        return FactoredState(jnp.zeros((), jnp.int32), map_declared(moment, params))

    def update(updates, state, params=None):
        del params
        count: Any = optax.safe_increment(state.count)
        keep = 1 - count.astype(jnp.float32) ** -decay

        def track(g, declared, old):
            dimensions = _sides(g, declared)
            square = jnp.square(g.astype(jnp.float32)) + eps
            if dimensions is None:
                return keep * old + (1 - keep) * square
            rows, columns = (jnp.mean(square, axis=dimensions[i], keepdims=True) for i in (1, 0))
            return Factored(
                keep * old.rows + (1 - keep) * rows,
                keep * old.columns + (1 - keep) * columns,
            )

        def scaled(g, declared, v):
            dimensions = _sides(g, declared)
            if dimensions is None:
                over = tuple(range(g.ndim - len(declared.axes), g.ndim))
                scale = jax.lax.rsqrt(v)
            else:
                over = (*dimensions[0], *dimensions[1])
                mean = jnp.mean(v.rows, axis=dimensions[0], keepdims=True)
                scale = jax.lax.rsqrt(v.rows / mean) * jax.lax.rsqrt(v.columns)
            u = g.astype(jnp.float32) * scale
            rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=over, keepdims=True))
            return u / jnp.maximum(1.0, rms / clip)

        moments = map_declared(track, updates, state.moments)
        return map_declared(scaled, updates, moments), FactoredState(count, moments)

    return optax.GradientTransformation(init, update)


def _sides(array: jax.Array, declared: Declared):
    return None if declared.role is None else declared.role.sides(array, declared.axes)
