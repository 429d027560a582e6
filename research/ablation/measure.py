"""Measurements that experiments share: bytes of states and programs, and alternating timings."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.config import check, from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.outputs_first import for_decoding
from layers.state import CONTIGUOUS, CacheConfig
from pallas_kernels.stored import Stored
from research.ablation.experiment import Unit
from research.memory import device_memory, spell


def state_bytes(model: Decoder, batch: int, length: int, cache: CacheConfig = CONTIGUOUS) -> int:
    """Bytes of keys, values or recurrent state that ``model`` keeps for ``length`` tokens per row.

    Computed from abstract shapes: nothing is allocated. The codes and scales of quantised caches
    are counted. Bookkeeping (positions, segments, tables of pages) is not, as in the papers.
    """
    state = jax.eval_shape(lambda: model.init_state(batch, length, cache))

    def counted(node) -> int:
        if not isinstance(node, Stored) and not jnp.issubdtype(node.dtype, jnp.floating):
            return 0
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(node))

    stored = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Stored))
    return sum(map(counted, stored))


def check_decoding(unit: Unit, batch: int, *lengths: int) -> None:
    """Raise `ConfigError` if the unit's model cannot decode ``batch`` rows after ``lengths``."""
    check(batch > 0, "batch", batch, "must be > 0")
    model: Any = from_mapping(DecoderConfig, unit.config.model, "model")
    abstract = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    for length in lengths:
        _chunk(length)
        needed, memory = state_bytes(abstract, batch, length), device_memory(jax.devices()[0])
        if memory is not None:
            sizes = f"a state of {spell(needed)} must fit into {spell(memory)} of memory"
            check(needed <= memory, "length", length, sizes)


def decode_speedup(
    model: Decoder, baseline: Decoder, *, batch: int, length: int, rounds: int = 30
) -> float:
    """How many times faster ``model`` decodes a token than ``baseline`` after ``length`` tokens.

    The two models alternate in one process, so that other load on the machine affects both. The
    result is the ratio of their median times over ``rounds`` tokens. Both run on one device,
    whatever their stored sharding is.
    """
    runs = [_decoding(m, batch, length, rounds) for m in (baseline, model)]
    baseline_time, time_ = median_times(runs, rounds)
    return baseline_time / time_


def decode_slowdown(
    model: Decoder, *, batch: int, short: int, long: int, rounds: int = 30
) -> float:
    """How many times longer a token takes after ``long`` tokens than after ``short``.

    The two lengths alternate, as the models do in `decode_speedup`.
    """
    runs = [_decoding(model, batch, length, rounds) for length in (short, long)]
    short_time, long_time = median_times(runs, rounds)
    return long_time / short_time


def pass_cost(
    model: Decoder, *, tokens: int, length: int, batch: int = 1, rounds: int = 30
) -> float:
    """How many times longer a pass of ``tokens`` new tokens takes than one of 1, after ``length``.

    The two alternate, as the models do in `decode_speedup`.
    """
    runs = [_decoding(model, batch, length, rounds, count) for count in (1, tokens)]
    one_time, time_ = median_times(runs, rounds)
    return time_ / one_time


def median_times(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds per call of each of ``runs``: ``rounds`` calls each, in the order A B A B …

    One more call of each comes first and is not timed.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # the first call compiles
                spent.append(time.perf_counter() - start)
    return [float(np.median(spent)) for spent in times]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes per device that a compiled program requires besides its arguments and results."""
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of ``values`` ∝ ``sizes``ᵖ: the slope of log values over log sizes."""
    check(min(values) > 0, "values", values, "must be > 0")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _chunk(length: int) -> int:
    """The number of tokens that are decoded at once to fill a cache with ``length`` tokens."""
    check(length > 0, "length", length, "must be > 0")
    chunk = min(length, 128)
    check(length % chunk == 0, "length", length, f"must be a multiple of {chunk}")
    return chunk


def _decoding(
    model: Decoder, batch: int, length: int, rounds: int, count: int = 1
) -> Callable[[], None]:
    """A function of the next ``count`` tokens of ``batch`` rows after ``length`` cached tokens."""
    chunk = _chunk(length)
    # through the host: a model that is sharded over a mesh would decode on all of it
    model = for_decoding(jax.tree.map(jnp.asarray, jax.device_get(model)))
    # one call more than the rounds: the one that compiles
    state = model.init_state(batch, length + (rounds + 1) * count)
    for position in range(0, length, chunk):
        state, _ = _extend(model, state, position, batch, chunk)
    position = length

    def run():
        nonlocal state, position
        state, token = _extend(model, state, position, batch, count)
        jax.block_until_ready((state, token))
        position += count

    return run


# The cache is donated, as in a serving loop; otherwise the time would be that of copying it.
@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=1)
def _extend(model, state, position, batch, count):
    """The state after ``count`` more tokens per row, and the likeliest next tokens."""
    positions = jnp.broadcast_to(position + jnp.arange(count), (batch, count))
    output = model(jnp.zeros((batch, count), jnp.int32), positions, state=state)
    return output.state, jnp.argmax(output.logits_btv[:, -1], axis=-1)
