"""The static options of a call of flash attention, and the bias that they add to scores."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.mask import Mask

# A masked score, and the log-sum-exp of a query that sees no key. Not −inf, so that a difference of
# two is 0, not NaN.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static options of a call.

    ``packed``: the mask has segments. ``limits``: it has ``until``.
    """

    causal: bool
    window: int | None
    packed: bool
    limits: bool
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, mask: Mask, channels: int, scale: float | None, soft_cap: float | None) -> "Spec":
        """The spec of a call; ``scale`` None is ``1 / sqrt(channels)``."""
        return cls(
            causal=mask.causal,
            window=mask.window,
            packed=mask.q_segments_bt is not None,
            limits=mask.until_bt is not None,
            scale=1 / math.sqrt(channels) if scale is None else scale,
            soft_cap=soft_cap,
        )


def sees_a_key(top) -> jax.Array:
    """Whether the greatest score ``top`` of a query is one of a key that it sees.

    A query without such a key has summed masked scores, exp(MASKED − MASKED) = 1. NaN is a score:
    the result shows it.
    """
    return jnp.logical_not(top <= MASKED / 2)


def biased(spec: Spec, scores, distance, slopes) -> jax.Array:
    """Scores with scale, ALiBi (``slopes`` broadcast with ``distance``, or None) and soft-cap."""
    scores = scores * spec.scale
    if slopes is not None:
        scores -= slopes * jnp.abs(distance).astype(scores.dtype)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    return scores


def biased_gradient(spec: Spec, scores, d_scores) -> jax.Array:
    """The gradient of `biased`'s argument, from that of its result ``scores``."""
    if spec.soft_cap is not None:
        d_scores *= 1 - jnp.square(scores / spec.soft_cap)
    return d_scores * spec.scale
