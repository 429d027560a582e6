"""Measure an op: ours and the peers, case by case, as one JSON-ready record."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.config import check, check_choice
from research.benchmark import measure
from research.benchmark.ops import OPS, ours
from research.benchmark.peers import PEERS, torch_attention
from research.training.environment import environment

PASSES = ("forward", "forward+backward")
IMPLEMENTATIONS = {"cpu": ("reference", "xla"), "gpu": ("xla", "gpu"), "tpu": ("xla", "tpu")}


def bench(
    name: str,
    *,
    cases: Sequence[str] | None = None,
    implementations: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    rounds: int = 10,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Measure the op ``name`` on this machine's platform.

    Args:
      cases, implementations, peers: which, by name; None takes all, ``[]`` none.
      rounds: how often each is timed at most.
      seconds: after how long one sits out the remaining rounds.

    Raises:
      ConfigError: a name that is not known here.
    """
    check_choice("op", name, OPS)
    check(rounds > 0, "rounds", rounds, "must be > 0")
    check(seconds > 0, "seconds", seconds, "must be > 0")
    platform = jax.default_backend()
    op, known_peers = OPS[name], PEERS[name][platform]
    known = {
        "cases": (cases, op.cases[platform]),
        "implementations": (implementations, IMPLEMENTATIONS[platform]),
        "peers": (peers, known_peers),
    }
    chosen = {}
    for field, (asked, names) in known.items():
        for one in asked or ():
            check_choice(field, one, names)
        chosen[field] = list(names) if asked is None else list(asked)
    functions: dict[str, Callable | None] = {
        f"ours/{one}": ours(name, one) for one in chosen["implementations"]
    }
    functions |= {one: known_peers[one] for one in chosen["peers"]}
    ceilings: dict[str, Any] = {}
    measured = {}
    for case_name in chosen["cases"]:
        case = op.cases[platform][case_name]
        dtype = str(case["dtype"])
        if dtype not in ceilings:
            ceilings[dtype] = measure.ceilings(dtype, rounds, seconds)
        measured[case_name] = {"case": dict(case)}
        for which in PASSES:
            measured[case_name][which] = _pass(op, case, functions, which, rounds, seconds)
    machine = environment() | {"device_kind": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    return {"op": name, "machine": machine, "ceilings": ceilings, "cases": measured}


def _pass(op, case, functions: Mapping[str, Callable | None], which, rounds, seconds):
    arrays = op.arrays(case)
    backward = which == PASSES[1]
    prepared, absent = {}, {}
    for name, function in functions.items():
        try:
            if function is None:
                prepared[name] = torch_attention(arrays, backward)
                continue
            if backward:
                y = jax.eval_shape(function, *arrays)
                function = measure.both_passes(function, arrays, jnp.ones(y.shape, y.dtype))
            prepared[name] = measure.prepare(function, arrays)
        except Exception as error:  # not installed, or it cannot serve this call: say so by name
            absent[name] = measure.reason(error)
    times, failed = measure.interleave({n: p.run for n, p in prepared.items()}, rounds, seconds)
    flops = op.flops(case) * (op.backward if backward else 1)
    results = {}
    for name in functions:
        if name not in times:
            results[name] = {"absent": absent.get(name) or failed[name]}
            continue
        found = measure.describe(times[name])
        found["compile_seconds"] = prepared[name].compile_seconds
        found["temp_bytes"] = prepared[name].temp_bytes
        found["flops_per_second"] = flops / found["median"]
        # what must be read at least: the inputs, once
        found["bytes_per_second"] = sum(x.nbytes for x in arrays) / found["median"]
        results[name] = found
    for name, found in results.items():
        if name.startswith("ours/") and "median" in found:
            found["times_as_fast_as"] = {
                peer: other["median"] / found["median"]
                for peer, other in results.items()
                if not peer.startswith("ours/") and "median" in other
            }
    return results
