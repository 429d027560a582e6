"""Visits: pairs of a block of rows and a group with rows in it, computed before a kernel runs.

Rows are sorted by group, so a group has rows in consecutive blocks, and a block has rows of
consecutive groups. A list of visits (block, group), sorted by both, has at most ``blocks + groups``
entries. A block with rows of several groups is visited once for each of them.
"""

import jax
import jax.numpy as jnp


def bounds(group_sizes_e: jax.Array, rows: int) -> jax.Array:
    """Group ``i`` has rows ``[bounds[i], bounds[i + 1])``; the last one is the rows of no group."""
    ends_e = jnp.cumsum(group_sizes_e.astype(jnp.int32), dtype=jnp.int32)
    zero = jnp.zeros((1,), jnp.int32)
    return jnp.concatenate([zero, ends_e, zero + rows])


def visit_groups(number_g: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A list of ``number_g[g]`` visits of each group ``g`` in turn, of length ``most``.

    Returns:
      for each visit its group and its index in the group; and the number of visits. Entries after
      these repeat the last.
    """
    ends_g = jnp.cumsum(number_g, dtype=jnp.int32)
    index_v = jnp.minimum(jnp.arange(most, dtype=jnp.int32), ends_g[-1] - 1)
    group_v = jnp.sum(index_v[:, None] >= ends_g, 1, dtype=jnp.int32)
    return group_v, index_v - (ends_g - number_g)[group_v], ends_g[-1]


def touched(bounds_g: jax.Array, tile: int, *, empty: int) -> tuple[jax.Array, jax.Array]:
    """The first block of each group, and in how many it has rows (``empty`` if it has no row)."""
    starts_g, ends_g = bounds_g[:-1], bounds_g[1:]
    first_g = starts_g // tile
    # for groups with rows only
    last_g = jnp.maximum(ends_g - 1, 0) // tile
    return first_g, jnp.where(ends_g > starts_g, last_g - first_g + 1, empty)
