"""Measure an operation: ours and the peers, case by case, as one JSON-ready record."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.config import ConfigError, check, check_choice
from research.benchmark import measure
from research.benchmark.ops import IMPLEMENTATIONS, Op, known, ours
from research.benchmark.peers import PEERS, Peer, missing, of_jax
from research.benchmark.targets import BOTH, FORWARD, PASSES, REFERENCE, judge
from research.training.environment import environment

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = 2**24  # of one size
# packages besides JAX that affect measurements on accelerators; recorded if installed
PACKAGES = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
            "nvidia-cudnn-cu13")  # fmt: skip


class Request(NamedTuple):
    """A checked request: what to measure."""

    name: str
    op: Op
    cases: Mapping[str, Mapping[str, int | str]]
    implementations: Sequence[str]
    peers: Mapping[str, Peer]

    @property
    def parts(self) -> int:
        """The number of parts that share a budget."""
        return len(self.cases) * len(self.passes)

    @property
    def passes(self) -> Sequence[str]:
        return PASSES if self.op.backward is not None else (FORWARD,)

    @property
    def flops(self) -> float:
        """FLOPs of the largest case."""
        return max(self.op.flops(case) for case in self.cases.values())


def request(
    name: str,
    *,
    cases: Sequence[str] | None = None,
    shape: Mapping[str, int] | None = None,
    dtype: str | None = None,
    implementations: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
) -> Request:
    """What to measure of the operation ``name`` on this machine's platform.

    Args:
      cases, implementations, peers: names; None: all, ``[]``: none.
      shape: sizes that replace those of the first case; only that case is measured.
      dtype: replaces that of every case.

    Raises:
      ConfigError: an unknown name, or a size or dtype that is not supported.
    """
    ops = known()
    check_choice("op", name, ops)
    op, platform = ops[name], jax.default_backend()
    check_choice("platform", platform, IMPLEMENTATIONS)
    known_peers = PEERS[name][platform]
    options = {
        "cases": (cases, op.cases[platform]),
        "implementations": (implementations, IMPLEMENTATIONS[platform]),
        "peers": (peers, known_peers),
    }
    chosen: dict[str, list[str]] = {}
    for field, (requested, names) in options.items():
        for item in requested or ():
            check_choice(field, item, names)
        chosen[field] = list(names) if requested is None else list(requested)
    check(bool(chosen["cases"]), "cases", chosen["cases"], "must name at least one")
    selected = {item: dict(op.cases[platform][item]) for item in chosen["cases"]}
    if shape:
        selected = _reshaped(next(iter(selected.values())), shape)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        selected = {item: {**case, "dtype": dtype} for item, case in selected.items()}
    for item, case in selected.items():
        _check_fits(op, item, case)
    return Request(
        name,
        op,
        selected,
        chosen["implementations"],
        {item: known_peers[item] for item in chosen["peers"]},
    )


def _reshaped(case: dict[str, Any], shape: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    sizes = [field for field, value in case.items() if isinstance(value, int)]
    for field, value in shape.items():
        if field not in sizes:
            raise ConfigError(f"shape.{field}={value!r}: no such size; known: {', '.join(sizes)}")
        allowed = f"must be an integer from 1 to {LARGEST}"
        check(isinstance(value, int) and 0 < value <= LARGEST, f"shape.{field}", value, allowed)
    return {"_".join(f"{field}{value}" for field, value in shape.items()): {**case, **shape}}


def _check_fits(op: Op, name: str, case: Mapping[str, int | str]) -> None:
    """Raise `ConfigError` for inputs of more than half of the free memory.

    A run that fills the host's memory makes the machine unusable.
    """
    total = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.eval_shape(lambda: op.arrays(case))
    )
    free = measure.free_bytes()
    allowed = f"its inputs are {total / 1e9:.1f} GB, must be at most half of {free / 1e9:.1f} free"
    check(total <= free / 2, "cases", name, allowed)


def check_effort(rounds: int, seconds: float, budget: float) -> None:
    """Raise `ConfigError` unless the numbers are in their ranges."""
    check(0 < rounds <= 10_000, "rounds", rounds, "must be from 1 to 10000")
    for field, value in (("seconds", seconds), ("budget", budget)):
        check(0 < value < math.inf, field, value, "must be > 0 and finite")


def bench(
    asked: Request, *, rounds: int = 10, seconds: float = 20.0, budget: measure.Budget
) -> dict[str, Any]:
    """Measure what is ``asked``.

    Args:
      rounds: the largest number of times that each function is timed.
      seconds: a function is skipped after this time (without compilation and the first call).
      budget: of the whole run.
    """
    machine = machine_record(peer.package for peer in asked.peers.values())
    ceilings: dict[str, Any] = {}
    measured = {}
    for case_name, case in asked.cases.items():
        dtype = str(case["dtype"])
        if dtype not in ceilings:
            ceilings[dtype] = measure.ceilings(dtype, rounds, seconds)
        measured[case_name] = {"case": dict(case)}
        for which in asked.passes:
            measured[case_name][which] = _pass(asked, case, which, rounds, seconds, budget)
    record = {"op": asked.name, "machine": machine, "ceilings": ceilings, "cases": measured}
    if asked.op.backward is None:
        record["passes"] = list(asked.passes)
    return record | {"targets": judge(record)}


def machine_record(compared: Iterable[str]) -> dict[str, Any]:
    """The environment, with the versions of the packages that are ``compared``."""
    machine = environment()
    device = jax.devices()[0]
    packages = dict(machine["packages"])
    for name in (*PACKAGES, *compared):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue  # peers that are not installed are listed as skipped
    return machine | {
        "packages": packages,
        "backend": device.platform,
        "device_kind": device.device_kind,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def _pass(asked: Request, case, which, rounds, seconds, budget):
    deadline = budget.share()
    arrays = asked.op.arrays(case)
    backward = which == BOTH
    # all implementations have the same output shape, so dy is the same
    y = jax.eval_shape(ours(asked.name, "xla"), *arrays)
    dy = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
    inputs = [*arrays, dy] if backward else arrays
    prepared, absent = {}, {}
    ours_by_name = {f"ours/{one}": of_jax(ours(asked.name, one)) for one in asked.implementations}
    reference = {name: ours_by_name.pop(name) for name in [REFERENCE] if name in ours_by_name}
    # last: it is the slowest, so that a budget omits it first
    contenders = ours_by_name | dict(asked.peers) | reference
    for name, peer in contenders.items():
        if (reason := missing(peer)) is not None:
            absent[name] = reason
        elif budget.clock() >= deadline:
            absent[name] = measure.BUDGET
        else:
            try:
                prepared[name] = peer.prepare(inputs, backward)
            except Exception as error:  # it does not support this call
                absent[name] = f"failed: {measure.reason(error)}"
    absent |= measure.warm(prepared, measure.Agreement(), deadline, budget.clock)
    runs = {name: one.run for name, one in prepared.items() if name not in absent}
    times, failed = measure.interleave(runs, rounds, seconds, deadline, budget.clock)
    absent |= failed
    flops = asked.op.flops(case) * (asked.op.backward or 1 if backward else 1)
    moved = _moved(arrays, dy, backward)
    results = {}
    for name in contenders:
        if name in absent:
            results[name] = {"absent": absent[name]}
            continue
        row = measure.describe(times[name])
        row["compile_seconds"] = prepared[name].compile_seconds
        row["temp_bytes"] = prepared[name].temp_bytes
        row["flops_per_second"] = flops / row["median"]
        row["bytes_per_second"] = moved / row["median"]
        results[name] = row
    compare(results)
    return results


def _moved(arrays, dy, backward) -> int:
    """The fewest bytes that are read and written: inputs and outputs, once per pass."""
    inputs = sum(x.nbytes for x in arrays)
    if not backward:
        return inputs + dy.nbytes  # the output has the size of dy
    gradients = sum(x.nbytes for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))
    return inputs + dy.nbytes + inputs + dy.nbytes + gradients


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Add to each timed row the best peer, and its speed relative to peers and reference."""
    timed = {name: row for name, row in results.items() if "median" in row}
    peers = {name: row["median"] for name, row in timed.items() if not name.startswith("ours/")}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    for row in timed.values():
        row["best_peer"] = best
        row["times_as_fast_as"] = {
            name: measure.ratio(other["times"], row["times"])
            for name, other in timed.items()
            if other is not row and (name in peers or name == REFERENCE)
        }
