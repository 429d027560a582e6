"""The recurrences in chunks: the backward pass keeps a state a chunk, and not a state a token."""

import jax
import jax.numpy as jnp


def scan(step, constants, state, tokens, size):
    """Like `reference.scan`, keeping the states at the beginnings of chunks of ``size`` tokens."""
    t = tokens[0].shape[1]
    whole = t - t % size

    @jax.checkpoint
    def chunk(state, part):
        state, y = jax.lax.scan(lambda s, x: step(constants, s, x), state, part)
        return state, y

    in_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    outputs = []
    if whole:
        chunks = jax.tree.map(
            lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), in_time
        )
        state, y = jax.lax.scan(chunk, state, chunks)
        outputs.append(y.reshape(whole, *y.shape[2:]))
    if whole < t:
        # the rest is a shorter chunk: padding would have to leave the final state alone
        state, y = chunk(state, jax.tree.map(lambda x: x[whole:], in_time))
        outputs.append(y)
    return jnp.moveaxis(jnp.concatenate(outputs), 0, 1), state
