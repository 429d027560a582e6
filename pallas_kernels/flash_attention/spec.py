"""What a call of flash attention fixes before it is traced, and which keys a query sees."""

import dataclasses

import jax
import jax.numpy as jnp

# Not −inf: differences of two of these are 0, not NaN. The log-sum-exp of a row that sees nothing.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static half of a call; the arrays are the other.

    ``packed``: segments matter.
    """

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    packed: bool


def visible(spec: Spec, q_positions, k_positions, q_segments, k_segments) -> jax.Array:
    """Which keys each query sees, from positions and segments that broadcast.

    A key is seen when both positions are ≥ 0, its segment is the query's, it is not in the future
    (``causal``) and ``|q_position − k_position| < window``.
    """
    distance = q_positions - k_positions
    seen = jnp.broadcast_to(k_positions >= 0, distance.shape)
    # causal: q ≥ k ≥ 0
    seen &= distance >= 0 if spec.causal else q_positions >= 0
    if spec.window is not None:
        seen &= jnp.abs(distance) < spec.window
    if spec.packed:
        seen &= q_segments == k_segments
    return seen


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
