"""Rotary position embedding: RoFormer (Su 2021, arXiv:2104.09864), eq. 34.

Channel pairs of a query or key at position ``p`` are rotated by ``p·θ_i`` with
``θ_i = base^(−2i/c)`` (§3.2.2), so that a score depends on the difference of positions alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers.config import check


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """``base``: θ's base. ``fraction`` of the head's channels that rotate, the first ones.

    ``interleaved`` pairs channels (0,1), (2,3), … as the paper does; otherwise channel ``i`` pairs
    with ``i + c/2``, as GPT-NeoX and Llama checkpoints do.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False

    def __post_init__(self):
        check(self.base > 1, "base", self.base, "must be > 1")
        check(0 < self.fraction <= 1, "fraction", self.fraction, "must be in (0, 1]")


def frequencies(channels: int, base: float) -> jax.Array:
    """``θ_i = base^(−2i/channels)`` for ``i < channels/2``, in radians a position, float32."""
    return base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)


def rotary(
    x_bthc: jax.Array,
    positions_bt: jax.Array,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Rotate the first ``fraction`` of the channels by the position (eq. 34); the rest pass.

    Args:
      x_bthc: queries or keys, any float dtype; angles and products are float32.
      positions_bt: int32, broadcastable to ``[b, t]``.
      scaling: maps the frequencies ``[c/2]`` to others (position interpolation and its kin).

    Returns: the same shape and dtype as ``x_bthc``.
    """
    rotated = rotated_channels(x_bthc.shape[-1], fraction)
    theta = frequencies(rotated, base)
    if scaling is not None:
        theta = scaling(theta)
    angles = positions_bt[..., None, None].astype(jnp.float32) * theta  # [b, t, 1, c/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x, passed = x_bthc[..., :rotated].astype(jnp.float32), x_bthc[..., rotated:]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., : rotated // 2], x[..., rotated // 2 :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        y = jnp.stack(turned, axis=-1).reshape(x.shape)
    else:
        y = jnp.concatenate(turned, axis=-1)
    y = y.astype(x_bthc.dtype)
    return y if rotated == x_bthc.shape[-1] else jnp.concatenate((y, passed), axis=-1)


def rotated_channels(channels: int, fraction: float) -> int:
    """How many of ``channels`` rotate; raises `ConfigError` unless it is even and ≥ 2."""
    rotated = int(channels * fraction)
    check(
        rotated >= 2 and rotated % 2 == 0,
        "rotary.fraction",
        fraction,
        f"of head_dim={channels} rotates {rotated} channels; must be an even number ≥ 2",
    )
    return rotated
