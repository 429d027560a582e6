"""The equation of the grouped matmul: one dense product for each expert."""

import jax
import jax.numpy as jnp


def grouped_matmul(x_md, weights_edf, group_sizes_e):
    """y[i] = x[i] @ weights[e(i)], and 0 where row i is in no group."""
    wide = jnp.promote_types(x_md.dtype, jnp.float32)
    ends_e = jnp.cumsum(group_sizes_e)
    rows_m = jnp.arange(x_md.shape[0])
    y_mf = jnp.zeros((x_md.shape[0], weights_edf.shape[2]), wide)
    for e in range(weights_edf.shape[0]):
        inside_m = (rows_m >= ends_e[e] - group_sizes_e[e]) & (rows_m < ends_e[e])
        group_md = jnp.where(inside_m[:, None], x_md.astype(wide), 0)
        y_mf += jnp.dot(group_md, weights_edf[e].astype(wide), precision=jax.lax.Precision.HIGHEST)
    return y_mf.astype(x_md.dtype)
