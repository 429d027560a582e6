"""Paged attention as a loop over groups of pages in plain XLA, on every platform.

A group of pages of every row is copied next to each other and dequantised, so that its keys and
values are in a CPU's cache for the products. The loop ends after the last group that a row has;
for a row that has fewer, the other groups change no bit of its result.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.ranges import extremes, first_and_last, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased
from pallas_kernels.mask import Mask, sees
from pallas_kernels.paged_attention.pages import Pages, gathered

# The most numbers in a block of scores, over all heads and rows.
SCORES = 2**20


def forward(
    spec: Spec,
    channels: int,
    sizes: Mapping[str, int],
    q_bthc: jax.Array,
    pages: Pages,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
) -> jax.Array:
    """``y_bthc``; arguments as in `reference.attention`."""
    b, t, h, c = q_bthc.shape
    k, dtype = pages.keys.codes.shape[1], jnp.promote_types(jnp.float32, q_bthc.dtype)
    count = max(1, min(sizes["key"], SCORES // (b * h * t)) // pages.page)  # pages in a group
    count = min(count, pages.table_bn.shape[1])
    table_bn = jnp.pad(
        pages.table_bn, ((0, 0), (0, -pages.table_bn.shape[1] % count)), constant_values=-1
    )
    pages = pages._replace(table_bn=table_bn)
    mask = pages.key_mask(mask)
    size = count * pages.page

    q_at, k_at = mask.q_positions_bt, mask.k_positions_bs
    no_segments = (jnp.zeros_like(q_at), jnp.zeros_like(k_at))
    q_in, k_in = (mask.q_segments_bt, mask.k_segments_bs) if spec.packed else no_segments
    of_queries = extremes(q_at, q_in, t, mask.until_bt)  # [b, 1]
    see = may_see(spec, of_queries, extremes(k_at, k_in, size)).any(0)
    first, last = first_and_last(see)

    def by_head(a_h):
        return None if a_h is None else a_h.astype(dtype).reshape(k, h // k)[..., None]

    slopes, sinks = by_head(slopes_h), by_head(sinks_h)
    slopes = None if slopes is None else slopes[..., None]
    q = jnp.moveaxis(q_bthc.reshape(b, t, k, h // k, c), 1, 3).astype(dtype)

    def group(j, carry):
        top, total, y = carry
        page_bn = jnp.maximum(jax.lax.dynamic_slice_in_dim(table_bn, j * count, count, 1), 0)

        def keys_of(a):
            return jax.lax.dynamic_slice_in_dim(a, j * size, size, 1)[:, None]

        at, inside = keys_of(k_at), keys_of(k_in)
        until = mask.until_bt
        seen = sees(
            spec,
            q_at[..., None],
            at,
            q_in[..., None] if spec.packed else None,
            inside if spec.packed else None,
            None if until is None else until[..., None],
        )  # [b, t, s]
        any_seen = seen.any(1)[:, None, :, None]
        k_bksc = gathered(pages.keys, page_bn).load(dtype)
        if pages.values is None:
            v_bksc = k_bksc[..., :channels]
        else:
            v_bksc = gathered(pages.values, page_bn).load(dtype)
        # what no query sees may be anything, also NaN
        v_bksc = jnp.where(any_seen, v_bksc, 0)
        scores = jnp.einsum("bkgtc,bksc->bkgts", q, k_bksc)
        scores = biased(spec, scores, (q_at[..., None] - at)[:, None, None], slopes)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        y = y * shrink[..., None] + jnp.einsum("bkgts,bksc->bkgtc", weights, v_bksc)
        return new_top, total, y

    row = (b, k, h // k, t)
    start = (
        jnp.full(row, MASKED, dtype),
        jnp.zeros(row, dtype),
        jnp.zeros((*row, channels), dtype),
    )
    top, total, y = jax.lax.fori_loop(first, last + 1, group, start)
    # a query without a visible key has summed masked scores: exp(MASKED − MASKED) = 1
    sees_any = top > MASKED / 2
    if sinks is not None:
        new_top = jnp.maximum(top, sinks)
        shrink = jnp.where(sees_any, jnp.exp(top - new_top), 0)
        total = total * shrink + jnp.exp(sinks - new_top)
        y = y * shrink[..., None]
    y = jnp.where(sees_any[..., None], y / jnp.where(sees_any, total, 1)[..., None], 0)
    return jnp.moveaxis(y, 3, 1).reshape(b, t, h, channels).astype(q_bthc.dtype)
