"""Measurements that experiments share: bytes of a decoding state, and time of a decoding step."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import check
from layers.decoder import Decoder


def state_bytes(model: Decoder, batch: int, length: int) -> int:
    """Bytes of keys, values or recurrent state that ``model`` holds for ``length`` tokens a row.

    Counted from abstract shapes: nothing is allocated. Bookkeeping (positions, segments) is left
    out, as the papers do.
    """
    state = jax.eval_shape(lambda: model.init_state(batch, length))
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def decode_speedup(
    model: Decoder, baseline: Decoder, *, batch: int, length: int, rounds: int = 30
) -> float:
    """How many times faster ``model`` decodes a token than ``baseline`` after ``length`` tokens.

    The two take turns in one process, so that whatever else the machine does hits both; the result
    is the ratio of their median times over ``rounds`` tokens. Both run on one device, wherever
    they rest.
    """
    # by way of the host: a model that rests on a mesh would decode there
    here = (jax.tree.map(jnp.asarray, jax.device_get(m)) for m in (baseline, model))
    runs = [_decoding(m, batch, length, rounds) for m in here]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return float(np.median(times[0]) / np.median(times[1]))


def _decoding(model: Decoder, batch: int, length: int, rounds: int) -> Callable[[], None]:
    """A function that decodes the next token of ``batch`` rows after ``length`` cached ones."""
    chunk = min(length, 128)
    check(length % chunk == 0, "length", length, f"must be a multiple of {chunk}")
    # one more than the rounds: the first call compiles
    state = model.init_state(batch, length + rounds + 1)
    for at in range(0, length, chunk):
        state, _ = _read(model, state, at, batch, chunk)
    at = length

    def run():
        nonlocal state, at
        state, token = _read(model, state, at, batch, 1)
        jax.block_until_ready((state, token))
        at += 1

    run()
    return run


# The cache is donated, as in a serving loop: else the time is that of copying it.
@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=1)
def _read(model, state, at, batch, count):
    """The state after ``count`` more tokens a row, and the likeliest next ones."""
    positions = jnp.broadcast_to(at + jnp.arange(count), (batch, count))
    output = model(jnp.zeros((batch, count), jnp.int32), positions, state=state)
    return output.state, jnp.argmax(output.logits_btv[:, -1], axis=-1)
