"""The selective scan of Mamba: a linear recurrence whose coefficients depend on the token.

Each channel ``d`` has a state of ``n`` numbers (Gu & Dao 2023, 2312.00752, eq. 2 and Alg. 2; zero-
order hold for A, Euler for B, as in the released code):

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t          y_t = C_t · h_t + D x_t

``Δ``, ``B`` and ``C`` depend on the token, so this is no convolution. ``Δ = softplus(Δ + bias)``,
the skip ``D x`` and the gate ``y · silu(z)`` are plain JAX, which XLA fuses. No array of size
``t · d · n`` is stored: the forward pass stores the state at the beginning of each chunk of tokens,
and the backward pass recomputes the states of one chunk at a time (§3.3.2).

Backward, with ``g_t`` the gradient of ``h_t`` and ``e_t = exp(Δ_t A)``:

    g_t = C_t dy_t + e_{t+1} g_{t+1}      dC_t = Σ_d dy_t h_t      dB_t = Σ_d g_t Δ_t x_t
    d(Δ_t x_t) = g_t · B_t                d(Δ_t A) = g_t e_t h_{t−1}

Implementations, and what each has in fast memory:

- ``reference``: token by token, differentiated by JAX. The equation.
- ``xla``: token by token, vectorised over channels; in the backward pass the states of one chunk.
  See `xla`.
- ``tpu``: the state of up to 1,024 channels in VMEM, over all tokens. See `tpu`.
- ``gpu``: the state of 32 or 64 channels in a warp's registers, over all tokens. See `gpu`.

Every backward pass is deterministic: each gradient is summed by one program in one order.

Packed segments: the state is 0 before a token whose segment is not that of its predecessor. The
first token of a call always continues from ``initial_state``.

Limits: ``A`` is real. The GPU kernel supports at most 256 numbers in a state; ``xla`` computes
larger states. Forward mode and second derivatives are those of the reference
(`pallas_kernels.derivatives`). The kernels have been compiled for TPUs and for an H100 and run
interpreted; they have not run on a TPU or a GPU yet.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.selective_scan import gpu, reference, tpu, xla

OP = "selective_scan"

PASSES = {
    "xla": {"forward": xla.forward, "backward": xla.backward},
    "tpu": {"forward": tpu.forward, "backward": tpu.backward},
    "gpu": {"forward": gpu.forward, "backward": gpu.backward},
}


def selective_scan(
    x_btd: jax.Array,
    delta_btd: jax.Array,
    a_dn: jax.Array,
    b_btn: jax.Array,
    c_btn: jax.Array,
    d_d: jax.Array | None = None,
    z_btd: jax.Array | None = None,
    *,
    delta_bias_d: jax.Array | None = None,
    delta_softplus: bool = False,
    segment_ids_bt: jax.Array | None = None,
    initial_state_bdn: jax.Array | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mamba's recurrence over ``t``; computed in float32 (float64 if ``x`` is).

    Args:
      x_btd: input.
      delta_btd: step sizes, before bias and softplus, if any. A step of 0 does not change the
        state.
      a_dn: decay rates; negative for a state that decays.
      b_btn, c_btn: input and output coefficients of the state.
      d_d: weights of the skip.
      z_btd: the gate, before its SiLU.
      delta_bias_d, delta_softplus: ``Δ = softplus(Δ + bias)``.
      segment_ids_bt: integers; the state is set to 0 where they change.
      initial_state_bdn: default 0.
      implementation: None, ``"reference"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (`pallas_kernels`).
      blocks: sizes that override `pallas_kernels.blocks`: tokens in a ``chunk``, and ``rows`` of
        128 channels in a program on a TPU.

    Returns:
      ``y_btd`` in ``x``'s dtype and ``final_state_bdn``, float32 (float64 if ``x`` is).

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    check(x_btd.ndim == 3, "x.shape", x_btd.shape, "must be [batch, time, channels]")
    check(a_dn.ndim == 2, "a.shape", a_dn.shape, "must be [channels, state]")
    (b, t, d), n = x_btd.shape, a_dn.shape[1]
    check(min(b, t, d, n) > 0, "x.shape", x_btd.shape, f"no size may be 0; a's {a_dn.shape}")
    check_array("x", x_btd, (b, t, d))
    check_array("delta", delta_btd, (b, t, d))
    check_array("a", a_dn, (d, n))
    check_array("b", b_btn, (b, t, n))
    check_array("c", c_btn, (b, t, n))
    for name, array, shape in (
        ("d", d_d, (d,)), ("z", z_btd, (b, t, d)), ("delta_bias", delta_bias_d, (d,)),
        ("initial_state", initial_state_bdn, (b, d, n)),
    ):  # fmt: skip
        if array is not None:
            check_array(name, array, shape)

    acc_dtype = jnp.promote_types(jnp.float32, x_btd.dtype)
    x, delta, a, b_in, c_out = (
        input_array.astype(acc_dtype) for input_array in (x_btd, delta_btd, a_dn, b_btn, c_btn)
    )
    if delta_bias_d is not None:
        delta = delta + delta_bias_d.astype(acc_dtype)
    if delta_softplus:
        delta = jax.nn.softplus(delta)
    reset = jnp.zeros((b, t), bool)
    if segment_ids_bt is not None:
        check_array("segment_ids", segment_ids_bt, (b, t), "integer")
        changed = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (1, 0)))
    if initial_state_bdn is None:
        initial_state_bdn = jnp.zeros((b, d, n), acc_dtype)
    arrays = (x, delta, a, b_in, c_out, reset, initial_state_bdn.astype(acc_dtype))

    refusals = {"xla": None, "tpu": tpu.refusal(x), "gpu": gpu.refusal(x, n)}
    chosen = choose(OP, implementation, refusals)
    if chosen == ["reference"]:
        y, state = reference.scan(*arrays)
    else:
        # the same sizes for all: another platform's backward pass may read the stored states
        sizes = tuple(block_sizes(OP, "cpu", blocks).items())
        y, state = _op(tuple(chosen), sizes)(*arrays)
    if d_d is not None:
        y = y + d_d.astype(acc_dtype) * x
    if z_btd is not None:
        y = y * jax.nn.silu(z_btd.astype(acc_dtype))
    return y.astype(x_btd.dtype), state


@functools.lru_cache(maxsize=256)
def _op(chosen, sizes):
    return differentiable(
        functools.partial(_forward, chosen, sizes),
        functools.partial(_backward, chosen, sizes),
        reference.scan,
    )


def _table(chosen, sizes, name):
    return {n: functools.partial(PASSES[n][name], dict(sizes)) for n in chosen}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(chosen, sizes, *arrays):
    y, state, starts = per_platform(chosen, _table(chosen, sizes, "forward"), *arrays)
    return (y, state), starts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(chosen, sizes, arrays, starts, cotangents):
    table = _table(chosen, sizes, "backward")
    *tokens, d_state = per_platform(chosen, table, *arrays[:-1], starts, *cotangents)
    return *tokens, None, d_state
