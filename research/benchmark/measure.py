"""Times of several functions, measured in turn (A B C A B C …), so that drift affects all alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# in place of the times of a function that was not run
BUDGET = "not run: budget"

Clock = Callable[[], float]


class Prepared(NamedTuple):
    """A compiled function: ``run()`` returns when its result is computed."""

    run: Callable[[], Any]
    values: Callable[[Any], list[np.ndarray]]  # the result of ``run`` as arrays, to compare
    compile_seconds: float | None = None
    temp_bytes: int | None = None


class Budget:
    """Seconds for a run, shared by its parts; later parts share what a part does not use."""

    def __init__(self, seconds: float, parts: int, clock: Clock = time.perf_counter):
        self.clock, self._end, self._parts = clock, clock() + seconds, parts

    def share(self) -> float:
        """The time at which the next part must end."""
        now = self.clock()
        share = max(0.0, self._end - now) / max(1, self._parts)
        self._parts -= 1
        return now + share


def prepare(function: Callable, arrays: Sequence[jax.Array]) -> Prepared:
    """Compile ``function`` for ``arrays``, which are arguments, so that XLA folds no constants.

    Raises:
      MemoryError: the temporaries exceed the free memory of this host (GPUs and TPUs raise by
        themselves).
    """
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arrays).compile()
    seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    temp = None if analysis is None else int(analysis.temp_size_in_bytes)
    if jax.default_backend() == "cpu" and temp is not None and temp > 0.8 * free_bytes():
        free = free_bytes() / 1e9
        raise MemoryError(f"needs {temp / 1e9:.1f} GB of temporaries, {free:.1f} are free")
    return Prepared(lambda: jax.block_until_ready(compiled(*arrays)), _values, seconds, temp)


def free_bytes() -> int:
    """Free memory of this host."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _values(result) -> list[np.ndarray]:
    return [np.asarray(sample(x).astype(jnp.float32)) for x in jax.tree.leaves(result)]


def sample(array: Any) -> Any:
    """Every n-th number of ``array``, at most some millions: expert weights can have gigabytes."""
    # an odd step, so that the sample has numbers of every column
    return array.reshape(-1)[:: math.prod(array.shape) // 2**22 | 1]


def both_passes(function: Callable, arrays: Sequence[jax.Array]) -> Callable:
    """``(*arrays, dy) → y`` and the gradient of ``sum(y · dy)`` by every floating array.

    ``dy`` is an argument like the others. The output is returned because training uses it:
    otherwise XLA would remove the computations that the gradient does not need.
    """
    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    def passes(*inputs):
        *inputs, dy = inputs

        def of_floating(*chosen):
            all_inputs = list(inputs)
            for i, x in zip(floating, chosen, strict=True):
                all_inputs[i] = x
            return function(*all_inputs)

        y, pullback = jax.vjp(of_floating, *(inputs[i] for i in floating))
        return y, pullback(dy)

    return passes


class Agreement:
    """Whether results are equal to the first one up to rounding: wrong results are not timed."""

    TOLERANCE = 0.05  # of the norm: above the rounding of a bfloat16 gradient, below errors

    def __init__(self):
        self._name, self._first = None, []

    def __call__(self, name: str, values: Sequence[np.ndarray]) -> str | None:
        """The error of ``values``, the result of ``name``, as text; None if there is none."""
        if self._name is None:
            if not all(np.isfinite(v).all() for v in values):
                return "failed: its result is not finite"
            self._name, self._first = name, values
            return None
        if [v.shape for v in values] != [v.shape for v in self._first]:
            return f"failed: its result has other shapes than {self._name}'s"
        worst = 0.0
        for value, first in zip(values, self._first, strict=True):
            norm = float(np.linalg.norm(first))
            difference = float(np.linalg.norm(value - first)) / (norm or 1.0)
            # not max(), which would ignore NaN
            worst = difference if not difference <= worst else worst
        if worst <= self.TOLERANCE:
            return None
        return f"failed: its result is {worst:.2g} of the norm away from {self._name}'s"


def warm(
    prepared: Mapping[str, Prepared],
    agreement: Callable[[str, Sequence[np.ndarray]], str | None],
    deadline: float = math.inf,
    clock: Clock = time.perf_counter,
) -> dict[str, str]:
    """Run each function once, untimed; returns the reasons of those that cannot be timed."""
    failed = {}
    for name, one in prepared.items():
        if clock() >= deadline:
            failed[name] = BUDGET
            continue
        try:
            failure = agreement(name, one.values(one.run()))
        except Exception as error:  # a failure is recorded and does not end the run
            failure = f"failed: {reason(error)}"
        if failure is not None:
            failed[name] = failure
    return failed


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    deadline: float = math.inf,
    clock: Clock = time.perf_counter,
    *,
    ahead: int = 0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of each of ``runs``, in turn, and the reasons of those that have no times.

    ``ahead``: how often a function runs untimed right before it is timed. A function is skipped
    once its times add up to ``seconds``, and when, judged by its longest time, it would end after
    ``deadline``.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, measured in times.items():
            if name in failed or (measured and sum(measured) >= seconds):
                continue
            started = clock()
            if started + (ahead + 1) * max(measured, default=0.0) >= deadline:
                continue
            try:
                for _ in range(ahead):
                    runs[name]()
                    started = clock()
                runs[name]()
            except Exception as error:  # in any round: the others continue
                failed[name] = f"failed: {reason(error)}"
                continue
            measured.append(clock() - started)
    failed |= {
        name: BUDGET for name, measured in times.items() if not measured and name not in failed
    }
    return {name: measured for name, measured in times.items() if name not in failed}, failed


def describe(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of ``times``, and the times themselves."""
    return {
        "median": statistics.median(times),
        "quartiles": quartiles(times),
        "rounds": len(times),
        "times": list(times),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as fast ``ours`` is, round by round: median and quartiles.

    This is not the ratio of the medians: what slows a round affects both.
    """
    rounds = [a / b for a, b in zip(theirs, ours, strict=False)]
    return {"ratio": statistics.median(rounds), "quartiles": quartiles(rounds)}


def reason(error: Exception) -> str:
    """``error`` in one line of at most 160 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:160]


def ceilings(dtype: str, rounds: int, seconds: float) -> dict[str, float]:
    """Peak rates of this machine: FLOP/s of a large matmul, bytes/s of a large copy.

    The copy's bytes are those read plus those written. The numbers are random: a GPU multiplies
    zeros faster.
    """
    big = jax.default_backend() != "cpu"
    side, length = (8192, 2**28) if big else (2048, 2**25)
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    line = jax.random.normal(jax.random.key(1), (length,), jnp.float32)
    prepared = {
        "matmul": prepare(jnp.matmul, [square, square]),
        # negated, because XLA may remove a plain copy
        "copy": prepare(jnp.negative, [line]),
    }
    for one in prepared.values():
        one.run()
    times, _ = interleave({name: one.run for name, one in prepared.items()}, rounds, seconds)
    matmul, copy = (statistics.median(times[name]) for name in prepared)
    return {"flops_per_second": 2 * side**3 / matmul, "bytes_per_second": 2 * line.nbytes / copy}
