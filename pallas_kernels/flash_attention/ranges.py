"""Which blocks of keys a block of queries may see, from the extremes of the blocks.

The extremes of a block are the least and greatest position and segment in it. For a pair of blocks
they show in O(1) that no query sees any key (the pair is skipped), or that every query sees every
key (no mask is required), for any positions: packed segments, windows, prefixes, parts of a longer
sequence, a rolling cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import Spec


class Extremes(NamedTuple):
    """Least and greatest position (of those ≥ 0) and segment in each block: int32 ``[..., n]``.

    A block with padding only has ``low`` > ``high``. ``lowest`` includes padding, −1. ``reach`` and
    ``least_reach``, for queries whose mask has ``until``: the greatest and the least, over queries,
    of the last position that a query sees; −1 for padding.
    """

    low: jax.Array
    high: jax.Array
    lowest: jax.Array
    first_segment: jax.Array
    last_segment: jax.Array
    reach: jax.Array | None = None
    least_reach: jax.Array | None = None


def extremes(
    positions: jax.Array, segments: jax.Array, block: int, until: jax.Array | None = None
) -> Extremes:
    """The extremes of int32 arrays ``[..., length]``, whose length is a multiple of ``block``."""
    by_block = (*positions.shape[:-1], -1, block)
    positions, segments = positions.reshape(by_block), segments.reshape(by_block)
    real = positions >= 0
    reach = least_reach = None
    if until is not None:
        limits = jnp.where(real, jnp.maximum(positions, until.reshape(by_block)), -1)
        reach, least_reach = limits.max(-1), limits.min(-1)
    largest = jnp.iinfo(jnp.int32).max
    return Extremes(
        jnp.where(real, positions, largest).min(-1),
        positions.max(-1),
        positions.min(-1),
        jnp.where(real, segments, largest).min(-1),
        jnp.where(real, segments, -largest).max(-1),
        reach,
        least_reach,
    )


def may_see(spec: Spec, q: Extremes, k: Extremes) -> jax.Array:
    """Whether any query of block ``q`` may see any key of block ``k``; the two broadcast."""
    seen = (k.high >= 0) & (q.high >= 0)
    if spec.causal:
        seen &= (q.high if q.reach is None else q.reach) >= k.low
    if spec.window is not None:
        seen &= q.low - k.high < spec.window
        seen &= k.low - q.high < spec.window
    if spec.packed:
        seen &= (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
    return seen


def all_see(spec: Spec, q: Extremes, k: Extremes) -> jax.Array:
    """Whether every query of block ``q`` sees every key of block ``k``; the two broadcast."""
    seen = (k.lowest >= 0) & (q.lowest >= 0)
    if spec.causal:
        seen &= (q.lowest if q.least_reach is None else q.least_reach) >= k.high
    if spec.window is not None:
        seen &= q.high - k.lowest < spec.window
        seen &= k.high - q.lowest < spec.window
    if spec.packed:
        seen &= (q.first_segment == k.last_segment) & (k.first_segment == q.last_segment)
    return seen


def first_and_last(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and last index of True in ``[..., n]``; ``(0, −1)`` if there is none."""
    n = seen.shape[-1]
    any_seen = seen.any(-1)
    first = jnp.where(any_seen, jnp.argmax(seen, -1), 0).astype(jnp.int32)
    last = jnp.where(any_seen, n - 1 - jnp.argmax(seen[..., ::-1], -1), -1).astype(jnp.int32)
    return first, last


class Visit(NamedTuple):
    """The blocks to visit: consecutive ``clear`` blocks, without a mask, and others around them.

    ``[first, end)`` are visited; of these, ``[first_clear, end_clear)`` require no mask.
    """

    first: jax.Array
    first_clear: jax.Array
    end_clear: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, see: jax.Array, clear: jax.Array) -> "Visit":
        """The visit for `may_see` and `all_see` of ``[n]`` blocks."""
        first, last = first_and_last(see)
        first_clear, last_clear = first_and_last(see & clear)
        inside = jnp.arange(see.shape[-1])
        inside = (inside >= first_clear) & (inside <= last_clear)
        consecutive = ~jnp.any(inside & ~(see & clear)) & (last_clear >= first_clear)
        first_clear = jnp.where(consecutive, first_clear, first)
        return cls(
            first, first_clear, jnp.where(consecutive, last_clear + 1, first_clear), last + 1
        )

    def loop(self, masked, unmasked, carry):
        """``carry`` after ``masked(j, carry)`` or ``unmasked(j, carry)`` for every block ``j``.

        These are two loops without branches, because XLA copies the results of a branch.
        """
        before = self.first_clear - self.first
        skipped = self.end_clear - self.first_clear

        def around(n, carry):
            j = self.first + n
            return masked(jnp.where(n < before, j, j + skipped), carry)

        carry = jax.lax.fori_loop(self.first_clear, self.end_clear, unmasked, carry)
        return jax.lax.fori_loop(0, before + self.end - self.end_clear, around, carry)
