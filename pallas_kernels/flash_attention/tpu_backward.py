"""The backward pass of `tpu`: a kernel for dQ, and one for dK and dV.

In the first, a block of queries stays and keys are streamed; in the second, a block of keys stays
and the queries of all heads that share it are streamed. Both recompute the weights from the
log-sum-exp.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.spec import Spec, biased_gradient
from pallas_kernels.flash_attention.tpu import (
    FIRST,
    LAST,
    PLAIN,
    Call,
    Shape,
    dot,
    nearest,
    pad,
    scores,
    split_scalars,
)


def _gradients(spec, shape, refs, mask_refs, slope, i, j, masked):
    """Weights and gradients of scores, both ``[keys, queries]``."""
    q, k, v, dy, lse, delta = (ref[0, 0] for ref in refs)
    s, seen = scores(spec, shape, q, k, mask_refs, slope, i, j, masked)
    # ≤ 0, except for rounding of the recomputed scores, which must not overflow
    weights = jnp.exp(jnp.minimum(s - lse, 0.0))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    d_scores = weights * (dot(v, dy, LAST) - delta)
    return weights, biased_gradient(spec, s, d_scores)


def _dq_kernel(spec: Spec, shape: Shape, has: tuple[bool, bool], *refs):
    scalars, refs = split_scalars(spec, refs)
    slopes, _, *block, dq_ref, acc_ref = refs
    block, mask_refs = block[:6], block[6:]
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    row = b * shape.q_blocks + i
    j = scalars.first[row] + step

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def body(masked):
        slope = slopes[h] if has[0] else None
        _, d_scores = _gradients(spec, shape, block, mask_refs, slope, i, j, masked)
        k = block[1][0, 0]
        acc_ref[...] += dot(d_scores.astype(k.dtype), k, FIRST)

    scalars.visit(spec, shape, b, i, j, j <= scalars.last[row], body)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0, 0] = acc_ref[...].astype(dq_ref.dtype)


def _dkv_kernel(spec: Spec, shape: Shape, has: tuple[bool, bool], *refs):
    scalars, refs = split_scalars(spec, refs)
    slopes, _, *block, dk_ref, dv_ref, dk_acc, dv_acc = refs
    block, mask_refs = block[:6], block[6:]
    b, k, j, head, step = (pl.program_id(axis) for axis in range(5))
    row = b * shape.k_blocks + j
    i = scalars.first[row] + step

    @pl.when((head == 0) & (step == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def body(masked):
        slope = slopes[k * shape.group + head] if has[0] else None
        weights, d_scores = _gradients(spec, shape, block, mask_refs, slope, i, j, masked)
        q, dy = block[0][0, 0], block[3][0, 0]
        dv_acc[...] += dot(weights.astype(dy.dtype), dy, PLAIN)
        dk_acc[...] += dot(d_scores.astype(q.dtype), q, PLAIN)

    scalars.visit(spec, shape, b, i, j, i <= scalars.last[row], body)

    @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        dk_ref[0, 0] = dk_acc[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


def backward(spec: Spec, sizes: Mapping[str, int], *arrays):
    """``dq_bthc, dk_bskc, dv_bskc``; ``arrays`` as in `xla.backward`."""
    *inputs, lse_bht, delta_bht, dy_bthc = arrays
    call = Call.of(spec, sizes, *inputs)
    shape = call.shape
    b, h, t, c = call.q_bhtc.shape
    k = call.k_bksc.shape[1]
    dy_bhtc = pad(jnp.swapaxes(dy_bthc, 1, 2), 2, t)
    lse, delta = (pad(a, 2, t)[:, :, None] for a in (lse_bht, delta_bht))
    blocks = (
        ("q", call.q_bhtc),
        ("k", call.k_bksc),
        ("k", call.v_bksc),
        ("q", dy_bhtc),
        ("q", lse),
        ("q", delta),
    )

    def shape_of(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    def keys_of(b, h, i, step, scalars):
        row = b * shape.q_blocks + i
        return b, jax.lax.div(h, shape.group), nearest(scalars.first[row], scalars.last[row], step)

    (dq,) = call.run(
        _dq_kernel,
        "flash_attention_dq",
        "query",
        (b, h, shape.q_blocks, shape.k_blocks),
        lambda b, h, i, step, scalars: (b, h, i),
        keys_of,
        blocks,
        [shape_of(call.q_bhtc)],
        ("q",),
        [(shape.query, c)],
    )

    def queries_of(b, k, j, head, step, scalars):
        row = b * shape.k_blocks + j
        block = nearest(scalars.first[row], scalars.last[row], step)
        return b, k * shape.group + head, block

    dk, dv = call.run(
        _dkv_kernel,
        "flash_attention_dkv",
        "key",
        (b, k, shape.k_blocks, shape.group, shape.q_blocks),
        queries_of,
        lambda b, k, j, head, step, scalars: (b, k, j),
        blocks,
        [shape_of(call.k_bksc), shape_of(call.v_bksc)],
        ("k", "k"),
        [(shape.key, c), (shape.key, c)],
    )
    return tuple(
        jnp.swapaxes(a, 1, 2)[:, : like.shape[1]]
        for a, like in zip((dq, dk, dv), inputs, strict=False)
    )
