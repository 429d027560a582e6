"""What a call of flash attention fixes before it is traced, and how it changes scores."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.mask import Mask

# Not −inf: differences of two of these are 0, not NaN. The log-sum-exp of a row that sees nothing.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static half of a call; the arrays are the other.

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
        """``scale`` None: ``1 / sqrt(channels)``."""
        return cls(
            causal=mask.causal,
            window=mask.window,
            packed=mask.q_segments_bt is not None,
            limits=mask.until_bt is not None,
            scale=1 / math.sqrt(channels) if scale is None else scale,
            soft_cap=soft_cap,
        )


def biased(spec: Spec, scores, distance, slopes) -> jax.Array:
    """Scores after scaling, ALiBi (``slopes`` broadcast against ``distance``, or None) and cap."""
    scores = scores * spec.scale
    if slopes is not None:
        scores -= slopes * jnp.abs(distance).astype(scores.dtype)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    return scores


def biased_gradient(spec: Spec, scores, d_scores) -> jax.Array:
    """From the gradient of `biased`'s result ``scores`` to that of its argument."""
    if spec.soft_cap is not None:
        d_scores *= 1 - jnp.square(scores / spec.soft_cap)
    return d_scores * spec.scale
