"""The state-space duality of Mamba-2: a linear recurrence computed by matrix products.

Each head has a state of ``p`` channels by ``n`` numbers, with one scalar decay for each token. The
heads of a group share ``B`` and ``C``, as the heads of a group share keys and values in grouped
attention (Dao & Gu 2024, 2405.21060, §5 and §7.2):

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ          y_t = h_t C_t + D x_t

Compared with `pallas_kernels.selective_scan`, a head has only one decay. So within a chunk of
tokens the recurrence is masked attention without a softmax, and only the state passes between
chunks (§6). With ``L`` the cumulative sum of ``Δ A`` in a chunk that begins with the state ``h``:

    y_t = Σ_{u ≤ t} (C_t · B_u) e^(L_t − L_u) Δ_u x_u  +  e^(L_t) h C_t
    h'  = e^(L_end) h + Σ_u e^(L_end − L_u) Δ_u x_u B_uᵀ

so that nearly all work in both passes is matrix products. ``Δ = softplus(Δ + bias)`` and the skip
``D x`` are plain JAX, which XLA fuses. The layer computes the gate and the norm.

Implementations:

- ``reference``: token by token, differentiated by JAX. The equation.
- ``xla``: the chunked form. The forward pass stores the state at the beginning of each chunk; the
  backward pass recomputes everything else of a chunk. See `xla`.

The backward pass is deterministic: each gradient is summed by one program in one order.

Packed segments: the state is 0 before a token whose segment is not that of its predecessor. The
first token of a call always continues from ``initial_state``.

Limits: there is no Pallas kernel for TPU or GPU. ``xla`` supports every platform: its products are
large, and XLA compiles them well. A kernel would only avoid writing the decays of a chunk to
memory. ``A`` is one negative number for each head. Forward mode and second derivatives are those of
the reference (`pallas_kernels.derivatives`). It has not run on a GPU or a TPU yet.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import block_sizes
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import check, check_array, choose, per_platform
from pallas_kernels.ssd import reference, xla

OP = "ssd"

PASSES = {"xla": {"forward": xla.forward, "backward": xla.backward}}


def ssd(
    x_bthp: jax.Array,
    dt_bth: jax.Array,
    a_h: jax.Array,
    b_btgn: jax.Array,
    c_btgn: jax.Array,
    d_h: jax.Array | None = None,
    *,
    dt_bias_h: jax.Array | None = None,
    dt_softplus: bool = False,
    segment_ids_bt: jax.Array | None = None,
    initial_state_bhpn: jax.Array | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mamba-2's recurrence over ``t``.

    Steps, decays, states and sums are float32 (float64 if ``x`` is). The operands of products are
    too on a CPU; on other chips they have ``x``'s dtype.

    Args:
      x_bthp: input, ``h`` heads of ``p`` channels.
      dt_bth: step sizes, before bias and softplus, if any. A step of 0 does not change the state.
      a_h: decay rates, negative.
      b_btgn, c_btgn: input and output coefficients of the state; ``h % g == 0``, and head ``i``
        uses group ``i // (h / g)``.
      d_h: weights of the skip.
      dt_bias_h, dt_softplus: ``Δ = softplus(Δ + bias)``.
      segment_ids_bt: integers; the state is set to 0 where they change.
      initial_state_bhpn: default 0.
      implementation: None, ``"reference"`` or ``"xla"`` (`pallas_kernels`).
      blocks: the size of a ``chunk`` in tokens, which overrides `pallas_kernels.blocks`.

    Returns:
      ``y_bthp`` in ``x``'s dtype and ``final_state_bhpn``, float32 (float64 if ``x`` is).

    Raises:
      ValueError: an argument has a shape, dtype or value that is not described here, or the named
        implementation does not support the call.
    """
    check(x_bthp.ndim == 4, "x.shape", x_bthp.shape, "must be [batch, time, heads, channels]")
    check(b_btgn.ndim == 4, "b.shape", b_btgn.shape, "must be [batch, time, groups, state]")
    (b, t, h, p), (g, n) = x_bthp.shape, b_btgn.shape[2:]
    check(min(b, t, h, p, g, n) > 0, "x.shape", x_bthp.shape, f"no size may be 0; b's {(g, n)}")
    check(h % g == 0, "num_heads", h, f"must be a multiple of num_groups={g}")
    check_array("x", x_bthp, (b, t, h, p))
    check_array("dt", dt_bth, (b, t, h))
    check_array("a", a_h, (h,))
    check_array("b", b_btgn, (b, t, g, n))
    check_array("c", c_btgn, (b, t, g, n))
    for name, array, shape in (
        ("d", d_h, (h,)), ("dt_bias", dt_bias_h, (h,)),
        ("initial_state", initial_state_bhpn, (b, h, p, n)),
    ):  # fmt: skip
        if array is not None:
            check_array(name, array, shape)

    acc_dtype = jnp.promote_types(jnp.float32, x_bthp.dtype)
    dt = dt_bth.astype(acc_dtype)
    if dt_bias_h is not None:
        dt = dt + dt_bias_h.astype(acc_dtype)
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    reset = jnp.zeros((b, t), bool)
    if segment_ids_bt is not None:
        check_array("segment_ids", segment_ids_bt, (b, t), "integer")
        changed = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (1, 0)))
    if initial_state_bhpn is None:
        initial_state_bhpn = jnp.zeros((b, h, p, n), acc_dtype)
    state = initial_state_bhpn.astype(acc_dtype)
    arrays = (x_bthp, dt, a_h.astype(acc_dtype), b_btgn, c_btgn, reset, state)

    refusals = {
        "xla": None,
        "tpu": "this implementation: it has no TPU kernel",
        "gpu": "this implementation: it has no GPU kernel",
    }
    chosen = choose(OP, implementation, refusals)
    if chosen == ["reference"]:
        y, state = reference.scan(*arrays)
    else:
        # the same sizes for all: another platform's backward pass may read the stored states
        sizes = tuple(block_sizes(OP, "cpu", blocks).items())
        y, state = _op(tuple(chosen), sizes)(*arrays)
    if d_h is not None:
        y = y + d_h.astype(acc_dtype)[:, None] * x_bthp.astype(acc_dtype)
    return y.astype(x_bthp.dtype), state


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
