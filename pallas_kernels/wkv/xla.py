"""The recurrences in chunks: a state a chunk is kept for the backward pass, not a state a token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.wkv.reference import STEPS


def _run(op, constants, state, part):
    """A chunk of tokens, time first: the state after it and its ``y``."""
    return jax.lax.scan(lambda s, x: STEPS[op](constants, s, *x), state, part)


def _split(size, *trees):
    """Trees of ``[b, t, …]`` in chunks, time first: ``[chunks, size, …]``, and the rest.

    The rest, None if there is none, is a chunk of its own: padding would have to leave the state
    alone.
    """
    in_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), trees)
    t = jax.tree.leaves(in_time)[0].shape[0]
    whole = t - t % size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), in_time)
    return chunks, jax.tree.map(lambda x: x[whole:], in_time) if whole < t else None


def _join(chunks, rest):
    """The inverse of `_split` for one array."""
    flat = chunks.reshape(-1, *chunks.shape[2:])
    return jnp.moveaxis(flat if rest is None else jnp.concatenate([flat, rest]), 0, 1)


def forward(op: str, sizes: Mapping[str, int], constants, state, tokens, reset_bt):
    """``y``, the final state, and the states at the beginnings of chunks ``[chunks, b, …]``."""
    chunks, rest = _split(min(sizes["chunk"], reset_bt.shape[1]), tokens, reset_bt)

    def chunk(state, part):
        end, y = _run(op, constants, state, part)
        return end, (y, state)

    state, (y, starts) = jax.lax.scan(chunk, state, chunks)
    y_rest = None
    if rest is not None:
        starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), starts, state)
        state, y_rest = _run(op, constants, state, rest)
    return _join(y, y_rest), state, starts


def backward(op: str, sizes: Mapping[str, int], constants, tokens, reset_bt, starts, dy, d_end):
    """Gradients by constants, by the first state and by tokens, the last chunk first."""
    chunks, rest = _split(min(sizes["chunk"], reset_bt.shape[1]), tokens, reset_bt, dy)

    def chunk(carry, kept):
        (d_constants, d_state), (start, (part, reset, dy)) = carry, kept
        _, pull = jax.vjp(lambda c, s, x: _run(op, c, s, (x, reset)), constants, start, part)
        more, d_start, d_part = pull((d_state, dy))
        return (jax.tree.map(jnp.add, d_constants, more), d_start), d_part

    carry, d_rest = (jax.tree.map(jnp.zeros_like, constants), d_end), None
    if rest is not None:
        carry, d_rest = chunk(carry, (jax.tree.map(lambda s: s[-1], starts), rest))
        starts = jax.tree.map(lambda s: s[:-1], starts)
    (d_constants, d_first), d_chunks = jax.lax.scan(chunk, carry, (starts, chunks), reverse=True)
    if d_rest is None:
        return d_constants, d_first, tuple(_join(d, None) for d in d_chunks)
    return d_constants, d_first, tuple(map(_join, d_chunks, d_rest))
