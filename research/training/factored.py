"""Adafactor's second moments (Shazeer 2018, arXiv:1804.04235): of a matrix two vectors.

optax's factor the two longest dimensions of an array, if both are 128 or more. Here an array may
hold the matrices of many layers and experts, and a side of a matrix may be heads × channels, so
what is a matrix follows from the names of its dimensions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layers.sharding import Axes
from layers.weights import map_named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """Means over one side of a matrix, float32: the other side's dimensions are 1."""

    rows: jax.Array
    columns: jax.Array


class FactoredState(NamedTuple):
    """``moments`` as the parameters: `Factored` where there are `sides`, else as many numbers."""

    count: jax.Array
    moments: Any


def sides(array: Any, axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input and output dimensions of the maps that ``array`` holds; None if it holds none.

    ``embed`` is one side of a map and the other named dimensions are the other; a stack's leading
    dimension and that of experts are batches of maps.
    """
    if len(axes) < 2 or "embed" not in axes:
        return None
    first = array.ndim - len(axes)
    embed = first + axes.index("embed")
    others = tuple(first + i for i, axis in enumerate(axes) if axis not in ("embed", "experts"))
    return ((embed,), others) if embed < others[0] else (others, (embed,))


def scale_by_factored_rms(
    decay: float = 0.8, clip: float = 1.0, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Algorithm 4 and 5, without a relative step size: gradients over the root of ``V̂``, clipped.

    ``V̂ = R C / mean(R)``, with ``R`` and ``C`` the running means of ``G² + eps`` over either side
    and ``β₂ = 1 − t^−decay`` (§7.2). ``clip``: the largest root mean square of an update of one
    matrix or vector (§6).
    """

    def init(params):
        def moment(a, axes):
            def zeros(over=()):
                shape = tuple(1 if i in over else n for i, n in enumerate(a.shape))
                return jnp.zeros(shape, jnp.float32)

            found = sides(a, axes)
            return zeros() if found is None else Factored(zeros(found[1]), zeros(found[0]))

        return FactoredState(jnp.zeros((), jnp.int32), map_named(moment, params))

    def update(updates, state, params=None):
        del params
        count: Any = optax.safe_increment(state.count)
        keep = 1 - count.astype(jnp.float32) ** -decay

        def track(g, axes, old):
            found = sides(g, axes)
            square = jnp.square(g.astype(jnp.float32)) + eps
            if found is None:
                return keep * old + (1 - keep) * square
            rows, columns = (jnp.mean(square, axis=found[i], keepdims=True) for i in (1, 0))
            return Factored(
                keep * old.rows + (1 - keep) * rows,
                keep * old.columns + (1 - keep) * columns,
            )

        def scaled(g, axes, v):
            found = sides(g, axes)
            if found is None:
                over = tuple(range(g.ndim - len(axes), g.ndim))
                scale = jax.lax.rsqrt(v)
            else:
                over = (*found[0], *found[1])
                mean = jnp.mean(v.rows, axis=found[0], keepdims=True)
                scale = jax.lax.rsqrt(v.rows / mean) * jax.lax.rsqrt(v.columns)
            u = g.astype(jnp.float32) * scale
            rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=over, keepdims=True))
            return u / jnp.maximum(1.0, rms / clip)

        moments = map_named(track, updates, state.moments)
        return map_named(scaled, updates, moments), FactoredState(count, moments)

    return optax.GradientTransformation(init, update)
