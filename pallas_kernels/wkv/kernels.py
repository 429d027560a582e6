"""Both passes of a recurrence on a TPU: Pallas kernels, compiled by Mosaic.

The grid is (rows of the batch, parts, chunks of time). A part is the channels or the head whose
state one program has (see `tpu`); a tile is a part's array at one token. Time is the last axis, so
that the state stays in VMEM between chunks.

The backward pass goes through the chunks from the last to the first. It recomputes the states of a
chunk from the stored one at its beginning, then goes back by the transpose of the step, which JAX
derives inside the kernel; nothing is divided by a decay. Gradients of constants are summed over
time in VMEM, and over rows of the batch outside the kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# step(constants, state, token) -> (state, y): tuples of tiles
Step = Callable[[tuple, tuple, tuple], tuple[tuple, jax.Array]]


class _Kernel(NamedTuple):
    """Static arguments of a kernel: the step, numbers of arrays, ``length`` of the sequence."""

    step: Step
    constants: int
    tokens: int
    states: int
    length: int
    single: bool  # a token's tile is one row, which is kept two-dimensional

    def index(self, t):
        return pl.ds(t, 1) if self.single else t

    def split(self, refs: Sequence, *counts: int):
        """``refs`` in groups of ``counts``."""
        groups, index = [], 0
        for count in counts:
            groups.append(refs[index : index + count])
            index += count
        assert index == len(refs), (index, len(refs))
        return groups

    def advance(self, constants, state, token, alive, reset, empty):
        """The state after one token, or ``state`` if not ``alive`` (padding); and ``y``."""
        initial = tuple(
            jnp.where(reset, jnp.full_like(s, e), s) for s, e in zip(state, empty, strict=True)
        )
        new, y = self.step(constants, initial, token)
        return tuple(jnp.where(alive, n, s) for n, s in zip(new, state, strict=True)), y

    def alive(self, chunk, size, t):
        return chunk * size + t < self.length


def _forward_kernel(kernel: _Kernel, empty, reset, *refs):
    constants, tokens, firsts, [y], ends, starts, state_refs = kernel.split(
        refs, kernel.constants, kernel.tokens, kernel.states, 1, *[kernel.states] * 3
    )
    i, size = pl.program_id(2), reset.shape[0]

    @pl.when(i == 0)
    def _():
        for h, first in zip(state_refs, firsts, strict=True):
            h[...] = first[...]

    for start, h in zip(starts, state_refs, strict=True):
        start[...] = h[...]
    fixed = tuple(c[...] for c in constants)

    def one_token(t, state):
        token = tuple(x[kernel.index(t)] for x in tokens)
        alive = kernel.alive(i, size, t)
        state, out = kernel.advance(fixed, state, token, alive, reset[t, 0] > 0, empty)
        y[kernel.index(t)] = out
        return state

    state = jax.lax.fori_loop(0, size, one_token, tuple(h[...] for h in state_refs))
    for h, s in zip(state_refs, state, strict=True):
        h[...] = s

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        for end, h in zip(ends, state_refs, strict=True):
            end[...] = h[...]


def _backward_kernel(kernel: _Kernel, empty, reset, *refs):
    n = kernel.states
    (
        constants,
        tokens,
        starts,
        [dy],
        d_ends,
        d_constants,
        d_tokens,
        d_firsts,
        states_before,
        d_state_refs,
    ) = kernel.split(
        refs, kernel.constants, kernel.tokens, n, 1, n, kernel.constants, kernel.tokens, n, n, n
    )
    from_end, last, size = pl.program_id(2), pl.num_programs(2) - 1, reset.shape[0]
    i = last - from_end

    @pl.when(from_end == 0)
    def _():
        for d, end in zip(d_state_refs, d_ends, strict=True):
            d[...] = end[...]
        for d in d_constants:
            d[...] = jnp.zeros_like(d)

    fixed = tuple(c[...] for c in constants)

    def recompute(t, state):
        for b, s in zip(states_before, state, strict=True):
            b[t] = s
        token = tuple(x[kernel.index(t)] for x in tokens)
        alive = kernel.alive(i, size, t)
        return kernel.advance(fixed, state, token, alive, reset[t, 0] > 0, empty)[0]

    jax.lax.fori_loop(0, size, recompute, tuple(s[...] for s in starts))

    def one_token(n, d_state):
        t = size - 1 - n
        alive, begins = kernel.alive(i, size, t), reset[t, 0] > 0

        def run(constants, state, token):
            return kernel.advance(constants, state, token, alive, begins, empty)

        token = tuple(x[kernel.index(t)] for x in tokens)
        _, vjp = jax.vjp(run, fixed, tuple(b[t] for b in states_before), token)
        d_fixed, d_state, d_token = vjp((d_state, dy[kernel.index(t)]))
        for d, d_constant in zip(d_constants, d_fixed, strict=True):
            d[...] += d_constant
        for d, value in zip(d_tokens, d_token, strict=True):
            d[kernel.index(t)] = value
        return d_state

    d_state = jax.lax.fori_loop(0, size, one_token, tuple(d[...] for d in d_state_refs))
    for d, s in zip(d_state_refs, d_state, strict=True):
        d[...] = s

    @pl.when(from_end == last)
    def _():
        for d, h in zip(d_firsts, d_state_refs, strict=True):
            d[...] = h[...]


class _Call(NamedTuple):
    """The sizes of a call, and its block specs."""

    batch: int
    parts: int
    chunks: int
    size: int

    def tokens(self, tile, chunk_of):
        block = (None, None, self.size, *tile)
        return pl.BlockSpec(block, lambda b, p, i: (b, p, chunk_of(i), *[0] * len(tile)))

    def state(self, tile):
        return pl.BlockSpec((None, None, *tile), lambda b, p, i: (b, p, *[0] * len(tile)))

    def constant(self, tile):
        return pl.BlockSpec((None, *tile), lambda b, p, i: (p, *[0] * len(tile)))

    def starts(self, tile, chunk_of):
        block = (None, None, None, *tile)
        return pl.BlockSpec(block, lambda b, p, i: (chunk_of(i), b, p, *[0] * len(tile)))

    def reset(self, chunk_of):
        return pl.BlockSpec(
            (None, self.size, 1), lambda b, p, i: (b, chunk_of(i), 0), memory_space=pltpu.SMEM
        )

    def run(self, kernel, name, inputs, outputs, scratch):
        """Run ``kernel``; ``inputs``: pairs of spec and array, ``outputs``: of spec and shape."""
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.parts, self.chunks),
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for _, shape in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=name,
        )(*(array for _, array in inputs))


def _prepared(chunk, step, tokens, constants, state, reset_bt):
    """The `_Call`, the `_Kernel`, and tokens and resets padded to full chunks."""
    batch, parts, length = tokens[0].shape[:3]
    size = min(chunk, length)
    call = _Call(batch, parts, pl.cdiv(length, size), size)
    single = tokens[0].ndim == 4
    kernel = _Kernel(step, len(constants), len(tokens), len(state), length, single)

    def padded(a, axis):
        widths = [(0, 0)] * a.ndim
        widths[axis] = (0, call.chunks * size - length)
        return jnp.pad(a, widths)

    tokens = [padded(a, 2) for a in tokens]
    return call, kernel, tokens, padded(reset_bt[..., None].astype(jnp.float32), 1)


def forward(name, step, empty, chunk, constants, state, tokens, reset_bt):
    """``y``, the final state and the states at the beginnings of chunks.

    Args:
      empty: the values of each array of a state before the first token.
      constants: each ``[parts, …]``; state: each ``[b, parts, …]``; tokens: each
        ``[b, parts, t, …]``; ``y`` is like the last of them.
    """
    call, kernel, tokens, reset = _prepared(chunk, step, tokens, constants, state, reset_bt)

    def forwards(i):
        return i

    tile = tokens[-1].shape[3:]
    y, *states = call.run(
        functools.partial(_forward_kernel, kernel, empty),
        name,
        [
            (call.reset(forwards), reset),
            *((call.constant(a.shape[1:]), a) for a in constants),
            *((call.tokens(a.shape[3:], forwards), a) for a in tokens),
            *((call.state(a.shape[2:]), a) for a in state),
        ],
        [
            (call.tokens(tile, forwards), tokens[-1].shape),
            *((call.state(a.shape[2:]), a.shape) for a in state),
            *((call.starts(a.shape[2:], forwards), (call.chunks, *a.shape)) for a in state),
        ],
        [a.shape[2:] for a in state],
    )
    count = len(state)
    return y[:, :, : kernel.length], tuple(states[:count]), tuple(states[count:])


def backward(name, step, empty, chunk, constants, starts, tokens, reset_bt, dy, d_end):
    """Gradients by constants, by the first state and by tokens; shapes as in `forward`."""
    call, kernel, padded, reset = _prepared(chunk, step, tokens, constants, d_end, reset_bt)

    def reverse(i):
        return call.chunks - 1 - i

    dy = jnp.pad(dy, [(0, p - n) for p, n in zip(padded[-1].shape, dy.shape, strict=True)])
    gradients = call.run(
        functools.partial(_backward_kernel, kernel, empty),
        f"{name}_backward",
        [
            (call.reset(reverse), reset),
            *((call.constant(a.shape[1:]), a) for a in constants),
            *((call.tokens(a.shape[3:], reverse), a) for a in padded),
            *((call.starts(a.shape[3:], reverse), a) for a in starts),
            (call.tokens(dy.shape[3:], reverse), dy),
            *((call.state(a.shape[2:]), a) for a in d_end),
        ],
        [
            *((call.state(a.shape[1:]), (call.batch, *a.shape)) for a in constants),
            *((call.tokens(a.shape[3:], reverse), a.shape) for a in padded),
            *((call.state(a.shape[2:]), a.shape) for a in d_end),
        ],
        [*((call.size, *a.shape[2:]) for a in d_end), *(a.shape[2:] for a in d_end)],
    )
    d_constants, d_tokens, d_first = kernel.split(
        gradients, len(constants), len(padded), len(d_end)
    )
    return (
        tuple(a.sum(0) for a in d_constants),
        tuple(d_first),
        tuple(a[:, :, : kernel.length] for a in d_tokens),
    )
