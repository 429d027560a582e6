"""Flash attention: exact attention whose memory grows with the length, not with its square.

``y = softmax(bias(q kᵀ / √c)) v`` (Vaswani 2017, eq. 1), where ``bias`` is ALiBi, soft-cap and
mask. For a block of queries, the blocks of keys are visited one after another. ``m`` is the
greatest score of a row so far, ``l`` the sum of exponentials, ``o`` the weighted values; a block of
scores ``S`` updates them (FlashAttention, 2205.14135, Alg. 1; the division is at the end as in
FlashAttention-2, 2307.08691, §3.1):

    m' = max(m, max S)     P = exp(S − m')     l' = e^(m−m') l + Σ P     o' = e^(m−m') o + P V

and at the end ``y = o / l`` and ``lse = m + log l``. No array of size ``t · s`` is stored. The
backward pass recomputes ``P = exp(S − lse)`` by the same blocks (FlashAttention-2, Alg. 2), with
``Δ = Σ dy · y − d lse`` for each row:

    dV = Pᵀ dO     dS = P ∘ (dO Vᵀ − Δ)     dQ = dS K     dK = dSᵀ Q

Keys and values are not repeated for the ``h / k`` query heads that share them (grouped heads). A
pair of blocks is skipped if no query sees a key. This is decided by the extremes of positions and
segments in each block (`ranges`), which cover causal masks, windows, packed segments, parts of a
longer sequence and caches of different lengths.

Implementations, and what each has in fast memory:

- ``reference``: all scores, in memory. The equation.
- ``xla``: a loop over blocks; a block of scores for all heads, of the size of a CPU's cache. The
  backward pass computes each block of scores once: it adds to dQ in place and sums dK and dV.
- ``tpu``: one block of queries with its ``m, l, o`` in VMEM, over which keys are streamed; a kernel
  for dQ (keys are streamed) and one for dK and dV (queries of all heads of the group are streamed).
  Scores are transposed, ``[keys, queries]``, so that ``m``, ``l`` and ``lse`` are rows; a column
  would use one lane of 128. Float32 and bfloat16.
- ``gpu``: one block of queries with its ``m, l, o`` in registers, over which keys are streamed; a
  kernel for dQ and one for dK and dV. Float32, bfloat16 and float16. See `gpu`. On an H100 or H200
  another kernel can first compute the blocks without a mask (``blocks={"kernels": 2}``,
  `gpu_hopper`). It is not the default before a run on a chip shows that it is correct and faster:
  `ablate bench flash_attention --tune` compares the two.

Every backward pass is deterministic: each gradient is summed by one program in one order.

Limits: the kernels support at most 256 channels for each head; ``xla`` computes wider heads. Slopes
of ALiBi are constants (their gradient is 0). No dropout. Forward mode and second derivatives are
those of the reference (`pallas_kernels.derivatives`) and require its memory. The kernels have been
run interpreted, and compiled for TPUs and for an H100 (`gpu_hopper` was only lowered). They have
not run on a TPU or a GPU yet.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.flash_attention import gpu, gpu_backward, reference, tpu, tpu_backward, xla
from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.mask import CAUSAL, Mask

OP = "flash_attention"

# implementation → the platform whose block sizes (`pallas_kernels.blocks`) it has
PLATFORMS = {"xla": "cpu", "tpu": "tpu", "gpu": "gpu"}

PASSES = {
    "xla": {"forward": xla.forward, "backward": xla.backward},
    "tpu": {"forward": tpu.forward, "backward": tpu_backward.backward},
    "gpu": {"forward": gpu.forward, "backward": gpu_backward.backward},
}


def flash_attention(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    mask: Mask = CAUSAL,
    *,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    soft_cap: float | None = None,
    sinks_h: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of each query over the keys that ``mask`` lets it see.

    It is 0 for a query that sees no key. Scores and softmax are float32; the result has ``q``'s
    dtype.

    Args:
      q_bthc: queries, ``h`` heads of ``c`` channels.
      k_bskc, v_bskc: ``k`` heads, ``h % k == 0``. Query head ``i`` uses key head ``i // (h / k)``.
      mask: default causal over positions ``0, 1, 2, …``.
      alibi_slopes_h: ``slope · |q_position − k_position|`` is subtracted from scores (Press 2022,
        2108.12409, §3).
      soft_cap: scores are ``cap · tanh(score / cap)`` before the mask (Gemma 2, 2408.00118, §2).
      sinks_h: one logit for each head, which is added to the softmax's denominator and has no
        value, so that a head can attend to nothing (gpt-oss; Miller 2023).
      scale: of scores, default ``1 / sqrt(c)``.
      return_lse: also return ``lse_bht``, float32: the log of the sum of a row's exponentiated
        scores, with sinks; −1e30 if the query sees no key. It has a gradient.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes of ``query`` and ``key`` blocks that override `pallas_kernels.blocks`; for
        ``"gpu"`` also ``kernels``, the number of kernels of the forward pass: 1 or 2
        (`gpu_hopper`). ``"xla"`` uses smaller blocks in short causal calls (`xla.CUT`).

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    spec, arrays = _checked(
        q_bthc, k_bskc, v_bskc, mask, alibi_slopes_h, sinks_h, scale=scale, soft_cap=soft_cap
    )
    chosen = choose(OP, implementation, _refusals(q_bthc))
    if chosen == ["reference"]:
        y, lse = reference.attention(spec, *arrays)
    else:
        y, lse = _op(spec, tuple(chosen), _sizes(chosen, blocks))(*arrays)
    return (y, lse) if return_lse else y


def attention_gradients(
    q_bthc: jax.Array,
    k_bskc: jax.Array,
    v_bskc: jax.Array,
    y_bthc: jax.Array,
    lse_bht: jax.Array,
    dy_bthc: jax.Array,
    mask: Mask = CAUSAL,
    *,
    alibi_slopes_h: jax.Array | np.ndarray | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward pass only: ``dq, dk, dv`` for these keys, which may be a part of all keys.

    ``y`` and ``lse`` are results for all keys (and sinks) that the queries see, ``dy`` is the
    gradient of ``y``; ``dq`` is the sum over these keys only. The other arguments are those of
    `flash_attention`, for these keys.

    Raises:
      ValueError: as `flash_attention`.
    """
    spec, arrays = _checked(
        q_bthc, k_bskc, v_bskc, mask, alibi_slopes_h, None, scale=scale, soft_cap=soft_cap
    )
    for name, array in (("y", y_bthc), ("dy", dy_bthc)):
        check_array(name, array, q_bthc.shape)
    b, t, h, _ = q_bthc.shape
    check_array("lse", lse_bht, (b, h, t))
    chosen = choose(OP, implementation, _refusals(q_bthc))
    acc_dtype = lse_bht.dtype
    delta_bht = jnp.einsum("bthc,bthc->bht", dy_bthc.astype(acc_dtype), y_bthc.astype(acc_dtype))
    if chosen == ["reference"]:
        return reference.backward(spec, *arrays, lse_bht, delta_bht, dy_bthc)
    table = _table(spec, chosen, dict(_sizes(chosen, blocks)), "backward")
    return per_platform(chosen, table, *arrays, lse_bht, delta_bht, dy_bthc)


