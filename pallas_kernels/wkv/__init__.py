"""RWKV's recurrences: attention's work in a state that does not grow with the length.

`wkv4` (RWKV-4, 2305.13048, eq. 16): a weighted mean over the past for each channel, whose weights
decay by ``e^(−exp(w))`` a token, and where the current token has a bonus ``u``:

    y_t = (N_{t−1} + e^(u + k_t) v_t) / (D_{t−1} + e^(u + k_t))
    N_t = e^(−exp(w)) N_{t−1} + e^(k_t) v_t          D_t the same with 1 for v

``N`` and ``D`` are kept divided by ``e^m``, ``m`` the greatest exponent so far (the paper's
appendix on stability), so that no key is too large or too small.

`wkv7` (RWKV-7, 2503.14456, §4): a matrix ``S`` a head, values by keys, with a decay for each key
channel and a rank-one change of what it holds:

    S_t = S_{t−1} (diag(e^(−exp(w_t))) + a_tᵀ b_t) + v_tᵀ k_t          y_t = r_t S_tᵀ

Implementations, and what each keeps in fast memory:

- ``reference``: token by token, differentiated by JAX. The equation.
- ``xla``: the same step; the states of one chunk in the backward pass. See `xla`.
- ``tpu``: the state of up to 1,024 channels (`wkv4`) or of a head (`wkv7`) in VMEM while time
  passes; it never leaves. See `kernels` and `tpu`.
- ``gpu``: the state of 32 channels (`wkv4`) or of a head (`wkv7`) in registers. See `gpu`.

The last three keep the state at the beginning of each chunk of tokens, and the backward pass makes
the states of one chunk anew: ``t / chunk + chunk`` states, and not ``t``. It goes back by the
transpose of a step, which JAX derives, so no decay is divided by and no exponent grows. Every
backward pass is deterministic.

Packed segments: a token whose segment is not its predecessor's begins with an empty state. The
first token of a call always goes on from ``initial_state``.

Limits: the kernels go token by token, so that `wkv7` is bound by latency: of the matrix unit on a
TPU, of a head's sums on a GPU, whose heads have at most 128 channels (wider ones take ``xla``).
Forward mode and second derivatives are the reference's (`pallas_kernels.derivatives`). The kernels
have been compiled for TPUs and for an H100 and run interpreted; not run on a TPU or a GPU yet.
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
    """RWKV-4's weighted mean over the past; the result has ``v``'s dtype.

    Args:
      w_d: the decay's parameter; a token's weight decays by ``exp(−exp(w))``.
      u_d: the current token's bonus.
      k_btd, v_btd: keys (logarithms of weights) and values.
      segment_ids_bt: integers; the state is emptied where they change.
      initial_state: numerator, denominator and greatest exponent, each ``[b, d]``; an empty one is
        ``0, 0, −1e38``.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: tokens of a ``chunk``, and ``rows`` of
        128 channels that a TPU's program takes.

    Returns:
      ``y_btd`` and the final state, float32 (float64 if ``k`` is).

    Raises:
      ValueError: names the argument that has another shape, dtype or range than said here, or the
        implementation that cannot serve, with the reason.
    """
    check(k_btd.ndim == 3, "k.shape", k_btd.shape, "must be [batch, time, channels]")
    check(min(k_btd.shape) > 0, "k.shape", k_btd.shape, "no size may be 0")
    b, t, d = k_btd.shape
    check_array("k", k_btd, (b, t, d))
    check_array("v", v_btd, (b, t, d))
    check_array("w", w_d, (d,))
    check_array("u", u_d, (d,))
    exact = reference.exact(k_btd)
    if initial_state is None:
        zeros = jnp.zeros((b, d), exact)
        initial_state = (zeros, zeros, jnp.full((b, d), EMPTY, exact))
    check(len(initial_state) == 3, "initial_state", len(initial_state), "must be three arrays")
    for part in initial_state:
        check_array("initial_state", part, (b, d))
    w, u, k, v = (x.astype(exact) for x in (w_d, u_d, k_btd, v_btd))
    numerator, denominator, greatest = (part.astype(exact) for part in initial_state)
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
      r_bthc: what is read (receptance).
      w_bthc: the decay's logarithm's logarithm: a key channel decays by ``exp(−exp(w))``.
      k_bthc, v_bthc: keys and values.
      a_bthc, b_bthc: what is taken out along ``a`` is put back along ``b``; in RWKV-7 ``a = −κ``
        and ``b = κ · rate`` for a key ``κ`` of length 1.
      segment_ids_bt: integers; the state is emptied where they change.
      initial_state_bhcc: values by keys; default 0.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: a size of ``chunk`` that overrides `pallas_kernels.blocks`.

    Returns:
      ``y_bthc`` and ``final_state_bhcc``, float32 (float64 if ``k`` is).

    Raises:
      ValueError: names the argument that has another shape, dtype or range than said here, or the
        implementation that cannot serve, with the reason.
    """
    check(k_bthc.ndim == 4, "k.shape", k_bthc.shape, "must be [batch, time, heads, channels]")
    check(min(k_bthc.shape) > 0, "k.shape", k_bthc.shape, "no size may be 0")
    b, t, h, c = k_bthc.shape
    arrays = {"r": r_bthc, "w": w_bthc, "k": k_bthc, "v": v_bthc, "a": a_bthc, "b": b_bthc}
    for name, array in arrays.items():
        check_array(name, array, (b, t, h, c))
    exact = reference.exact(k_bthc)
    if initial_state_bhcc is None:
        initial_state_bhcc = jnp.zeros((b, h, c, c), exact)
    check_array("initial_state", initial_state_bhcc, (b, h, c, c))
    r, w, k, v, a, b_ = (x.astype(exact) for x in arrays.values())
    y, [state] = _scan(
        "wkv7",
        (),
        (initial_state_bhcc.astype(exact),),
        (r, w, k, v, a, b_),
        _resets(segment_ids_bt, b, t),
        implementation,
        blocks,
    )
    return y.astype(v_bthc.dtype), state


def _resets(segment_ids_bt, b, t):
    """True where a token begins another segment than its predecessor's."""
    if segment_ids_bt is None:
        return jnp.zeros((b, t), bool)
    check_array("segment_ids", segment_ids_bt, (b, t), "integer")
    changed = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def _scan(op, constants, state, tokens, reset_bt, implementation, blocks) -> Any:
    refusals = {"xla": None, "tpu": tpu.refusal(tokens[0]), "gpu": gpu.refusal(tokens[0])}
    chosen = choose(op, implementation, refusals)
    # one table for all: the states that one pass keeps, any platform's other pass may read
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
