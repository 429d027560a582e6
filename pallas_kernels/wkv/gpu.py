"""The recurrences on an NVIDIA GPU: Pallas kernels, compiled by Triton.

A program computes all tokens of 32 channels of a row (`wkv4`) or of one head (`wkv7`), with its
state in registers. The loop over tokens is unrolled by a few tokens (`_stride`): their loads depend
on no state, so they overlap with the computation of the tokens before.

The backward pass goes through the chunks from the last to the first, by the transpose of the step,
which JAX derives inside the kernel: nothing is divided by a decay. It recomputes the states of a
chunk from the one at its beginning. A program cannot index its registers, so it stores every second
state in a buffer in memory, which it uses for each chunk again; it recomputes the states between
these once more. Gradients of constants are partial sums for each row of the batch, which are added
outside the kernel.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.triton_kernels import named
from pallas_kernels.wkv.reference import EMPTY
from pallas_kernels.wkv.tpu import step4

LANES = 32
# numbers of a state in the registers of a thread
HELD = 32
# the widest head
WIDEST = 128
# the number of unrolled tokens, a power of 2
FORWARD, BACKWARD = 4, 2


def refusal(array) -> str | None:
    """What the kernels do not support in this call, or None."""
    if array.dtype != jnp.float32:
        return f"dtype {array.dtype}: must be float32"
    if array.ndim == 4 and array.shape[3] > WIDEST:
        return f"{array.shape[3]} channels per head: at most {WIDEST} fit in registers"
    return None


def _step7(constants, state, token):
    del constants
    [matrix], (r, w, k, v, a, b) = state, token
    removed = jnp.sum(matrix * a[None], 1)
    decayed = matrix * jnp.exp(-jnp.exp(w))[None]
    matrix = decayed + removed[:, None] * b[None] + v[:, None] * k[None]
    return (matrix,), jnp.sum(matrix * r[None], 1)


class _Layout(NamedTuple):
    """The part of an operation's arrays that each program has, and their padding.

    ``empty``: the values of each array of a state before the first token. ``parts``: the number of
    programs for each row of the batch; ``width``: the channels of one. ``heads``: whether a part is
    a head, whose state is a matrix. ``channels``: the size of the last axis before padding.
    """

    step: Callable
    empty: tuple[float, ...]
    parts: int
    width: int
    heads: bool
    channels: int

    @classmethod
    def of(cls, op: str, tokens) -> "_Layout":
        if op == "wkv4":
            d = tokens[0].shape[2]
            return cls(step4, (0.0, 0.0, EMPTY), pl.cdiv(d, LANES), LANES, False, d)
        h, c = tokens[0].shape[2:]
        return cls(_step7, (0.0,), h, pl.next_power_of_2(c), True, c)

    @property
    def warps(self) -> int:
        return max(1, self.width**2 // (HELD * LANES)) if self.heads else 1

    def padded(self, a, axes: int, time: int = 0):
        """``a`` with its last ``axes`` padded to full parts, and its length to ``time`` if > 0."""
        wide = self.width if self.heads else self.parts * self.width
        lengths = {a.ndim - 1 - i: wide for i in range(axes)}
        if time:
            lengths[1] = time
        return jnp.pad(a, [(0, lengths.get(i, n) - n) for i, n in enumerate(a.shape)])

    def cut(self, a, axes: int):
        """The inverse of `padded`, except for time."""
        return a[(..., *[slice(self.channels)] * axes)]

    def padded_states(self, arrays):
        return tuple(self.padded(a, 2 if self.heads else 1) for a in arrays)

    def cut_states(self, arrays):
        return tuple(self.cut(a, 2 if self.heads else 1) for a in arrays)


class _Call(NamedTuple):
    """The layout of a call, and its chunks."""

    layout: _Layout
    batch: int
    length: int
    chunk: int

    @classmethod
    def of(cls, op: str, sizes: Mapping[str, int], tokens) -> "_Call":
        batch, length = tokens[0].shape[:2]
        return cls(_Layout.of(op, tokens), batch, length, min(sizes["chunk"], length))

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    def tokenwise(self, tokens, reset_bt):
        """The tokens padded to full chunks, and 1 where a segment begins."""
        time = self.chunks * self.chunk
        reset = jnp.pad(reset_bt.astype(jnp.float32), [(0, 0), (0, time - self.length)])
        return *(self.layout.padded(a, 1, time) for a in tokens), reset

    def cut_tokens(self, a):
        return self.layout.cut(a, 1)[:, : self.length]

    def kinds(self) -> dict[str, tuple[tuple, tuple, Callable]]:
        """Kind of array → its shape, its block's shape, the block's index for part p of row b."""
        b, n, w = self.batch, self.layout.parts, self.layout.width
        time, steps = self.chunks * self.chunk, self.chunk // _stride(self.chunk, BACKWARD)
        chunks = self.chunks
        if self.layout.heads:
            return dict(
                tokens=((b, time, n, w), (None, time, None, w), lambda p, b: (b, 0, p, 0)),
                reset=((b, time), (None, time), lambda p, b: (b, 0)),
                state=((b, n, w, w), (None, None, w, w), lambda p, b: (b, p, 0, 0)),
                starts=(
                    (chunks, b, n, w, w),
                    (chunks, None, None, w, w),
                    lambda p, b: (0, b, p, 0, 0),
                ),
                kept=(
                    (b, n, steps, w, w),
                    (None, None, steps, w, w),
                    lambda p, b: (b, p, 0, 0, 0),
                ),
            )
        return dict(
            tokens=((b, time, n * w), (None, time, w), lambda p, b: (b, 0, p)),
            reset=((b, time), (None, time), lambda p, b: (b, 0)),
            constant=((n * w,), (w,), lambda p, b: (p,)),
            d_constant=((b, n * w), (None, w), lambda p, b: (b, p)),
            state=((b, n * w), (None, w), lambda p, b: (b, p)),
            starts=((chunks, b, n * w), (chunks, None, w), lambda p, b: (0, b, p)),
            kept=((b, steps, n * w), (None, steps, w), lambda p, b: (b, 0, p)),
        )

    def run(self, kernel, name, inputs, outputs, arrays):
        """Run ``kernel`` over parts and rows; ``inputs``, ``outputs``: their kinds."""
        kinds = self.kinds()
        specs = {kind: pl.BlockSpec(block, index) for kind, (_, block, index) in kinds.items()}
        return pl.pallas_call(
            named(name, kernel, self),
            grid=(self.layout.parts, self.batch),
            in_specs=[specs[kind] for kind in inputs],
            out_specs=[specs[kind] for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(kinds[kind][0], jnp.float32) for kind in outputs],
            compiler_params=triton.CompilerParams(num_warps=self.layout.warps),
            name=name,
        )(*arrays)

    def advance(self, constants, state, token, alive, begins):
        """The state after one token, or ``state`` if not ``alive`` (padding); and ``y``."""
        initial = tuple(
            jnp.where(begins, jnp.full_like(s, e), s)
            for s, e in zip(state, self.layout.empty, strict=True)
        )
        new, y = self.layout.step(constants, initial, token)
        return tuple(jnp.where(alive, n, s) for n, s in zip(new, state, strict=True)), y


def _stride(chunk: int, most: int) -> int:
    """The number of unrolled tokens: at most ``most``, and a divisor of ``chunk``."""
    return math.gcd(chunk, most)


def _groups(refs, *counts: int) -> list:
    """``refs`` in groups of ``counts``."""
    groups, index = [], 0
    for count in counts:
        groups.append(refs[index : index + count])
        index += count
    assert index == len(refs), (index, len(refs))
    return groups


def _forward_kernel(call: _Call, *refs):
    states = len(call.layout.empty)
    constant_count, token_count = (0, 6) if call.layout.heads else (2, 2)
    constants, tokens, [reset], firsts, [y], ends, starts = _groups(
        refs, constant_count, token_count, 1, states, 1, states, states
    )
    fixed = tuple(c[...] for c in constants)
    stride = _stride(call.chunk, FORWARD)

    def of_chunk(i, state):
        for start, s in zip(starts, state, strict=True):
            start[i] = s

        def step(n, state):
            for u in range(stride):
                t = i * call.chunk + n * stride + u
                token = tuple(x[t, :] for x in tokens)
                state, y[t, :] = call.advance(fixed, state, token, t < call.length, reset[t] > 0)
            return state

        return jax.lax.fori_loop(0, call.chunk // stride, step, state)

    state = jax.lax.fori_loop(0, call.chunks, of_chunk, tuple(f[...] for f in firsts))
    for end, s in zip(ends, state, strict=True):
        end[...] = s


def forward(op: str, sizes: Mapping[str, int], constants, state, tokens, reset_bt) -> Any:
    """``y``, the final state, and the states at the beginnings of chunks ``[chunks, b, …]``."""
    call = _Call.of(op, sizes, tokens)
    count = len(state)
    y, *states = call.run(
        _forward_kernel,
        op,
        ("constant",) * len(constants)
        + ("tokens",) * len(tokens)
        + ("reset",)
        + ("state",) * count,
        ("tokens",) + ("state",) * count + ("starts",) * count,
        (
            *(call.layout.padded(a, 1) for a in constants),
            *call.tokenwise(tokens, reset_bt),
            *call.layout.padded_states(state),
        ),
    )
    states = call.layout.cut_states(states)
    return call.cut_tokens(y), states[:count], states[count:]


def _backward_kernel(call: _Call, *refs):
    states = len(call.layout.empty)
    constant_count, token_count = (0, 6) if call.layout.heads else (2, 2)
    (
        constants, tokens, [reset], starts, [dy], d_ends,
        d_constants, d_tokens, d_firsts, stored,
    ) = _groups(
        refs, constant_count, token_count, 1, states, 1, states,
        constant_count, token_count, states, states,
    )  # fmt: skip
    fixed = tuple(c[...] for c in constants)
    stride = _stride(call.chunk, BACKWARD)
    steps = call.chunk // stride

    def read_token(i, n, u):
        """Token ``u`` of step ``n`` of chunk ``i``: its index, its values, ``(alive, begins)``."""
        t = i * call.chunk + n * stride + u
        return t, tuple(x[t, :] for x in tokens), (t < call.length, reset[t] > 0)

    def of_chunk(from_end, carry):
        i = call.chunks - 1 - from_end

        def recompute(n, state):
            # the thread that writes this also reads it, so that no barrier is required
            for k, s in zip(stored, state, strict=True):
                k[n] = s
            for u in range(stride):
                _, token, flags = read_token(i, n, u)
                state, _ = call.advance(fixed, state, token, *flags)
            return state

        jax.lax.fori_loop(0, steps, recompute, tuple(s[i] for s in starts))

        def step(from_last, carry):
            d_state, d_fixed = carry
            n = steps - 1 - from_last
            states_before = [tuple(k[n] for k in stored)]
            for u in range(stride - 1):
                _, token, flags = read_token(i, n, u)
                states_before.append(call.advance(fixed, states_before[-1], token, *flags)[0])
            for u in reversed(range(stride)):
                t, token, flags = read_token(i, n, u)

                def run(constants, state, token, flags=flags):
                    return call.advance(constants, state, token, *flags)

                _, vjp = jax.vjp(run, fixed, states_before[u], token)
                d_constant, d_state, d_token = vjp((d_state, dy[t, :]))
                d_fixed = tuple(d + m for d, m in zip(d_fixed, d_constant, strict=True))
                for d, value in zip(d_tokens, d_token, strict=True):
                    d[t, :] = value
            return d_state, d_fixed

        return jax.lax.fori_loop(0, steps, step, carry)

    start = (tuple(d[...] for d in d_ends), tuple(jnp.zeros_like(c) for c in fixed))
    d_state, d_fixed = jax.lax.fori_loop(0, call.chunks, of_chunk, start)
    for refs, gradients in ((d_firsts, d_state), (d_constants, d_fixed)):
        for ref, value in zip(refs, gradients, strict=True):
            ref[...] = value


def backward(op: str, sizes: Mapping[str, int], constants, tokens, reset_bt, starts, dy, d_end):
    """Gradients by constants, by the first state and by tokens."""
    call = _Call.of(op, sizes, tokens)
    fixed, states, inputs = len(constants), len(d_end), len(tokens)
    *padded, reset = call.tokenwise((*tokens, dy), reset_bt)
    gradients = call.run(
        _backward_kernel,
        f"{op}_backward",
        ("constant",) * fixed + ("tokens",) * inputs + ("reset",)
        + ("starts",) * states + ("tokens",) + ("state",) * states,
        ("d_constant",) * fixed + ("tokens",) * inputs + ("state",) * states + ("kept",) * states,
        (
            *(call.layout.padded(a, 1) for a in constants),
            *padded[:-1],
            reset,
            *call.layout.padded_states(starts),
            padded[-1],
            *call.layout.padded_states(d_end),
        ),
    )  # fmt: skip
    d_constants, d_tokens, d_first, _ = _groups(gradients, fixed, inputs, states, states)
    return (
        tuple(call.layout.cut(d.sum(0), 1) for d in d_constants),
        call.layout.cut_states(d_first),
        tuple(map(call.cut_tokens, d_tokens)),
    )
