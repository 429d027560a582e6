"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba 2016, eq. 3), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.sharding import gather

NORMS = ("rmsnorm", "layernorm")


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis; returns ``x.dtype``."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float
) -> jax.Array:
    """``(x − mean) / sqrt(var + eps) · scale + bias`` over the last axis; returns ``x.dtype``."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class Norm(nnx.Module):
    """One of `NORMS` over the last axis of size ``features``."""

    def __init__(
        self,
        kind: str,
        features: int,
        *,
        eps: float,
        bias: bool = False,
        axis: str | None = "norm",
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype), axes=(axis,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = gather(self.scale[...], self.scale.axes)
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, eps=self.eps)
        assert self.kind == "layernorm", self.kind
        bias = None if self.bias is None else gather(self.bias[...], self.bias.axes)
        return layer_norm(x, scale, bias, eps=self.eps)
