"""The equation of attention, with all scores in memory: the other implementations must equal it."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import MASKED, Spec, biased, biased_gradient
from pallas_kernels.mask import Mask


def attention(
    spec: Spec,
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    mask: Mask,
    slopes_h: jax.Array | None,
    sinks_h: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """``softmax(bias(q kᵀ)) v`` and the log-sum-exp of its scores: ``y_bthc, lse_bht``.

    Softmax and log-sum-exp are float32, or float64 if ``q`` is. The result of a query that sees no
    key is 0.
    """
    b, t, h, _ = q_bthc.shape
    k = k_bskc.shape[2]
    scores_bkgts, seen = _scores(spec, q_bthc, k_bskc, mask, slopes_h)
    scores_bkgts = jnp.where(seen, scores_bkgts, MASKED)

    top = jnp.max(scores_bkgts, axis=-1, keepdims=True)
    sinks = _by_head(sinks_h, k, scores_bkgts.dtype)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    # without this, weights of a row without visible keys would be exp(MASKED − MASKED) = 1
    weights_bkgts = jnp.where(seen, jnp.exp(scores_bkgts - top), 0.0)
    total = jnp.sum(weights_bkgts, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1.0)
    lse = jnp.where(sees_any, jnp.log(total) + top, MASKED)
    y_bkgtc = jnp.einsum(
        "bkgts,bskc->bkgtc", weights_bkgts / total, v_bskc, preferred_element_type=total.dtype
    )
    y_bthc = jnp.moveaxis(y_bkgtc, 3, 1).reshape(b, t, h, -1)
    return y_bthc.astype(v_bskc.dtype), lse.reshape(b, h, t)


def _scores(spec: Spec, q_bthc, k_bskc, mask: Mask, slopes_h):
    """``bias(q kᵀ)``, and whether each query sees each key: ``scores_bkgts, seen_b11ts``."""
    b, t, h, c = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    acc_dtype = jnp.promote_types(jnp.float32, q_bthc.dtype)
    q_btkgc = q_bthc.reshape(b, t, k, h // k, c)
    scores = jnp.einsum("btkgc,bskc->bkgts", q_btkgc, k_bskc, preferred_element_type=acc_dtype)
    q_at = mask.q_positions_bt[:, None, None, :, None]
    k_at = mask.k_positions_bs[:, None, None, None, :]
    scores = biased(spec, scores, q_at - k_at, _by_head(slopes_h, k, acc_dtype))
    return scores, mask.visible(t, s)[:, None, None]


def _by_head(a_h: jax.Array | None, k: int, dtype) -> jax.Array | None:
    return None if a_h is None else a_h.astype(dtype).reshape(k, -1)[:, :, None, None]


def backward(
    spec: Spec, q_bthc, k_bskc, v_bskc, mask: Mask, slopes_h, sinks_h, lse_bht, delta_bht, dy_bthc
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dq, dk, dv`` from log-sum-exp and Δ, by the equations in the docstring of the package."""
    del sinks_h  # the log-sum-exp contains them
    b, t, h, c = q_bthc.shape
    k = k_bskc.shape[2]
    acc_dtype = lse_bht.dtype
    scores, seen = _scores(spec, q_bthc, k_bskc, mask, slopes_h)
    lse, delta = (a.reshape(b, k, h // k, t, 1) for a in (lse_bht, delta_bht))
    weights = jnp.where(seen, jnp.exp(scores - lse), 0.0)
    q, dy = (a.reshape(b, t, k, h // k, c).astype(acc_dtype) for a in (q_bthc, dy_bthc))
    d_weights = jnp.einsum("btkgc,bskc->bkgts", dy, v_bskc.astype(acc_dtype))
    d_scores = biased_gradient(spec, scores, weights * (d_weights - delta))
    dq = jnp.einsum("bkgts,bskc->btkgc", d_scores, k_bskc.astype(acc_dtype)).reshape(q_bthc.shape)
    dk = jnp.einsum("bkgts,btkgc->bskc", d_scores, q)
    dv = jnp.einsum("bkgts,btkgc->bskc", weights, dy)
    return dq.astype(q_bthc.dtype), dk.astype(k_bskc.dtype), dv.astype(v_bskc.dtype)
