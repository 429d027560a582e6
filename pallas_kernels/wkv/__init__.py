"""The recurrences of RWKV, with a state of fixed size.

`wkv4` (RWKV-4, 2305.13048, eq. 16): for each channel a weighted mean over earlier tokens, whose
weights decay by ``e^(−exp(w))`` at each token, and the current token, which has a bonus ``u``:

    y_t = (N_{t−1} + e^(u + k_t) v_t) / (D_{t−1} + e^(u + k_t))
    N_t = e^(−exp(w)) N_{t−1} + e^(k_t) v_t          D_t the same with 1 for v

The state has ``N`` and ``D`` divided by ``e^m``, where ``m`` is the greatest exponent so far (the
paper's appendix on stability), so that no key causes overflow or underflow.

`wkv7` (RWKV-7, 2503.14456, §4): for each head a matrix ``S``, values by keys, with a decay for each
key channel and a rank-one change of its contents:

    S_t = S_{t−1} (diag(e^(−exp(w_t))) + a_tᵀ b_t) + v_tᵀ k_t          y_t = r_t S_tᵀ

Implementations, and what each has in fast memory:

- ``reference``: token by token, differentiated by JAX. The equation.
- ``xla``: the same step; in the backward pass the states of one chunk. See `xla`.
- ``tpu``: the state of up to 1,024 channels (`wkv4`) or of a head (`wkv7`) in VMEM, over all
  tokens. See `kernels` and `tpu`.
- ``gpu``: the state of 32 channels (`wkv4`) or of a head (`wkv7`) in registers. See `gpu`.

The last three store the state at the beginning of each chunk of tokens, and the backward pass
recomputes the states of one chunk at a time: ``t / chunk + chunk`` states instead of ``t``. It goes
back by the transpose of a step, which JAX derives, so that nothing is divided by a decay and no
exponent grows. Every backward pass is deterministic.

Packed segments: the state is empty before a token whose segment is not that of its predecessor. The
first token of a call always continues from ``initial_state``.

Limits: the kernels go token by token, so `wkv7` is bound by latency: of the matrix unit on a TPU,
and of the sums of a head on a GPU. The GPU kernel supports heads of at most 128 channels; ``xla``
computes wider heads. Forward mode and second derivatives are those of the reference
(`pallas_kernels.derivatives`). The kernels have been compiled for TPUs and for an H100 and run
interpreted; they have not run on a TPU or a GPU yet.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.wkv import gpu, reference, tpu, xla
from pallas_kernels.wkv.reference import EMPTY

PASSES = {
    "xla": {"forward": xla.forward, "backward": xla.backward},
    "tpu": {"forward": tpu.forward, "backward": tpu.backward},
    "gpu": {"forward": gpu.forward, "backward": gpu.backward},
}

State4 = tuple[jax.Array, jax.Array, jax.Array]


def wkv4(
    w_d: jax.Array,
    u_d: jax.Array,
    k_btd: jax.Array,
    v_btd: jax.Array,
    *,
    segment_ids_bt: jax.Array | None = None,
    initial_state: State4 | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[jax.Array, State4]:
    """RWKV-4's weighted mean over tokens; the result has ``v``'s dtype.

    Args:
      w_d: parameters of the decay; the weight of a token decays by ``exp(−exp(w))``.
      u_d: the bonus of the current token.
      k_btd, v_btd: keys (logarithms of weights) and values.
      segment_ids_bt: integers; the state is empty again where they change.
      initial_state: numerator, denominator and greatest exponent, each ``[b, d]``; the empty state
        is ``0, 0, −1e38``.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: tokens in a ``chunk``, and ``rows`` of
        128 channels in a program on a TPU.

    Returns:
      ``y_btd`` and the final state, float32 (float64 if ``k`` is).

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    check(k_btd.ndim == 3, "k.shape", k_btd.shape, "must be [batch, time, channels]")
    check(min(k_btd.shape) > 0, "k.shape", k_btd.shape, "no size may be 0")
    b, t, d = k_btd.shape
    check_array("k", k_btd, (b, t, d))
    check_array("v", v_btd, (b, t, d))
    check_array("w", w_d, (d,))
    check_array("u", u_d, (d,))
    acc_dtype = reference.exact(k_btd)
    if initial_state is None:
        zeros = jnp.zeros((b, d), acc_dtype)
        initial_state = (zeros, zeros, jnp.full((b, d), EMPTY, acc_dtype))
    check(len(initial_state) == 3, "initial_state", len(initial_state), "must be three arrays")
    for array in initial_state:
        check_array("initial_state", array, (b, d))
    w, u, k, v = (x.astype(acc_dtype) for x in (w_d, u_d, k_btd, v_btd))
    numerator, denominator, greatest = (array.astype(acc_dtype) for array in initial_state)
    y, state = _scan(
        "wkv4",
        (-jnp.exp(w), u),
        (numerator, denominator, greatest),
        (k, v),
        _resets(segment_ids_bt, b, t),
        implementation,
        blocks,
    )
    return y.astype(v_btd.dtype), state