def _refusals(q_bthc: jax.Array) -> dict[str, str | None]:
    """What each implementation does not support in a call with these queries, or None."""
    return {"xla": None, "tpu": tpu.refusal(q_bthc), "gpu": gpu.refusal(q_bthc)}


def _sizes(chosen: list[str], blocks: Mapping[str, int] | None):
    """The block sizes of each implementation in ``chosen``, hashable."""
    return tuple((name, tuple(block_sizes(OP, PLATFORMS[name], blocks).items())) for name in chosen)


def _checked(
    q_bthc, k_bskc, v_bskc, mask: Mask, alibi_slopes_h, sinks_h, *, scale, soft_cap
) -> tuple[Spec, tuple[Any, Any, Any, Mask, Any, Any]]:
    """The call's `Spec`, and its checked arrays: ``q, k, v, mask, slopes, sinks``."""
    check(q_bthc.ndim == 4, "q.shape", q_bthc.shape, "must be [batch, time, heads, channels]")
    check(k_bskc.ndim == 4, "k.shape", k_bskc.shape, "must be [batch, time, heads, channels]")
    b, t, h, c = q_bthc.shape
    s, k = k_bskc.shape[1:3]
    check(
        min(b, t, h, c, s, k) > 0, "q.shape", q_bthc.shape, f"no size may be 0; k's {k_bskc.shape}"
    )
    check(h % k == 0, "num_heads", h, f"must be a multiple of num_kv_heads={k}")
    check_array("q", q_bthc, (b, t, h, c))
    for name, array in (("k", k_bskc), ("v", v_bskc)):
        check_array(name, array, (b, s, k, c))
        allowed = f"must be q's, {q_bthc.dtype}"
        check(array.dtype == q_bthc.dtype, f"{name}.dtype", str(array.dtype), allowed)
    check(soft_cap is None or soft_cap > 0, "soft_cap", soft_cap, "must be > 0")
    mask = mask.whole(b, t, s)
    slopes = None
    if alibi_slopes_h is not None:
        slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes_h))
        check_array("alibi_slopes", slopes, (h,))
    if sinks_h is not None:
        check_array("sinks", sinks_h, (h,))
    return Spec.of(mask, c, scale, soft_cap), (q_bthc, k_bskc, v_bskc, mask, slopes, sinks_h)


@functools.lru_cache(maxsize=256)
def _op(spec, chosen, sizes):
    return differentiable(
        functools.partial(_forward, spec, chosen, sizes),
        functools.partial(_backward, spec, chosen, sizes),
        functools.partial(reference.attention, spec),
    )


def _table(spec, chosen, sizes, name):
    """The pass ``name`` of every implementation in ``chosen``."""
    return {n: functools.partial(PASSES[n][name], spec, dict(sizes[n])) for n in chosen}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(spec, chosen, sizes, *arrays):
    y, lse = per_platform(chosen, _table(spec, chosen, dict(sizes), "forward"), *arrays)
    return (y, lse), (y, lse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(spec, chosen, sizes, arrays, saved, cotangents):
    (y, lse), (dy, d_lse) = saved, cotangents
    # Δ: the term that the gradients of all scores of a row share
    acc_dtype = lse.dtype
    delta_bht = jnp.einsum("bthc,bthc->bht", dy.astype(acc_dtype), y.astype(acc_dtype)) - d_lse
    table = _table(spec, chosen, dict(sizes), "backward")
    dq, dk, dv = per_platform(chosen, table, *arrays, lse, delta_bht, dy)
    sinks = arrays[-1]
    d_sinks = None
    if sinks is not None:
        # a sink is a key with value 0
        weight = jnp.exp(sinks.astype(acc_dtype)[:, None] - lse)
        d_sinks = -jnp.sum(weight * delta_bht, (0, 2)).astype(sinks.dtype)
    return dq, dk, dv, None, None, d_sinks
