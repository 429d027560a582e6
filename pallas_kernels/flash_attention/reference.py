"""The equation, with every score in memory: what the other implementations are held against."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import (
    MASKED,
    Spec,
    biased,
    biased_gradient,
    visible,
)


def weights(
    spec: Spec,
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    q_positions_bt: jax.Array,
    k_positions_bs: jax.Array,
    q_segments_bt: jax.Array,
    k_segments_bs: jax.Array,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """``softmax(bias(q kᵀ))`` and the log-sum-exp of its scores: ``weights_bhts, lse_bht``.

    Both are float32, or float64 if ``q`` is. A query that sees nothing has weights of 0.
    """
    b, t, h, _ = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    places = q_positions_bt, k_positions_bs, q_segments_bt, k_segments_bs
    scores_bkgts, seen = _scores(spec, q_bthc, k_bskc, *places, slopes_h)
    scores_bkgts = jnp.where(seen, scores_bkgts, MASKED)

    top = jnp.max(scores_bkgts, axis=-1, keepdims=True)
    sinks = _by_head(sinks_h, k, scores_bkgts.dtype)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    # an all-masked row would be uniform: exp(MASKED − MASKED) = 1
    weights_bkgts = jnp.where(seen, jnp.exp(scores_bkgts - top), 0.0)
    total = jnp.sum(weights_bkgts, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, jnp.log(total) + top, MASKED)
    return (weights_bkgts / total).reshape(b, h, t, s), lse.reshape(b, h, t)


def _scores(spec: Spec, q_bthc, k_bskc, q_positions, k_positions, q_segments, k_segments, slopes_h):
    """``bias(q kᵀ)`` and which are seen: ``scores_bkgts, seen_b11ts``."""
    b, t, h, c = q_bthc.shape
    k = k_bskc.shape[2]
    exact = jnp.promote_types(jnp.float32, q_bthc.dtype)
    q_btkgc = q_bthc.reshape(b, t, k, h // k, c)
    scores = jnp.einsum("btkgc,bskc->bkgts", q_btkgc, k_bskc, preferred_element_type=exact)
    q_at, k_at = q_positions[:, None, None, :, None], k_positions[:, None, None, None, :]
    scores = biased(spec, scores, q_at - k_at, _by_head(slopes_h, k, exact))
    of_queries, of_keys = q_segments[:, None, None, :, None], k_segments[:, None, None, None, :]
    return scores, visible(spec, q_at, k_at, of_queries, of_keys)


def _by_head(a_h: jax.Array | None, k: int, dtype) -> jax.Array | None:
    return None if a_h is None else a_h.astype(dtype).reshape(k, -1)[:, :, None, None]


def mix(weights_bhts: jax.Array, v_bskc: jax.Array) -> jax.Array:
    """The weighted values ``y_bthc``, in ``v``'s dtype."""
    b, h, t, s = weights_bhts.shape
    k, c = v_bskc.shape[2:]
    weights_bkgts = weights_bhts.reshape(b, k, h // k, t, s)
    y_btkgc = jnp.einsum(
        "bkgts,bskc->btkgc", weights_bkgts, v_bskc, preferred_element_type=weights_bhts.dtype
    )
    return y_btkgc.reshape(b, t, h, c).astype(v_bskc.dtype)


def attention(
    spec: Spec, q_bthc, k_bskc, v_bskc, *places_and_biases
) -> tuple[jax.Array, jax.Array]:
    """``y_bthc, lse_bht``; the remaining arguments are those of `weights`."""
    weights_bhts, lse_bht = weights(spec, q_bthc, k_bskc, *places_and_biases)
    return mix(weights_bhts, v_bskc), lse_bht


def backward(
    spec: Spec,
    q_bthc,
    k_bskc,
    v_bskc,
    q_positions_bt,
    k_positions_bs,
    q_segments_bt,
    k_segments_bs,
    slopes_h,
    sinks_h,
    lse_bht,
    delta_bht,
    dy_bthc,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dq, dk, dv`` by the equations of the package's docstring, from the log-sum-exp and Δ."""
    del sinks_h  # they are in the log-sum-exp
    b, t, h, c = q_bthc.shape
    k = k_bskc.shape[2]
    exact = lse_bht.dtype
    places = q_positions_bt, k_positions_bs, q_segments_bt, k_segments_bs
    scores, seen = _scores(spec, q_bthc, k_bskc, *places, slopes_h)
    lse, delta = (a.reshape(b, k, h // k, t, 1) for a in (lse_bht, delta_bht))
    weights = jnp.where(seen, jnp.exp(scores - lse), 0.0)
    q, dy = (a.reshape(b, t, k, h // k, c).astype(exact) for a in (q_bthc, dy_bthc))
    d_weights = jnp.einsum("btkgc,bskc->bkgts", dy, v_bskc.astype(exact))
    d_scores = biased_gradient(spec, scores, weights * (d_weights - delta))
    dq = jnp.einsum("bkgts,bskc->btkgc", d_scores, k_bskc.astype(exact)).reshape(q_bthc.shape)
    dk = jnp.einsum("bkgts,btkgc->bskc", d_scores, q)
    dv = jnp.einsum("bkgts,btkgc->bskc", weights, dy)
    return dq.astype(q_bthc.dtype), dk.astype(k_bskc.dtype), dv.astype(v_bskc.dtype)
