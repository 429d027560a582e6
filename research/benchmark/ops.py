"""The ops, their named cases per platform, and what a call of each computes and moves."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.config import ConfigError

Case = Mapping[str, int | str]


class Op(NamedTuple):
    """``arrays(case)`` in the order of the op's signature; ``flops(case)`` of the forward pass."""

    arrays: Callable[[Case], list[jax.Array]]
    flops: Callable[[Case], float]
    cases: Mapping[str, Mapping[str, Case]]
    backward: float  # floating-point operations of forward+backward over those of forward


def _normal(case, *shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, case["dtype"]) for k, s in zip(keys, shapes, strict=True)]


def _attention(case):
    return _normal(case, *[(case["b"], case["t"], case["h"], case["c"])] * 3)


def _attention_flops(case):  # two products over half the square: causal
    return 2 * case["b"] * case["h"] * case["t"] ** 2 * case["c"]


def _selective(case):
    b, t, d, n = (case[k] for k in "btdn")
    x, delta, a, b_in, c_out = _normal(case, (b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n))
    return [x, 0.1 * jax.nn.softplus(delta), -jnp.exp(a), b_in, c_out]


def _selective_flops(case):  # a·s + (δx)·B, then C·s: six a state and token, with the products
    return 6 * case["b"] * case["t"] * case["d"] * case["n"]


def _grouped(case):
    m, d, f, e = (case[k] for k in "mdfe")
    x, weights = _normal(case, (m, d), (e, d, f))
    return [x, weights / math.sqrt(d), jnp.full(e, m // e, jnp.int32)]


def _grouped_flops(case):
    return 2 * case["m"] * case["d"] * case["f"]


def _attention_cases(batch_tokens, lengths, h, c, dtype):
    sizes = {"h": h, "c": c, "dtype": dtype}
    return {f"t{t}": {"b": max(1, batch_tokens // t), "t": t, **sizes} for t in lengths}


_ATTENTION_CHIP = _attention_cases(16384, (4096, 8192, 16384, 32768), 16, 128, "bfloat16")
_SCAN_CHIP = {"t4096": {"b": 8, "t": 4096, "d": 4096, "n": 16, "dtype": "bfloat16"}}
_GROUPED_CHIP = {
    f"e{e}": {"m": 16384, "e": e, "d": 4096, "f": 14336, "dtype": "bfloat16"} for e in (8, 64)
}
_SCAN_CPU = {"t2048": {"b": 2, "t": 2048, "d": 512, "n": 16, "dtype": "float32"}}
_GROUPED_CPU = {"e8": {"m": 2048, "e": 8, "d": 256, "f": 512, "dtype": "float32"}}


def _platforms(cpu, chip):
    return {"cpu": cpu, "gpu": chip, "tpu": chip}


OPS = {
    "flash_attention": Op(
        _attention,
        _attention_flops,
        _platforms(_attention_cases(0, (1024, 4096, 16384), 8, 64, "float32"), _ATTENTION_CHIP),
        3.5,
    ),
    "selective_scan": Op(_selective, _selective_flops, _platforms(_SCAN_CPU, _SCAN_CHIP), 3.0),
    "grouped_matmul": Op(_grouped, _grouped_flops, _platforms(_GROUPED_CPU, _GROUPED_CHIP), 3.0),
}


def ours(name: str, implementation: str, blocks: Mapping[str, int] | None = None) -> Callable:
    """``pallas_kernels.<name>.<name>`` with its first output alone.

    Raises:
      ConfigError: the op is not in `pallas_kernels`.
    """
    module = f"pallas_kernels.{name}"
    try:
        op = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"op={name!r}: pallas_kernels has no such op yet") from None

    def call(*arrays):
        y = op(*arrays, implementation=implementation, blocks=blocks)
        return y[0] if isinstance(y, tuple) else y

    return call
