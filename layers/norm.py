"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba 2016, eq. 3), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.weights import read

# "rmsnorm_1p": RMSNorm whose parameter is scale − 1 (Gemma)
NORMS = ("rmsnorm", "rmsnorm_1p", "layernorm")


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, dims: int = 1) -> jax.Array:
    """``x / sqrt(mean(x²) + eps) · scale`` over the last ``dims`` axes; ``x.dtype``."""
    y = x.astype(jnp.float32)
    axes = tuple(range(-dims, 0))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float, dims: int = 1
) -> jax.Array:
    """``(x − mean) / sqrt(var + eps) · scale + bias`` over the last ``dims`` axes; ``x.dtype``."""
    y = x.astype(jnp.float32)
    axes = tuple(range(-dims, 0))
    y = y - jnp.mean(y, axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class Norm(nnx.Module):
    """One of `NORMS` over the last axis, or over the last axes if ``features`` is several sizes."""

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
        self.dims = len(axes)
        initial = jnp.zeros if kind == "rmsnorm_1p" else jnp.ones
        self.scale = nnx.Param(initial(features, param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(features, param_dtype), axes=axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = read(self.scale, jnp.float32, like=x)
        if self.kind == "layernorm":
            bias = None if self.bias is None else read(self.bias, jnp.float32, like=x)
            return layer_norm(x, scale, bias, eps=self.eps, dims=self.dims)
        if self.kind == "rmsnorm_1p":
            scale = 1 + scale
        return rms_norm(x, scale, eps=self.eps, dims=self.dims)
