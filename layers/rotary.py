"""Rotary position embedding: RoFormer (Su 2021, arXiv:2104.09864), eq. 34.

Channel pairs of a query or key at position ``p`` are rotated by ``p·θ_i`` with
``θ_i = base^(−2i/c)`` (§3.2.2), so that a score depends on the difference of positions alone.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers.config import check, check_choice

SCALINGS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Slower rotation for contexts ``factor`` times those trained on; maps frequencies to others.

    ``linear``: every frequency over ``factor`` (position interpolation, Chen 2023,
    arXiv:2306.15595, eq. 3). ``llama3`` (Llama 3.1, arXiv:2407.21783, §3.4.2): only those that turn
    less than ``low_turns`` times in ``original_length`` tokens; those that turn more than
    ``high_turns`` times stay, and between the two the factor is interpolated. ``yarn`` (Peng 2023,
    arXiv:2309.00071, §3.2): the same, but evenly from frequency to frequency, between the whole
    numbers of frequencies around those two.
    ``magnitude`` multiplies what is rotated, so that scores grow by its square; None is 1 but for
    ``yarn``, whose softmax is colder: ``0.1 · ln(factor) + 1`` (§3.4).
    """

    kind: str = "linear"
    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_length: int = 8192
    magnitude: float | None = None

    def __post_init__(self):
        check_choice("kind", self.kind, SCALINGS)
        for name in ("factor", "low_turns", "original_length"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        check(
            self.high_turns > self.low_turns,
            "high_turns",
            self.high_turns,
            f"must be > low_turns={self.low_turns}",
        )
        magnitude = self.magnitude
        check(magnitude is None or magnitude > 0, "magnitude", magnitude, "must be > 0 or None")

    def __call__(self, theta: jax.Array, base: float) -> jax.Array:
        """The frequencies ``[c/2]`` to rotate by instead of ``theta``, which are of ``base``."""
        if self.kind == "linear":
            return theta / self.factor
        if self.kind == "yarn":
            kept = self._kept_by_index(len(theta), base)
        else:
            turns = self.original_length * theta / (2 * math.pi)
            kept = jnp.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return kept * theta + (1 - kept) * theta / self.factor

    def _kept_by_index(self, count: int, base: float) -> jax.Array:
        def index(turns):  # of the frequency that turns so often
            return count * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)

        first = max(math.floor(index(self.high_turns)), 0)
        last = min(math.ceil(index(self.low_turns)), 2 * count - 1)
        # the released code's way around dividing by 0
        width = last - first or 0.001
        return 1 - jnp.clip((jnp.arange(count, dtype=jnp.float32) - first) / width, 0, 1)

    @property
    def growth(self) -> float:
        """`magnitude`, or what it is where it is None."""
        if self.magnitude is not None:
            return self.magnitude
        return yarn_growth(self.factor) if self.kind == "yarn" else 1.0


def yarn_growth(factor: float, weight: float = 1.0) -> float:
    """``√(1/t)`` of YaRN's temperature ``t`` (§3.4), its logarithm times ``weight``."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """``base``: θ's base. ``fraction`` of the head's channels that rotate, the first ones.

    ``interleaved`` pairs channels (0,1), (2,3), … as the paper does; otherwise channel ``i`` pairs
    with ``i + c/2``, as GPT-NeoX and Llama checkpoints do. ``scaling``: of the frequencies.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self):
        check(self.base > 1, "base", self.base, "must be > 1")
        check(0 < self.fraction <= 1, "fraction", self.fraction, "must be in (0, 1]")

    def __call__(self, x_bthc: jax.Array, positions_bt: jax.Array) -> jax.Array:
        """`rotary` of ``x_bthc`` as this says."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        magnitude = 1.0 if self.scaling is None else self.scaling.growth
        return rotary(x_bthc, positions_bt, magnitude=magnitude, **options)


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
    scaling: Callable[[jax.Array, float], jax.Array] | None = None,
    magnitude: float = 1.0,
) -> jax.Array:
    """Rotate the first ``fraction`` of the channels by the position (eq. 34); the rest pass.

    Args:
      x_bthc: queries or keys, any float dtype; angles and products are float32.
      positions_bt: int32, broadcastable to ``[b, t]``.
      scaling: maps the frequencies ``[c/2]`` and their base to other frequencies (position
        interpolation and its kin).
      magnitude: multiplies the channels that are rotated (YaRN).

    Returns: the same shape and dtype as ``x_bthc``.
    """
    rotated = rotated_channels(x_bthc.shape[-1], fraction)
    theta = frequencies(rotated, base)
    if scaling is not None:
        theta = scaling(theta, base)
    angles = positions_bt[..., None, None].astype(jnp.float32) * theta  # [b, t, 1, c/2]
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
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
