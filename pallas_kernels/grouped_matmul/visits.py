"""Which tile of rows meets which group: what the kernels know before they begin.

Rows are sorted by group, so the tiles that a group touches are consecutive, and the groups that a
tile touches too: a list of visits (tile, group), sorted by both, has at most ``tiles + groups``
entries. A tile that several groups share is visited once for each of them.
"""

import jax
import jax.numpy as jnp


def bounds(group_sizes_e: jax.Array, rows: int) -> jax.Array:
    """Where groups begin: group ``i`` is ``[bounds[i], bounds[i + 1])``; the last is the rest."""
    ends_e = jnp.cumsum(group_sizes_e.astype(jnp.int32), dtype=jnp.int32)
    edge = jnp.zeros((1,), jnp.int32)
    return jnp.concatenate([edge, ends_e, edge + rows])


def visit_groups(number_g: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lay ``number_g[g]`` visits of each group ``g`` in a row of length ``most``.

    Returns:
      the group of each visit, which visit of its group it is, and how many visits there are.
      Entries beyond these repeat the last.
    """
    ends_g = jnp.cumsum(number_g, dtype=jnp.int32)
    at_v = jnp.minimum(jnp.arange(most, dtype=jnp.int32), ends_g[-1] - 1)
    group_v = jnp.sum(at_v[:, None] >= ends_g, 1, dtype=jnp.int32)
    return group_v, at_v - (ends_g - number_g)[group_v], ends_g[-1]


def touched(bounds_g: jax.Array, tile: int, *, empty: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of each group, and how many tiles it touches (``empty`` if it has no row)."""
    starts_g, ends_g = bounds_g[:-1], bounds_g[1:]
    first_g = starts_g // tile
    # of a group with rows; an empty one needs none of it
    last_g = jnp.maximum(ends_g - 1, 0) // tile
    return first_g, jnp.where(ends_g > starts_g, last_g - first_g + 1, empty)