def wkv7(
    r_bthc: jax.Array,
    w_bthc: jax.Array,
    k_bthc: jax.Array,
    v_bthc: jax.Array,
    a_bthc: jax.Array,
    b_bthc: jax.Array,
    *,
    segment_ids_bt: jax.Array | None = None,
    initial_state_bhcc: jax.Array | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """RWKV-7's generalised delta rule; the result has ``v``'s dtype.

    Args:
      r_bthc: receptances, with which the state is read.
      w_bthc: ``log(−log(decay))``: a key channel decays by ``exp(−exp(w))``.
      k_bthc, v_bthc: keys and values.
      a_bthc, b_bthc: ``S aᵀ b`` is added to the state ``S``; in RWKV-7 ``a = −κ`` and
        ``b = κ · rate`` for a key ``κ`` of norm 1.
      segment_ids_bt: integers; the state is set to 0 where they change.
      initial_state_bhcc: values by keys; default 0.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: the size of a ``chunk`` in tokens, which overrides `pallas_kernels.blocks`.

    Returns:
      ``y_bthc`` and ``final_state_bhcc``, float32 (float64 if ``k`` is).

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    check(k_bthc.ndim == 4, "k.shape", k_bthc.shape, "must be [batch, time, heads, channels]")
    check(min(k_bthc.shape) > 0, "k.shape", k_bthc.shape, "no size may be 0")
    b, t, h, c = k_bthc.shape
    arrays = {"r": r_bthc, "w": w_bthc, "k": k_bthc, "v": v_bthc, "a": a_bthc, "b": b_bthc}
    for name, array in arrays.items():
        check_array(name, array, (b, t, h, c))
    acc_dtype = reference.exact(k_bthc)
    if initial_state_bhcc is None:
        initial_state_bhcc = jnp.zeros((b, h, c, c), acc_dtype)
    check_array("initial_state", initial_state_bhcc, (b, h, c, c))
    r, w, k, v, a, b_ = (x.astype(acc_dtype) for x in arrays.values())
    y, [state] = _scan(
        "wkv7",
        (),
        (initial_state_bhcc.astype(acc_dtype),),
        (r, w, k, v, a, b_),
        _resets(segment_ids_bt, b, t),
        implementation,
        blocks,
    )
    return y.astype(v_bthc.dtype), state


def _resets(segment_ids_bt, b, t):
    """Whether a token has another segment than its predecessor."""
    if segment_ids_bt is None:
        return jnp.zeros((b, t), bool)
    check_array("segment_ids", segment_ids_bt, (b, t), "integer")
    changed = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def _scan(op, constants, state, tokens, reset_bt, implementation, blocks) -> Any:
    refusals = {"xla": None, "tpu": tpu.refusal(tokens[0]), "gpu": gpu.refusal(tokens[0])}
    chosen = choose(op, implementation, refusals)
    # the same sizes for all: another platform's backward pass may read the stored states
    sizes = tuple(block_sizes("wkv", "cpu", blocks).items())
    if chosen == ["reference"]:
        return reference.scan(op, constants, state, tokens, reset_bt)
    return _op(op, tuple(chosen), sizes)(constants, state, tokens, reset_bt)


@functools.lru_cache(maxsize=256)
def _op(op, chosen, sizes):
    return differentiable(
        functools.partial(_forward, op, chosen, sizes),
        functools.partial(_backward, op, chosen, sizes),
        functools.partial(reference.scan, op),
    )


def _table(op, chosen, sizes, name):
    return {n: functools.partial(PASSES[n][name], op, dict(sizes)) for n in chosen}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(op, chosen, sizes, constants, state, tokens, reset_bt):
    table = _table(op, chosen, sizes, "forward")
    y, end, starts = per_platform(chosen, table, constants, state, tokens, reset_bt)
    return (y, end), starts


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(op, chosen, sizes, arrays, starts, cotangents):
    constants, _, tokens, reset_bt = arrays
    table = _table(op, chosen, sizes, "backward")
    d_constants, d_state, d_tokens = per_platform(
        chosen, table, constants, tokens, reset_bt, starts, *cotangents
    )
    return d_constants, d_state, d_tokens, None
