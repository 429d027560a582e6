"""Measurements that experiments share: bytes of states and programs, and times taken in turn."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

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
    runs = [_decoding(m, batch, length, rounds) for m in (baseline, model)]
    baseline_time, time_ = median_times(runs, rounds)
    return baseline_time / time_


def decode_slowdown(
    model: Decoder, *, batch: int, short: int, long: int, rounds: int = 30
) -> float:
    """How many times longer a token takes after ``long`` tokens than after ``short``.

    Turn by turn, as `decode_speedup`.
    """
    runs = [_decoding(model, batch, length, rounds) for length in (short, long)]
    short_time, long_time = median_times(runs, rounds)
    return long_time / short_time


def median_times(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each of ``runs`` over ``rounds`` turns, A B A B …, after one call each."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # the first call compiles
                spent.append(time.perf_counter() - start)
    return [float(np.median(spent)) for spent in times]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs a device beside its arguments and results."""
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of ``sizes`` that ``values`` grow with: the slope of their logarithms."""
    check(min(values) > 0, "values", values, "must be > 0")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _decoding(model: Decoder, batch: int, length: int, rounds: int) -> Callable[[], None]:
    """A function that decodes the next token of ``batch`` rows after ``length`` cached ones."""
    chunk = min(length, 128)
    check(length % chunk == 0, "length", length, f"must be a multiple of {chunk}")
    # by way of the host: a model that rests on a mesh would decode there
    model = jax.tree.map(jnp.asarray, jax.device_get(model))
    # one more than the rounds, for the call that compiles
    state = model.init_state(batch, length + rounds + 1)
    for at in range(0, length, chunk):
        state, _ = _read(model, state, at, batch, chunk)
    at = length

    def run():
        nonlocal state, at
        state, token = _read(model, state, at, batch, 1)
        jax.block_until_ready((state, token))
        at += 1

    return run


# The cache is donated, as in a serving loop: else the time is that of copying it.
@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=1)
def _read(model, state, at, batch, count):
    """The state after ``count`` more tokens a row, and the likeliest next ones."""
    positions = jnp.broadcast_to(at + jnp.arange(count), (batch, count))
    output = model(jnp.zeros((batch, count), jnp.int32), positions, state=state)
    return output.state, jnp.argmax(output.logits_btv[:, -1], axis=-1)
