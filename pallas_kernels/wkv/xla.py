"""The recurrences in chunks: the backward pass stores one state for each chunk, not each token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.wkv.reference import STEPS


def _run(op, constants, state, part):
    """The state after a chunk of tokens ``part``, with time first, and its ``y``."""
    return jax.lax.scan(lambda s, x: STEPS[op](constants, s, *x), state, part)


def _split(size, *trees):
    """``trees`` of ``[b, t, …]`` in chunks, time first: ``[chunks, size, …]``, and the remainder.

    The remainder, if any, is a shorter chunk, because padding would change the state.
    """
    in_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), trees)
    t = jax.tree.leaves(in_time)[0].shape[0]
    full_length = t - t % size
    chunks = jax.tree.map(
        lambda x: x[:full_length].reshape(full_length // size, size, *x.shape[1:]), in_time
    )
    return chunks, jax.tree.map(lambda x: x[full_length:], in_time) if full_length < t else None


def _join(chunks, remainder):
    """The inverse of `_split` for one array."""
    flat = chunks.reshape(-1, *chunks.shape[2:])
    return jnp.moveaxis(flat if remainder is None else jnp.concatenate([flat, remainder]), 0, 1)


def forward(op: str, sizes: Mapping[str, int], constants, state, tokens, reset_bt):
    """``y``, the final state, and the states at the beginnings of chunks ``[chunks, b, …]``."""
    chunks, remainder = _split(min(sizes["chunk"], reset_bt.shape[1]), tokens, reset_bt)

    def chunk(state, part):
        end, y = _run(op, constants, state, part)
        return end, (y, state)

    state, (y, starts) = jax.lax.scan(chunk, state, chunks)
    y_remainder = None
    if remainder is not None:
        starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), starts, state)
        state, y_remainder = _run(op, constants, state, remainder)
    return _join(y, y_remainder), state, starts


def backward(op: str, sizes: Mapping[str, int], constants, tokens, reset_bt, starts, dy, d_end):
    """Gradients by constants, by the first state and by tokens, the last chunk first."""
    chunks, remainder = _split(min(sizes["chunk"], reset_bt.shape[1]), tokens, reset_bt, dy)

    def chunk(carry, stored):
        (d_constants, d_state), (start, (part, reset, dy)) = carry, stored
        _, vjp = jax.vjp(lambda c, s, x: _run(op, c, s, (x, reset)), constants, start, part)
        new_d_constants, d_start, d_part = vjp((d_state, dy))
        return (jax.tree.map(jnp.add, d_constants, new_d_constants), d_start), d_part

    carry, d_remainder = (jax.tree.map(jnp.zeros_like, constants), d_end), None
    if remainder is not None:
        carry, d_remainder = chunk(carry, (jax.tree.map(lambda s: s[-1], starts), remainder))
        starts = jax.tree.map(lambda s: s[:-1], starts)
    (d_constants, d_first), d_chunks = jax.lax.scan(chunk, carry, (starts, chunks), reverse=True)
    if d_remainder is None:
        return d_constants, d_first, tuple(_join(d, None) for d in d_chunks)
    return d_constants, d_first, tuple(map(_join, d_chunks, d_remainder))
