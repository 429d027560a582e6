"""Paged attention as a loop over groups of pages in plain XLA, on every platform.

A group of pages of every row is copied next to each other and dequantised, so that its keys and
values are in a CPU's cache for the products. The loop ends after the last group that a row has;
for a row that has fewer, the other groups change no bit of its result.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.ranges import extremes, first_and_last, may_see
from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, sees_a_key
from pallas_kernels.mask import Mask, sees
from pallas_kernels.paged_attention.pages import Pages, gathered, parts, unpacked
from pallas_kernels.stored import Stored

# The most numbers in a block of scores, over all heads and rows.
SCORES = 2**20
# With fewer queries for each key head, XLA:CPU multiplies keys by queries in less than half the
# time of queries by keys.
FEW = 32


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
    size = count * pages.page
    mask = pages._replace(table_bn=table_bn).key_mask(mask)
    q_at, k_at, until = mask.q_positions_bt, mask.k_positions_bs, mask.until_bt
    no_segments = (jnp.zeros_like(q_at), jnp.zeros_like(k_at))
    q_in, k_in = (mask.q_segments_bt, mask.k_segments_bs) if spec.packed else no_segments
    of_queries = extremes(q_at, q_in, t, until)  # [b, 1]
    see = may_see(spec, of_queries, extremes(k_at, k_in, size))
    first, last = first_and_last(see.any(0))

    def by_head(a_h):
        return None if a_h is None else a_h.astype(dtype).reshape(k, h // k)[..., None]

    slopes, sinks = by_head(slopes_h), by_head(sinks_h)
    slopes = None if slopes is None else slopes[..., None]
    q = jnp.moveaxis(q_bthc.reshape(b, t, k, h // k, c), 1, 3).astype(dtype)
    # without values, those of codes in two parts are cut at the end
    shared = pages.values is None
    width = c if shared and parts(pages.keys) > 1 else channels

    def group(j, carry):
        top, total, y = carry
        page_bn = jnp.maximum(jax.lax.dynamic_slice_in_dim(table_bn, j * count, count, 1), 0)
        at, inside = (
            jax.lax.dynamic_slice_in_dim(a, j * size, size, 1)[:, None] for a in (k_at, k_in)
        )
        seen = sees(
            spec,
            q_at[..., None],
            at,
            q_in[..., None] if spec.packed else None,
            inside if spec.packed else None,
            None if until is None else until[..., None],
        )  # [b, t, s]
        any_seen = seen.any(1)[:, None]  # [b, 1, s]
        keys = gathered(pages.keys, page_bn)
        values = keys if shared else gathered(pages.values, page_bn)
        scores = biased(spec, _scores(q, keys), (q_at[..., None] - at)[:, None, None], slopes)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        y = y * shrink[..., None] + _weighted(weights, values, any_seen, width)
        return new_top, total, y

    row = (b, k, h // k, t)
    start = (
        jnp.full(row, MASKED, dtype),
        jnp.zeros(row, dtype),
        jnp.zeros((*row, width), dtype),
    )
    top, total, y = jax.lax.fori_loop(first, last + 1, group, start)
    sees_any = sees_a_key(top)
    if sinks is not None:
        new_top = jnp.maximum(top, sinks)
        shrink = jnp.where(sees_any, jnp.exp(top - new_top), 0)
        total = total * shrink + jnp.exp(sinks - new_top)
        y = y * shrink[..., None]
    y = jnp.where(sees_any[..., None], y / jnp.where(sees_any, total, 1)[..., None], 0)
    y_bthc = jnp.moveaxis(y, 3, 1).reshape(b, t, h, width)
    return y_bthc[..., :channels].astype(q_bthc.dtype)


def _scores(q_bkgtc: jax.Array, keys: Stored) -> jax.Array:
    """``q kᵀ``, ``[b, k, g, t, s]``."""
    (_, _, g, t, _), count = q_bkgtc.shape, parts(keys)
    if t * g >= FEW:
        return jnp.einsum("bkgtc,bksc->bkgts", q_bkgtc, keys.load(q_bkgtc.dtype))
    # scales and minima are applied to the few products instead of the keys
    scores_bksgt = 0.0
    for q, k in zip(
        jnp.split(q_bkgtc, count, axis=-1), unpacked(keys.codes, count, q_bkgtc.dtype), strict=True
    ):
        scores_bksgt += jnp.einsum("bksc,bkgtc->bksgt", k, q)
    scores = jnp.moveaxis(scores_bksgt, 2, 4)
    if keys.scale is not None:
        scores *= keys.scale[:, :, None, None]
    if keys.minimum is not None:
        scores += keys.minimum[:, :, None, None] * q_bkgtc.sum(-1, keepdims=True)
    return scores


def _weighted(weights: jax.Array, values: Stored, seen_b1s: jax.Array, width: int) -> jax.Array:
    """``weights v`` for the first ``width`` channels of values, ``[b, k, g, t, width]``.

    A value that no query sees may be anything, also NaN: it counts as 0.
    """
    (_, _, g, t, _), dtype = weights.shape, weights.dtype

    def products(weights, v):
        return jnp.einsum("bkgts,bksc->bkgtc", weights, v[..., :width])

    if t * g >= FEW:
        return products(weights, jnp.where(seen_b1s[..., None], values.load(dtype), 0))
    scaled = weights
    if values.scale is not None:
        scaled = weights * jnp.where(seen_b1s, values.scale, 0)[:, :, None, None]
    sums = []
    for v in unpacked(values.codes, parts(values), dtype):
        if jnp.issubdtype(values.codes.dtype, jnp.floating):
            v = jnp.where(seen_b1s[..., None], v, 0)
        sums.append(products(scaled, v))
    y = jnp.concatenate(sums, axis=-1)
    if values.minimum is not None:
        minimum = jnp.where(seen_b1s, values.minimum, 0)[:, :, None, None]
        y += (weights * minimum).sum(-1, keepdims=True)
    return y
