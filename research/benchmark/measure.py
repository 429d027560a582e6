"""Times of several functions, taken in turn (A B C A B C …) so that drift hits all alike."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Prepared(NamedTuple):
    """A compiled function: ``run()`` returns when its result is there."""

    run: Callable[[], Any]
    compile_seconds: float | None
    temp_bytes: int | None


def prepare(function: Callable, arrays: Sequence[jax.Array]) -> Prepared:
    """Compile ``function`` for ``arrays``.

    Raises:
      MemoryError: its temporaries exceed what this host has free (a GPU or TPU says so itself).
    """
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arrays).compile()
    seconds = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    temp = None if analysis is None else int(analysis.temp_size_in_bytes)
    if jax.default_backend() == "cpu" and temp is not None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if temp > 0.8 * free:
            raise MemoryError(
                f"needs {temp / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} are free"
            )
    return Prepared(lambda: jax.block_until_ready(compiled(*arrays)), seconds, temp)


def both_passes(function: Callable, arrays: Sequence[jax.Array], dy: jax.Array) -> Callable:
    """The gradient of ``sum(function(*arrays) * dy)`` by every floating array."""
    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(*inputs):
        return jnp.sum((function(*inputs) * dy).astype(jnp.float32))

    return jax.grad(loss, argnums=tuple(floating))


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of each of ``runs`` in turn, and why those without any failed.

    Each is called once before, untimed. One that has spent ``seconds`` is timed once at least and
    then sits out.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    spent: dict[str, float] = {}
    for name, run in runs.items():
        begin = clock()
        try:
            run()
        except Exception as error:  # a peer that fails is listed, not fatal
            failed[name] = reason(error)
            continue
        times[name], spent[name] = [], clock() - begin
    for _ in range(rounds):
        for name, taken in times.items():
            if taken and spent[name] >= seconds:
                continue
            begin = clock()
            runs[name]()
            taken.append(clock() - begin)
            spent[name] += taken[-1]
    return times, failed


def describe(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of ``times``."""
    if len(times) == 1:
        low = high = times[0]
    else:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    quartiles = [low, high]
    return {"median": statistics.median(times), "quartiles": quartiles, "rounds": len(times)}


def reason(error: Exception) -> str:
    """One line of at most 160 characters saying what ``error`` is."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:160]


def ceilings(dtype: str, rounds: int, seconds: float) -> dict[str, float]:
    """What this machine reaches: FLOP/s in a big matmul, bytes/s in a big addition."""
    big = jax.default_backend() != "cpu"
    side, length = (8192, 2**28) if big else (2048, 2**25)
    square, line = jnp.ones((side, side), dtype), jnp.ones(length, jnp.float32)
    runs = {
        "matmul": prepare(jnp.matmul, [square, square]).run,
        "add": prepare(lambda x: x + 1, [line]).run,
    }
    times, failed = interleave(runs, rounds, seconds)
    if failed:
        raise ValueError(f"the machine's ceilings cannot be measured: {failed}")
    matmul, add = (statistics.median(times[name]) for name in runs)
    return {"flops_per_second": 2 * side**3 / matmul, "bytes_per_second": 8 * length / add}
