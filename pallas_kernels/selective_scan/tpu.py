"""The selective scan on a TPU: Pallas kernels for the vector unit, compiled by Mosaic.

A program has one row of the batch and up to ``rows`` × 128 channels, along sublanes and lanes. Each
of the ``n`` numbers of the state is then one array of that shape, and ``B_t`` and ``C_t`` are
scalars. Time is the last axis of the grid, so that the state stays in VMEM between chunks.

The backward pass goes through the chunks from the last to the first. It recomputes the states of a
chunk from the stored one at its beginning, then goes through its tokens backwards. Sums over
channels (``dB``, ``dC``) are partial sums for each block of channels, which are added outside the
kernel; ``dA`` is summed in VMEM over all chunks.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def refusal(x_btd) -> str | None:
    """What the kernels do not support in this call, or None."""
    if x_btd.dtype != jnp.float32:
        return f"dtype {x_btd.dtype}: must be float32"
    return None


class _Layout:
    """The sizes of a call, and the conversion of arrays to and from the kernels' shapes."""

    def __init__(self, sizes: Mapping[str, int], x_btd, n: int):
        self.b, self.t, self.d = x_btd.shape
        self.n = n
        self.chunk = min(sizes["chunk"], self.t)
        self.chunks = pl.cdiv(self.t, self.chunk)
        lines = pl.cdiv(self.d, LANES)
        self.rows = min(sizes["rows"], lines)
        self.blocks = pl.cdiv(lines, self.rows)

    def channels(self, a):
        """``[…, d]`` as ``[…, blocks · rows, lanes]``."""
        width = self.blocks * self.rows * LANES
        a = jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, width - self.d)])
        return a.reshape(*a.shape[:-1], -1, LANES)

    def flat(self, a):
        """The inverse of `channels`."""
        return a.reshape(*a.shape[:-2], -1)[..., : self.d]

    def time(self, a):
        """``[b, t, …]`` padded to full chunks."""
        missing = self.chunks * self.chunk - self.t
        return jnp.pad(a, [(0, 0), (0, missing), *[(0, 0)] * (a.ndim - 2)])

    def wide(self, a_btd):
        """``[b, t, d]`` in the shape of the kernels."""
        return self.channels(self.time(a_btd))

    def scalars(self, b_btn, c_btn, reset_bt):
        """``B``, ``C`` and 1 where a segment begins, concatenated: ``[b, t, 2 n + 1]``."""
        reset = reset_bt[..., None].astype(b_btn.dtype)
        return self.time(jnp.concatenate((b_btn, c_btn, reset), axis=-1))

    def specs(self, chunk_of):
        """Kind of array → block spec; ``chunk_of`` maps the last index of the grid to a chunk."""
        chunk, n, lines = self.chunk, self.n, (self.rows, LANES)
        return dict(
            tokens=pl.BlockSpec((None, chunk, *lines), lambda b, d, i: (b, chunk_of(i), d, 0)),
            scalars=pl.BlockSpec(
                (None, chunk, 2 * n + 1),
                lambda b, d, i: (b, chunk_of(i), 0),
                memory_space=pltpu.SMEM,
            ),
            rates=pl.BlockSpec((n, *lines), lambda b, d, i: (0, d, 0)),
            state=pl.BlockSpec((None, n, *lines), lambda b, d, i: (b, 0, d, 0)),
            starts=pl.BlockSpec((None, None, n, *lines), lambda b, d, i: (chunk_of(i), b, 0, d, 0)),
            sums=pl.BlockSpec((None, None, chunk, n), lambda b, d, i: (d, b, chunk_of(i), 0)),
        )

    def call(self, kernel, name, inputs, outputs, scratch, arrays, chunk_of=lambda i: i):
        """Run ``kernel`` over rows, blocks of channels and chunks, in the order of ``chunk_of``."""
        specs = self.specs(chunk_of)
        length, lines = self.chunks * self.chunk, (self.blocks * self.rows, LANES)
        shapes = dict(
            tokens=(self.b, length, *lines),
            state=(self.b, self.n, *lines),
            starts=(self.chunks, self.b, self.n, *lines),
            sums=(self.blocks, self.b, length, self.n),
        )
        return pl.pallas_call(
            kernel,
            grid=(self.b, self.blocks, self.chunks),
            in_specs=[specs[kind] for kind in inputs],
            out_specs=[specs[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], jnp.float32) for kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=name,
        )(*arrays)


