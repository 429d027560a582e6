"""Linear maps with a weight of any rank, and its initialisation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers.roles import Role
from layers.weights import einsum, read

Initializer = Callable[..., jax.Array]


def fan_in_normal(scale: float = 1.0, fan_in: int | None = None) -> Initializer:
    """Truncated normal of standard deviation ``scale / sqrt(fan_in)`` (±2σ, variance corrected).

    ``fan_in`` defaults to the product of all but the last dimension of the shape.
    """

    def init(key, shape, dtype=jnp.float32):
        std = scale / math.sqrt(fan_in or math.prod(shape[:-1]))
        # 0.8796… is the standard deviation of a standard normal that is truncated at ±2
        unit = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (unit * (std / 0.87962566103423978)).astype(dtype)

    return init


class Linear(nnx.Module):
    """``einsum(subscripts, x, weight) + bias`` with a weight of any rank.

    The bias, if any, has the dimensions of the weight that are in the output. ``out_dtype``,
    default ``dtype``, is the dtype of accumulation and of the result. ``role``: the weight's, one
    of `layers.roles.ROLES`.
    """

    def __init__(
        self,
        subscripts: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        out_axes: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        init: Initializer | None = None,
        role: str = "matrix",
        out_dtype: jnp.dtype | None = None,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        inputs, output = subscripts.split("->")
        letters = inputs.split(",")[1]
        fan_in = math.prod(n for n, a in zip(shape, letters, strict=True) if a not in output)
        init = init or fan_in_normal(fan_in=fan_in)
        self.subscripts, self.out_axes = subscripts, out_axes
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        weight = init(rngs.params(), shape, param_dtype)
        self.weight = nnx.Param(weight, axes=axes, role=Role.of_product(role, subscripts))
        output_dims = [i for i, letter in enumerate(letters) if letter in output]
        zeros = jnp.zeros([shape[i] for i in output_dims], param_dtype)
        self.bias = nnx.Param(zeros, axes=tuple(axes[i] for i in output_dims)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = einsum(
            self.subscripts,
            x,
            self.weight,
            dtype=self.dtype,
            out_axes=self.out_axes,
            out_dtype=self.out_dtype,
        )
        return y if self.bias is None else y + read(self.bias, self.out_dtype, like=y)
