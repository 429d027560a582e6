"""Linear maps: one einsum through which every weight of the house is multiplied.

A weight leaf is an array today; tree rewrites (LoRA, int8, int4) replace it by a small pytree that
this one function learns to multiply by, so that no layer has a quantised twin.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.sharding import gather, place, spec, spread
from layers.weight_gradient import product

Initializer = Callable[..., jax.Array]


def einsum(
    subscripts: str,
    x: jax.Array,
    weight: jax.Array,
    *,
    dtype: jnp.dtype,
    weight_axes: tuple[str | None, ...],
    out_axes: tuple[str | None, ...],
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """``jnp.einsum(subscripts, x, weight)`` in ``dtype``, the weight gathered over ``fsdp`` first.

    Args:
      subscripts: two operands, e.g. ``"btd,dhc->bthc"``.
      x: activations; weight: parameters, in their own dtype, cast to ``dtype`` here.
      weight_axes, out_axes: logical names of the dimensions of ``weight`` and of the result.
      preferred_element_type: accumulate and return in this dtype (logits ask for float32).
    """
    inputs, output = subscripts.split("->")
    x_letters, weight_letters = inputs.split(",")
    named = dict(zip(weight_letters, weight_axes, strict=True)) | dict(
        zip(output, out_axes, strict=True)
    )
    rows = tuple(named[letter] for letter in output if letter not in weight_letters)
    x = place(x.astype(dtype), *(named[letter] for letter in x_letters))
    weight = gather(jnp.asarray(weight, dtype), weight_axes, rows=rows)
    options: dict[str, Any] = dict(preferred_element_type=preferred_element_type)
    if (out_sharding := spec(*out_axes)) is None:
        return product(subscripts, x, weight, **options)
    return jnp.einsum(subscripts, x, weight, out_sharding=out_sharding, **options)


def fan_in_normal(scale: float = 1.0, fan_in: int | None = None) -> Initializer:
    """Truncated normal of standard deviation ``scale / sqrt(fan_in)`` (±2σ, variance corrected).

    ``fan_in`` defaults to the product of all but the last dimension of the shape.
    """

    def init(key, shape, dtype=jnp.float32):
        std = scale / math.sqrt(fan_in or math.prod(shape[:-1]))
        # 0.8796… is the standard deviation of a unit normal cut at ±2
        unit = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (unit * (std / 0.87962566103423978)).astype(dtype)

    return init


class Linear(nnx.Module):
    """``einsum(subscripts, x, weight) + bias`` with a weight of any rank.

    The bias, if any, spans the weight's dimensions that appear in the output. ``out_dtype``, by
    default ``dtype``, is what products accumulate to and are returned in.
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
        self.weight = nnx.Param(init(rngs.params(), shape, param_dtype), axes=axes)
        kept = [i for i, letter in enumerate(letters) if letter in output]
        zeros = jnp.zeros([shape[i] for i in kept], param_dtype)
        self.bias = nnx.Param(zeros, axes=tuple(axes[i] for i in kept)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = einsum(
            self.subscripts,
            x,
            self.weight[...],
            dtype=self.dtype,
            weight_axes=self.weight.axes,
            out_axes=self.out_axes,
            preferred_element_type=self.out_dtype,
        )
        if self.bias is not None:
            bias = jnp.asarray(self.bias[...], self.out_dtype)
            y = y + spread(gather(bias, self.bias.axes, rows=("batch", "time")), y)
        return y
