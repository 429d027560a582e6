"""Token embedding and the additive position embeddings: learned, and sinusoidal (Vaswani 2017)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.roles import Role
from layers.weights import einsum, lookup


class Embedding(nnx.Module):
    """A table ``[v, d]`` of embeddings; with tied embeddings it also computes logits."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        std: float,
        axes: tuple[str | None, str | None] = ("vocab", "embed"),
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.dtype = dtype
        table = jax.random.normal(rngs.params(), (vocab_size, width), param_dtype) * std
        role = Role("embedding", inputs=(0,), outputs=(1,))
        self.table = nnx.Param(table.astype(param_dtype), axes=axes, role=role)

    def __call__(self, ids_bt: jax.Array) -> jax.Array:
        """Rows ``[b, t, d]`` in the compute dtype; an id out of range gives NaN."""
        return lookup(self.table, ids_bt, self.dtype)

    def logits(self, x_btd: jax.Array) -> jax.Array:
        """``x · tableᵀ``: float32 ``[b, t, v]``."""
        return einsum(
            "btd,vd->btv",
            x_btd,
            self.table,
            dtype=self.dtype,
            out_axes=("batch", "time", "vocab"),
            out_dtype=jnp.float32,
        )


def sinusoidal(positions_bt: jax.Array, width: int) -> jax.Array:
    """``sin(p / 10000^(2i/d))`` in even channels, ``cos`` in odd (Vaswani 2017, §3.5).

    Returns float32 ``[b, t, width]``; ``width`` must be even.
    """
    theta = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_bt[..., None].astype(jnp.float32) * theta
    pairs = jnp.stack((jnp.sin(angles), jnp.cos(angles)), axis=-1)
    return pairs.reshape(*positions_bt.shape, width)
