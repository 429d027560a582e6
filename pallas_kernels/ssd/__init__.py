"""The state-space duality of Mamba-2: a linear recurrence that is products of matrices.

Each head has a state of ``p`` channels by ``n`` numbers that decays as a whole, by one number a
token; ``B`` and ``C`` are shared by the heads of a group, as keys and queries are shared in grouped
attention (Dao & Gu 2024, 2405.21060, §5 and §7.2):

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ          y_t = h_t C_t + D x_t

One decay a head is what `pallas_kernels.selective_scan` gives up, and what it buys: within a chunk
of tokens the recurrence is masked attention without a softmax, and between chunks only the state
goes on (§6). With ``L`` the cumulative sum of ``Δ A`` in a chunk that begins with the state ``h``:

    y_t = Σ_{u ≤ t} (C_t · B_u) e^(L_t − L_u) Δ_u x_u  +  e^(L_t) h C_t
    h'  = e^(L_end) h + Σ_u e^(L_end − L_u) Δ_u x_u B_uᵀ

so that all of the work, forward and backward, is products that a matrix unit does. Around it, in
plain JAX, which XLA fuses: ``Δ = softplus(Δ + bias)`` and the skip ``D x``. The gate, and the norm
that it enters, are the layer's.

Implementations:

- ``reference``: token by token, differentiated by JAX. The equation.
- ``xla``: the chunked form. The forward pass keeps the state at the beginning of each chunk, the
  backward pass makes the rest of a chunk anew. See `xla`.

The backward pass is deterministic: each gradient is summed by one program in one order.

Packed segments: a token whose segment is not its predecessor's begins with an empty state. The
first token of a call always goes on from ``initial_state``.

Limits: no Pallas kernel, for TPU or GPU: ``xla`` serves every platform, since the products are
large ones that XLA compiles well by itself; what a kernel could still save is writing a chunk's
decays to memory. ``A`` is one negative number a head. Forward mode and second derivatives are the
reference's (`pallas_kernels.derivatives`). Not run on a GPU or a TPU yet.
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

    Steps, decays, states and sums are float32 (float64 if ``x`` is). The products' operands are too
    on a CPU; on other chips they have ``x``'s dtype.

    Args:
      x_bthp: input, ``h`` heads of ``p`` channels.
      dt_bth: step sizes, before bias and softplus if those are asked for. A step of 0 leaves the
        state as it is.
      a_h: decay rates, negative.
      b_btgn, c_btgn: what of a token goes into the state, and what is read; ``h % g == 0``, head
        ``i`` uses group ``i // (h / g)``.
      d_h: the skip's weights.
      dt_bias_h, dt_softplus: ``Δ = softplus(Δ + bias)``.
      segment_ids_bt: integers; the state is emptied where they change.
      initial_state_bhpn: default 0.
      implementation: None, ``"reference"`` or ``"xla"`` (`pallas_kernels`).
      blocks: a size of ``chunk``, in tokens, that overrides `pallas_kernels.blocks`.

    Returns:
      ``y_bthp`` in ``x``'s dtype and ``final_state_bhpn``, float32 (float64 if ``x`` is).

    Raises:
      ValueError: names the argument that has another shape, dtype or range than said here, or the
        implementation that cannot serve, with the reason.
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
    for name, given, shape in (
        ("d", d_h, (h,)), ("dt_bias", dt_bias_h, (h,)),
        ("initial_state", initial_state_bhpn, (b, h, p, n)),
    ):  # fmt: skip
        if given is not None:
            check_array(name, given, shape)

    exact = jnp.promote_types(jnp.float32, x_bthp.dtype)
    dt = dt_bth.astype(exact)
    if dt_bias_h is not None:
        dt = dt + dt_bias_h.astype(exact)
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    reset = jnp.zeros((b, t), bool)
    if segment_ids_bt is not None:
        check_array("segment_ids", segment_ids_bt, (b, t), "integer")
        changed = segment_ids_bt[:, 1:] != segment_ids_bt[:, :-1]
        reset = jnp.pad(changed, ((0, 0), (1, 0)))
    if initial_state_bhpn is None:
        initial_state_bhpn = jnp.zeros((b, h, p, n), exact)
    state = initial_state_bhpn.astype(exact)
    arrays = (x_bthp, dt, a_h.astype(exact), b_btgn, c_btgn, reset, state)

    refusals = {"xla": None, "tpu": "it has no TPU kernel", "gpu": "it has no GPU kernel"}
    chosen = choose(OP, implementation, refusals)
    if chosen == ["reference"]:
        y, state = reference.scan(*arrays)
    else:
        # one table for all: the states that one pass keeps, any platform's other pass may read
        sizes = tuple(block_sizes(OP, "cpu", blocks).items())
        y, state = _op(tuple(chosen), sizes)(*arrays)
    if d_h is not None:
        y = y + d_h.astype(exact)[:, None] * x_bthp.astype(exact)
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
