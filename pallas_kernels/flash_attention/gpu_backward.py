"""The backward pass of `gpu`: a kernel for dQ, and one for dK and dV.

A program of the first has a block of queries and loops over keys; a program of the second has a
block of keys and loops over the queries of all heads that share it. Both recompute the weights from
the log-sum-exp.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.gpu import Call, pad, scores, sides, visits, whole
from pallas_kernels.flash_attention.spec import Spec, biased_gradient
from pallas_kernels.triton_kernels import FIRST, LAST, PLAIN, dot


def _gradients(spec, q, k, v, dy, lse, delta, q_side, k_side, slope, masked):
    """Weights and gradients of scores, both ``[queries, keys]``."""
    s, seen = scores(spec, q, k, q_side, k_side, slope, masked)
    # ≤ 0, except for rounding of the recomputed scores, which must not overflow
    weights = jnp.exp(jnp.minimum(s - lse[:, None], 0.0))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    d_scores = weights * (dot(dy, v, LAST) - delta[:, None])
    return weights, biased_gradient(spec, s, d_scores)


def _dq_kernel(spec: Spec, key: int, has, *refs):
    visit, slopes, _, q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, *mask_refs, dq_ref = refs
    q_side, k_side = sides(mask_refs)
    slope = slopes[pl.program_id(1)] if has[0] else None
    q, dy, lse, delta = q_ref[...], dy_ref[...], lse_ref[...], delta_ref[...]
    q_side = q_side.read()

    def body(masked):
        def block(j, dq):
            key_slice = pl.ds(j * key, key)
            k = k_ref[key_slice, :]
            _, d_scores = _gradients(
                spec,
                q,
                k,
                v_ref[key_slice, :],
                dy,
                lse,
                delta,
                q_side,
                k_side.read(key_slice),
                slope,
                masked,
            )
            return dq + dot(d_scores.astype(k.dtype), k, PLAIN)

        return block

    dq_ref[...] = visits(visit, body, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype)


def _dkv_kernel(spec: Spec, query: int, has, *refs):
    visit, slopes, _, q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, *mask_refs = refs
    *mask_refs, dk_ref, dv_ref = mask_refs
    q_side, k_side = sides(mask_refs)
    k, v, k_side = k_ref[...], v_ref[...], k_side.read()
    group = q_ref.shape[1]
    first = pl.program_id(1) * group

    def of_head(g, carry):
        slope = slopes[first + g] if has[0] else None

        def body(masked):
            def block(i, carry):
                dk, dv = carry
                query_slice = pl.ds(i * query, query)
                q, dy = q_ref[query_slice, g, :], dy_ref[query_slice, g, :]
                weights, d_scores = _gradients(
                    spec, q, k, v, dy, lse_ref[g, query_slice], delta_ref[g, query_slice],
                    q_side.read(query_slice), k_side, slope, masked,
                )  # fmt: skip
                dv += dot(weights.astype(dy.dtype), dy, FIRST)
                dk += dot(d_scores.astype(q.dtype), q, FIRST)
                return dk, dv

            return block

        return visits(visit, body, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def backward(spec: Spec, sizes: Mapping[str, int], *arrays):
    """``dq_bthc, dk_bskc, dv_bskc``; ``arrays`` as in `xla.backward`."""
    *inputs, lse_bht, delta_bht, dy_bthc = arrays
    call = Call.of(spec, sizes, *inputs)
    b, t, h, _ = call.q_bthc.shape
    s, k = call.k_bskc.shape[1:3]
    blocks = (
        ("q", call.q_bthc),
        ("k", call.k_bskc),
        ("k", call.v_bskc),
        ("q", whole(dy_bthc, call.query)),
        ("q", pad(lse_bht, 2, call.query)),
        ("q", pad(delta_bht, 2, call.query)),
    )

    def shape_of(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    (dq,) = call.run(
        _dq_kernel,
        "flash_attention_dq",
        "query",
        (t // call.query, h, b),
        lambda i, h, b: (b, h, i),
        blocks,
        [shape_of(call.q_bthc)],
        "q",
    )
    dk, dv = call.run(
        _dkv_kernel,
        "flash_attention_dkv",
        "key",
        (s // call.key, k, b),
        lambda j, k, b: (b, k, j),
        blocks,
        [shape_of(call.k_bskc), shape_of(call.v_bskc)],
        "kk",
    )
    return tuple(
        a[:, : like.shape[1], :, : like.shape[3]]
        for a, like in zip((dq, dk, dv), inputs, strict=False)
    )
