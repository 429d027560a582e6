"""The selective scan on an NVIDIA GPU: Pallas kernels, compiled by Triton.

A program computes all tokens of one row of the batch and a block of channels, with the state
``[n, channels]`` in registers of one warp (of more if ``n`` > 32). The loop over tokens is unrolled
by a few tokens (`_stride`): their loads depend on no state, so they overlap with the computation of
the tokens before.

The backward pass goes through the chunks from the last to the first, and recomputes the states of a
chunk from the one at its beginning. A program cannot index its registers, so it stores every second
state in a buffer in memory, which it uses for each chunk again; it recomputes the states between
these once more. Sums over channels (``dB``, ``dC``) are partial sums of each program, which are
added outside the kernel.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.exp2 import LOG2E
from pallas_kernels.triton_kernels import named

LANES = 32
# numbers of a state in the registers of a thread, which also have space for those of three tokens
HELD = 32
# the number of unrolled tokens, a power of 2
FORWARD, BACKWARD = 4, 2


def refusal(x_btd, n: int) -> str | None:
    """What the kernels do not support in this call, or None."""
    if x_btd.dtype != jnp.float32:
        return f"dtype {x_btd.dtype}: must be float32"
    if n > 256:
        return f"a state of {n} numbers: at most 256 fit in registers"
    return None


def _stride(chunk: int, most: int) -> int:
    """The number of unrolled tokens: at most ``most``, and a divisor of ``chunk``."""
    return math.gcd(chunk, most)


class _Layout:
    """The sizes of a call, and the conversion of arrays to and from the kernels' shapes."""

    def __init__(self, sizes: Mapping[str, int], x_btd, n: int):
        self.b, self.t, self.d = x_btd.shape
        self.n = n
        self.chunk = min(sizes["chunk"], self.t)
        self.chunks = pl.cdiv(self.t, self.chunk)
        self.numbers = pl.next_power_of_2(n)
        self.channels = max(LANES, min(HELD * LANES // self.numbers, 128))
        self.blocks = pl.cdiv(self.d, self.channels)

    def _padded(self, a, lengths: Mapping[int, int]):
        """``a`` with its axes padded to ``lengths``."""
        widths = [(0, 0)] * a.ndim
        for axis, length in lengths.items():
            widths[axis] = (0, length - a.shape[axis])
        return jnp.pad(a, widths)

    def tokens(self, a_btd):
        """``a_btd`` padded to full chunks and full blocks of channels."""
        return self._padded(a_btd, {1: self.chunks * self.chunk, 2: self.blocks * self.channels})

    def numbers_of(self, a_btn):
        return self._padded(a_btn, {1: self.chunks * self.chunk, 2: self.numbers})

    def states(self, a_nd):
        """``[…, n, d]`` padded to a power of 2 and to full blocks of channels."""
        return self._padded(a_nd, {-2: self.numbers, -1: self.blocks * self.channels})

    def tokenwise(self, x_btd, delta_btd, b_btn, c_btn, reset_bt):
        """The inputs of both kernels that depend on time; the last is 0 where a segment begins."""
        reset = self._padded(reset_bt.astype(jnp.float32), {1: self.chunks * self.chunk})
        tokens = (self.tokens(x_btd), self.tokens(delta_btd))
        return *tokens, self.numbers_of(b_btn), self.numbers_of(c_btn), 1 - reset

    def call(self, kernel, name, inputs, outputs, arrays):
        """Run ``kernel`` over rows and blocks of channels; ``inputs``, ``outputs``: their kinds."""
        length, width = self.chunks * self.chunk, self.blocks * self.channels
        n, d = self.numbers, self.channels
        steps = self.chunk // _stride(self.chunk, BACKWARD)
        # kind → shape of the array, shape of a block, its index for row b and channels i
        kinds = dict(
            tokens=((self.b, length, width), (None, length, d), lambda i, b: (b, 0, i)),
            numbers=((self.b, length, n), (None, length, n), lambda i, b: (b, 0, 0)),
            keep=((self.b, length), (None, length), lambda i, b: (b, 0)),
            rates=((n, width), (n, d), lambda i, b: (0, i)),
            state=((self.b, n, width), (None, n, d), lambda i, b: (b, 0, i)),
            starts=(
                (self.chunks, self.b, n, width),
                (self.chunks, None, n, d),
                lambda i, b: (0, b, 0, i),
            ),
            kept=((self.b, steps, n, width), (None, steps, n, d), lambda i, b: (b, 0, 0, i)),
            sums=(
                (self.blocks, self.b, length, n),
                (None, None, length, n),
                lambda i, b: (i, b, 0, 0),
            ),
        )
        specs = {kind: pl.BlockSpec(block, index) for kind, (_, block, index) in kinds.items()}
        return pl.pallas_call(
            named(name, kernel, self.chunk, self.chunks),
            grid=(self.blocks, self.b),
            in_specs=[specs[kind] for kind in inputs],
            out_specs=[specs[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(kinds[kind][0], jnp.float32) for kind in outputs],
            compiler_params=triton.CompilerParams(num_warps=max(1, n * d // (HELD * LANES))),
            name=name,
        )(*arrays)


def _advance(x, delta, b, keep, rates, t, state):
    """``state`` after the decay at token ``t``, and the state after this token."""
    step = delta[t, :]
    decayed = jnp.exp2(step * rates) * keep[t] * state
    return decayed, decayed + b[t, :][:, None] * (step * x[t, :])


def _forward_kernel(chunk, chunks, x, delta, b, c, keep, rate, first, y, last, starts):
    rates, stride = rate[...], _stride(chunk, FORWARD)

    def of_chunk(i, state):
        starts[i] = state

        def step(s, state):
            for u in range(stride):
                t = i * chunk + s * stride + u
                _, state = _advance(x, delta, b, keep, rates, t, state)
                y[t, :] = jnp.sum(state * c[t, :][:, None], 0)
            return state

        return jax.lax.fori_loop(0, chunk // stride, step, state)

    last[...] = jax.lax.fori_loop(0, chunks, of_chunk, first[...])


def forward(sizes: Mapping[str, int], x_btd, delta_btd, a_dn, b_btn, c_btn, reset_bt, state_bdn):
    """``y_btd``, the final ``state_bdn``, and the states at the beginning of each chunk."""
    layout = _Layout(sizes, x_btd, a_dn.shape[1])
    y, last, starts = layout.call(
        _forward_kernel,
        "selective_scan",
        ("tokens", "tokens", "numbers", "numbers", "keep", "rates", "state"),
        ("tokens", "state", "starts"),
        (
            *layout.tokenwise(x_btd, delta_btd, b_btn, c_btn, reset_bt),
            layout.states(a_dn.T * LOG2E),
            layout.states(jnp.swapaxes(state_bdn, 1, 2)),
        ),
    )
    n, d = layout.n, layout.d
    return y[:, : layout.t, :d], jnp.swapaxes(last[:, :n, :d], 1, 2), starts[..., :n, :d]


def _backward_kernel(
    chunk, chunks, x, delta, b, c, keep, rate, starts, dy, d_last,
    d_x, d_delta, d_b, d_c, d_rate, d_first, stored,
):  # fmt: skip
    rates, stride = rate[...], _stride(chunk, BACKWARD)
    steps = chunk // stride

    def of_chunk(from_end, carry):
        i = chunks - 1 - from_end

        def recompute(s, state):
            # the thread that writes this also reads it, so that no barrier is required
            stored[s] = state
            for u in range(stride):
                _, state = _advance(x, delta, b, keep, rates, i * chunk + s * stride + u, state)
            return state

        jax.lax.fori_loop(0, steps, recompute, starts[i])

        def step(n, carry):
            g, d_rates = carry
            s = steps - 1 - n
            state, decayed_states = stored[s], []
            for u in range(stride):
                decayed, state = _advance(
                    x, delta, b, keep, rates, i * chunk + s * stride + u, state
                )
                decayed_states.append(decayed)
            for u in reversed(range(stride)):
                t = i * chunk + s * stride + u
                step, x_t, dy_t = delta[t, :], x[t, :], dy[t, :]
                inflow, b_t = step * x_t, b[t, :][:, None]
                g += dy_t * c[t, :][:, None]
                d_c[t, :] = jnp.sum((decayed_states[u] + b_t * inflow) * dy_t, 1)
                d_b[t, :] = jnp.sum(g * inflow, 1)
                d_inflow = jnp.sum(g * b_t, 0)
                # the gradient of Δ A
                d_log = g * decayed_states[u]
                d_x[t, :] = d_inflow * step
                d_delta[t, :] = jnp.sum(d_log * rates, 0) * (1 / LOG2E) + d_inflow * x_t
                d_rates += d_log * step
                g *= jnp.exp2(step * rates) * keep[t]
            return g, d_rates

        return jax.lax.fori_loop(0, steps, step, carry)

    start = (d_last[...], jnp.zeros_like(rates))
    d_first[...], d_rate[...] = jax.lax.fori_loop(0, chunks, of_chunk, start)


def backward(
    sizes: Mapping[str, int],
    x_btd,
    delta_btd,
    a_dn,
    b_btn,
    c_btn,
    reset_bt,
    starts,
    dy_btd,
    d_end_bdn,
):
    """Gradients by x, Δ, A, B, C and the initial state."""
    layout = _Layout(sizes, x_btd, a_dn.shape[1])
    d_x, d_delta, d_b, d_c, d_a, d_first, _ = layout.call(
        _backward_kernel,
        "selective_scan_backward",
        ("tokens", "tokens", "numbers", "numbers", "keep", "rates", "starts", "tokens", "state"),
        ("tokens", "tokens", "sums", "sums", "state", "state", "kept"),
        (
            *layout.tokenwise(x_btd, delta_btd, b_btn, c_btn, reset_bt),
            layout.states(a_dn.T * LOG2E),
            layout.states(starts),
            layout.tokens(dy_btd),
            layout.states(jnp.swapaxes(d_end_bdn, 1, 2)),
        ),
    )
    t, n, d = layout.t, layout.n, layout.d
    d_b, d_c = (a.sum(0)[:, :t, :n] for a in (d_b, d_c))
    d_first = jnp.swapaxes(d_first[:, :n, :d], 1, 2)
    return d_x[:, :t, :d], d_delta[:, :t, :d], d_a.sum(0)[:n, :d].T, d_b, d_c, d_first
