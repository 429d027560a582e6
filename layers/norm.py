"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba 2016, eq. 3), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.sharding import gather, spread

# "rmsnorm_1p" is "rmsnorm" whose parameter is the scale's difference from 1 (Gemma)
NORMS = ("rmsnorm", "rmsnorm_1p", "layernorm")


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axes, those of ``scale``; ``x.dtype``."""
    y = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    return (y * spread(scale.astype(jnp.float32), y)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float
) -> jax.Array:
    """``(x − mean) / sqrt(var + eps) · scale + bias`` over the last axis; returns ``x.dtype``."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * spread(scale.astype(jnp.float32), y)
    if bias is not None:
        y = y + spread(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)


class Norm(nnx.Module):
    """One of `NORMS` over the last axis of size ``features``, or, RMSNorm, over several."""

    def __init__(
        self,
        kind: str,
        features: int | tuple[int, ...],
        *,
        eps: float,
        bias: bool = False,
        axes: tuple[str | None, ...] = ("norm",),
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.kind, self.eps = kind, eps
        start = jnp.zeros if kind == "rmsnorm_1p" else jnp.ones
        self.scale = nnx.Param(start(features, param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(features, param_dtype), axes=axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = ("batch", "time")
        scale = gather(self.scale[...], self.scale.axes, rows=rows)
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, eps=self.eps)
        if self.kind == "rmsnorm_1p":
            return rms_norm(x, 1 + scale.astype(jnp.float32), eps=self.eps)
        assert self.kind == "layernorm", self.kind
        if self.bias is None:
            return layer_norm(x, scale, eps=self.eps)
        bias = gather(self.bias[...], self.bias.axes, rows=rows)
        return layer_norm(x, scale, bias, eps=self.eps)
