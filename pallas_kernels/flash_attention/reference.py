"""The equation, with every score in memory: what the other implementations are held against."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, visible


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
    b, t, h, c = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    exact = jnp.promote_types(jnp.float32, q_bthc.dtype)
    q_btkgc = q_bthc.reshape(b, t, k, h // k, c)
    scores_bkgts = jnp.einsum("btkgc,bskc->bkgts", q_btkgc, k_bskc, preferred_element_type=exact)

    def by_head(a_h):
        return None if a_h is None else a_h.astype(exact).reshape(k, h // k)[:, :, None, None]

    q_at, k_at = q_positions_bt[:, None, None, :, None], k_positions_bs[:, None, None, None, :]
    scores_bkgts = biased(spec, scores_bkgts, q_at - k_at, by_head(slopes_h))
    seen = visible(
        spec,
        q_at,
        k_at,
        q_segments_bt[:, None, None, :, None],
        k_segments_bs[:, None, None, None, :],
    )
    scores_bkgts = jnp.where(seen, scores_bkgts, MASKED)

    top = jnp.max(scores_bkgts, axis=-1, keepdims=True)
    sinks = by_head(sinks_h)
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
