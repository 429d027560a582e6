"""Rotary position embedding: RoFormer (Su 2021, arXiv:2104.09864), eq. 34.

Channel pairs of a query or key at position ``p`` are rotated by ``p·θ_i`` with
``θ_i = base^(−2i/c)`` (§3.2.2), so that a score depends on the difference of positions alone.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers.config import check, check_choice, check_types

SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
# the kinds whose frequencies depend on the length of the sequences that a model is run on
BY_LENGTH = ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Lower frequencies, for sequences longer than the ``original_length`` of training.

    ``linear``: every frequency is divided by ``factor`` (position interpolation, Chen 2023,
    arXiv:2306.15595, eq. 3). ``llama3`` (Llama 3.1, arXiv:2407.21783, §3.4.2): frequencies with
    fewer than ``low_turns`` turns in ``original_length`` tokens are divided, those with more than
    ``high_turns`` are unchanged, and between the two the result is interpolated. ``yarn`` (Peng
    2023, arXiv:2309.00071, §3.2): the same, but the interpolation is linear in the index of the
    frequency, between the indices of those two, rounded outwards if ``truncate``.

    Two kinds depend on ``length``, the number of tokens that the model is run on (None:
    ``original_length``). It is fixed for a model: rotated keys in a cache stay valid.
    ``dynamic`` (NTK-aware, Peng 2023, §3.1 and appendix A.1): the base becomes
    ``base · (factor · length / original_length − factor + 1)^(c / (c − 2))``; a ``length`` up to
    ``original_length`` changes nothing. ``longrope`` (Ding 2024, arXiv:2402.13753, §3): frequency
    ``i`` is divided by ``long_factors[i]`` if ``length`` is greater than ``original_length``, and
    otherwise by ``short_factors[i]``.

    ``magnitude`` multiplies the rotated channels, so scores are multiplied by its square. None: 1,
    but for ``yarn`` ``0.1 · ln(factor) + 1``, which lowers the temperature of the softmax (§3.4),
    and for ``longrope`` ``√(1 + ln(factor) / ln(original_length))``.
    """

    kind: str = "linear"
    factor: float = 8.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    original_length: int = 8192
    magnitude: float | None = None
    truncate: bool = True
    length: int | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        check_types(self)
        check_choice("kind", self.kind, SCALINGS)
        for name in ("factor", "low_turns", "original_length"):
            check(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        check(
            self.high_turns > self.low_turns,
            "high_turns",
            self.high_turns,
            f"must be > low_turns={self.low_turns}",
        )
        for name in ("factor", "low_turns", "high_turns"):  # so that logarithms and powers exist
            value = getattr(self, name)
            check(1e-30 < value < 1e30, name, value, "must be between 1e-30 and 1e30")
        for name in ("magnitude", "length"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be > 0 or None")
        by_length, long = self.kind in BY_LENGTH, self.kind == "longrope"
        length, original = self.length, self.original_length
        check(
            by_length or length is None, "length", length, f"requires kind={' or '.join(BY_LENGTH)}"
        )
        check(self.kind == "yarn" or self.truncate, "truncate", self.truncate, "requires kind=yarn")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            check(long or not factors, name, factors, "requires kind=longrope")
            check(not long or len(factors) > 0, name, factors, "is required by kind=longrope")
            check(all(factor > 0 for factor in factors), name, factors, "must be > 0")
        same = len(self.short_factors) == len(self.long_factors)
        check(same, "short_factors", self.short_factors, "must be as many as long_factors")
        check(not long or original > 1, "original_length", original, "must be > 1 with longrope")
        if self.kind == "dynamic":
            check(self.factor >= 1, "factor", self.factor, "must be ≥ 1 with kind=dynamic")

    def check_channels(self, rotated: int) -> None:
        """Raise `ConfigError` unless ``rotated`` channels can have these frequencies."""
        if self.kind == "dynamic":
            check(rotated > 2, "kind", self.kind, "requires more than 2 channels that rotate")
        if self.kind == "longrope":
            count = len(self.short_factors)
            allowed = f"must have {rotated // 2}, one for each pair of channels that rotates"
            check(2 * count == rotated, "number of short_factors", count, allowed)

    def __call__(self, theta: jax.Array, base: float) -> jax.Array:
        """The scaled frequencies ``[c/2]`` for ``theta``, the frequencies of ``base``."""
        if self.kind == "linear":
            return theta / self.factor
        if self.kind == "dynamic":
            channels, stretch = 2 * len(theta), self._length / self.original_length
            growth = self.factor * max(stretch, 1) - (self.factor - 1)
            return frequencies(channels, base * growth ** (channels / (channels - 2)))
        if self.kind == "longrope":
            long = self._length > self.original_length
            return theta / jnp.asarray(self.long_factors if long else self.short_factors)
        if self.kind == "yarn":
            unscaled = self._unscaled_by_index(len(theta), base)
        else:
            turns = self.original_length * theta / (2 * math.pi)
            unscaled = jnp.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return unscaled * theta + (1 - unscaled) * theta / self.factor

    def _unscaled_by_index(self, count: int, base: float) -> jax.Array:
        def index(turns):  # of the frequency with so many turns
            return count * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)

        first, last = index(self.high_turns), index(self.low_turns)
        if self.truncate:
            # float: of a base near 1 they may exceed int32
            first, last = float(math.floor(first)), float(math.ceil(last))
        first, last = max(first, 0), min(last, 2 * count - 1)
        # as in the released code, so that nothing is divided by 0
        width = last - first or 0.001
        return 1 - jnp.clip((jnp.arange(count, dtype=jnp.float32) - first) / width, 0, 1)

    @property
    def _length(self) -> int:
        return self.length or self.original_length

    @property
    def growth(self) -> float:
        """`magnitude`, or its default if it is None."""
        if self.magnitude is not None:
            return self.magnitude
        if self.kind == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return yarn_growth(self.factor) if self.kind == "yarn" else 1.0


def yarn_growth(factor: float, weight: float = 1.0) -> float:
    """``√(1/t) = 0.1 · weight · ln(factor) + 1`` of YaRN's temperature ``t`` (§3.4)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """The configuration of rotary embeddings.

    ``base``: of θ. ``fraction``: the share of a head's channels that rotate; they come first.
    ``interleaved``: True: pairs are channels (0, 1), (2, 3), … as in the paper. False: channels
    ``i`` and ``i + c/2``, as in GPT-NeoX and Llama checkpoints. ``scaling``: of the frequencies.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self):
        check_types(self)
        check(self.base > 1, "base", self.base, "must be > 1")
        check(0 < self.fraction <= 1, "fraction", self.fraction, "must be in (0, 1]")

    def check_channels(self, channels: int) -> None:
        """Raise `ConfigError` unless heads of ``channels`` can be rotated in this way."""
        rotated = rotated_channels(channels, self.fraction)
        if self.scaling is not None:
            self.scaling.check_channels(rotated)

    def __call__(self, x_bthc: jax.Array, positions_bt: jax.Array) -> jax.Array:
        """`rotary` of ``x_bthc`` with these options."""
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
    """Rotate the first ``fraction`` of the channels by the position (eq. 34); others are unchanged.

    Args:
      x_bthc: queries or keys, any float dtype; angles and products are float32.
      positions_bt: int32, broadcastable to ``[b, t]``.
      scaling: maps the frequencies ``[c/2]`` and their base to other frequencies, such as a
        `RotaryScaling`.
      magnitude: multiplies the channels that are rotated (YaRN).

    Returns: the same shape and dtype as ``x_bthc``.
    """
    rotated = rotated_channels(x_bthc.shape[-1], fraction)
    theta = frequencies(rotated, base)
    if scaling is not None:
        theta = scaling(theta, base)
    angles = positions_bt[..., None, None].astype(jnp.float32) * theta  # [b, t, 1, c/2]
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    x, unrotated = x_bthc[..., :rotated].astype(jnp.float32), x_bthc[..., rotated:]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., : rotated // 2], x[..., rotated // 2 :]
    rotated_pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        y = jnp.stack(rotated_pair, axis=-1).reshape(x.shape)
    else:
        y = jnp.concatenate(rotated_pair, axis=-1)
    y = y.astype(x_bthc.dtype)
    return y if rotated == x_bthc.shape[-1] else jnp.concatenate((y, unrotated), axis=-1)


def rotated_channels(channels: int, fraction: float) -> int:
    """The number of ``channels`` that rotate; raises `ConfigError` unless it is even and ≥ 2."""
    rotated = int(channels * fraction)
    check(
        rotated >= 2 and rotated % 2 == 0,
        "rotary.fraction",
        fraction,
        f"must rotate an even number ≥ 2 of channels, not {rotated} of head_dim={channels}",
    )
    return rotated