def _forward_kernel(n, x, delta, scalars, rates, first, y, last, start, state_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = first[...]

    start[...] = state_ref[...]

    def token(t, state):
        step = delta[t]
        inflow, keep = step * x[t], 1 - scalars[t, 2 * n]
        new, total = [], jnp.zeros_like(inflow)
        for i in range(n):
            new.append(jnp.exp(step * rates[i]) * keep * state[i] + inflow * scalars[t, i])
            total += new[i] * scalars[t, n + i]
        y[t] = total
        return tuple(new)

    state = jax.lax.fori_loop(0, x.shape[0], token, tuple(state_ref[i] for i in range(n)))
    for i in range(n):
        state_ref[i] = state[i]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = state_ref[...]


def forward(sizes: Mapping[str, int], x_btd, delta_btd, a_dn, b_btn, c_btn, reset_bt, state_bdn):
    """``y_btd``, the final ``state_bdn``, and the states at the beginning of each chunk."""
    layout = _Layout(sizes, x_btd, a_dn.shape[1])
    y, last, starts = layout.call(
        functools.partial(_forward_kernel, layout.n),
        "selective_scan",
        ("tokens", "tokens", "scalars", "rates", "state"),
        ("tokens", "state", "starts"),
        [(layout.n, layout.rows, LANES)],
        (
            layout.wide(x_btd),
            layout.wide(delta_btd),
            layout.scalars(b_btn, c_btn, reset_bt),
            layout.channels(a_dn.T),
            layout.channels(jnp.swapaxes(state_bdn, 1, 2)),
        ),
    )
    return layout.flat(y)[:, : layout.t], jnp.swapaxes(layout.flat(last), 1, 2), layout.flat(starts)


def _backward_kernel(
    n, x, delta, scalars, rates, start, dy, d_last,
    d_x, d_delta, d_b, d_c, d_rates, d_first,
    decayed_states, d_state, b_sums, c_sums,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_last[...]
        d_rates[...] = jnp.zeros_like(d_rates)

    def recompute(t, state):
        step = delta[t]
        inflow, keep = step * x[t], 1 - scalars[t, 2 * n]
        new = []
        for i in range(n):
            decayed = jnp.exp(step * rates[i]) * keep * state[i]
            decayed_states[t, i] = decayed
            new.append(decayed + inflow * scalars[t, i])
        return tuple(new)

    chunk = x.shape[0]
    jax.lax.fori_loop(0, chunk, recompute, tuple(start[i] for i in range(n)))

    def token(from_end, gradient):
        t = chunk - 1 - from_end
        step, x_t, dy_t = delta[t], x[t], dy[t]
        inflow, keep = step * x_t, 1 - scalars[t, 2 * n]
        new, d_inflow, d_step = [], jnp.zeros_like(inflow), jnp.zeros_like(inflow)
        for i in range(n):
            g = gradient[i] + dy_t * scalars[t, n + i]
            decayed = decayed_states[t, i]
            state = decayed + inflow * scalars[t, i]
            c_sums[t, pl.ds(i, 1)] = jnp.sum(state * dy_t, 0, keepdims=True)
            b_sums[t, pl.ds(i, 1)] = jnp.sum(g * inflow, 0, keepdims=True)
            d_inflow += g * scalars[t, i]
            d_log = g * decayed
            d_step += d_log * rates[i]
            d_rates[i] += d_log * step
            new.append(jnp.exp(step * rates[i]) * keep * g)
        d_x[t] = d_inflow * step
        d_delta[t] = d_step + d_inflow * x_t
        return tuple(new)

    gradient = jax.lax.fori_loop(0, chunk, token, tuple(d_state[i] for i in range(n)))
    for i in range(n):
        d_state[i] = gradient[i]
    d_b[...] = jnp.sum(b_sums[...], axis=-1)
    d_c[...] = jnp.sum(c_sums[...], axis=-1)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_first[...] = d_state[...]


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
    state = (layout.n, layout.rows, LANES)
    sums = (layout.chunk, layout.n, LANES)
    d_x, d_delta, d_b, d_c, d_a, d_first = layout.call(
        functools.partial(_backward_kernel, layout.n),
        "selective_scan_backward",
        ("tokens", "tokens", "scalars", "rates", "starts", "tokens", "state"),
        ("tokens", "tokens", "sums", "sums", "state", "state"),
        [(layout.chunk, *state), state, sums, sums],
        (
            layout.wide(x_btd),
            layout.wide(delta_btd),
            layout.scalars(b_btn, c_btn, reset_bt),
            layout.channels(a_dn.T),
            layout.channels(starts),
            layout.wide(dy_btd),
            layout.channels(jnp.swapaxes(d_end_bdn, 1, 2)),
        ),
        chunk_of=lambda i: layout.chunks - 1 - i,
    )
    d_x, d_delta = (layout.flat(a)[:, : layout.t] for a in (d_x, d_delta))
    d_b, d_c = (a.sum(0)[:, : layout.t] for a in (d_b, d_c))
    d_a = layout.flat(d_a).sum(0).T
    return d_x, d_delta, d_a, d_b, d_c, jnp.swapaxes(layout.flat(d_first), 1, 2)
